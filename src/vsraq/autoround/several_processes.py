# SPDX-License-Identifier: Apache-2.0
"""Make all processes that tune a model together end with the same weights.

Under torch.distributed AutoRound 0.16 averages the gradients of the processes, each of
which has samples of its own. Everything else each process decides for itself: which
iteration was the best, which tokens are masked, what the largest activation is; and
every one of them exports. So plain AutoRound ends with other weights in every process.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from auto_round import envs
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.utils.device_manager import device_manager
from torch import Tensor, nn

from vsraq.processes import gather, is_first_process, mean_over_processes, process_count

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

logger = logging.getLogger("autoround.vsraq")


class _FirstProcessOnly(logging.Filter):
    """Says once what every process would say."""

    def filter(self, record: logging.LogRecord) -> bool:
        return is_first_process()


_FIRST_PROCESS_ONLY = _FirstProcessOnly()


class SeveralProcesses(SignRoundQuantizer):
    """What a process of several decides, decided alike in all of them.

    With one process it is `SignRoundQuantizer`.
    """

    _tuned_block: nn.Module | None = None

    def prepare_run(self, composer: "AlgorithmComposer | None" = None) -> None:
        """Let only the first process speak."""
        super().prepare_run(composer=composer)
        logger.addFilter(_FIRST_PROCESS_ONLY)

    def finalize_run(self) -> None:
        """Let this process speak again; safe to call twice."""
        super().finalize_run()
        logger.removeFilter(_FIRST_PROCESS_ONLY)

    def quantize_block(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Tune one block with the activation scales of all samples."""
        if process_count() == 1:
            return super().quantize_block(block, *args, **kwargs)
        share_activation_maxima(block)
        self._tuned_block = block
        try:
            return super().quantize_block(block, *args, **kwargs)
        finally:
            self._tuned_block = None

    def _compute_valid_token_mask(self, input_ids: list[Tensor]) -> list[Tensor] | None:
        """AutoRound's mask; one of ones where only other processes have padding.

        Masked and unmasked losses differ in scale.
        """
        masks: list[Tensor] | None = super()._compute_valid_token_mask(input_ids)
        if any(gather(masks is not None)) and masks is None:
            masks = [torch.ones_like(ids, dtype=torch.long) for ids in input_ids]
        return masks

    def _get_non_zero_cnt(self, tensor: list[Tensor], indices: list[int]) -> float:
        """AutoRound's count of a step's valid tokens, which divides its loss."""
        own: int = super()._get_non_zero_cnt(tensor, indices)
        if process_count() == 1:
            return own
        return mean_over_processes(torch.tensor(own, dtype=torch.float64)).item()

    def _scale_loss_and_backward(self, scaler: Any, loss: Tensor) -> Any:
        """AutoRound's; with several devices, no gradient is left out.

        There AutoRound averages the gradients that are there one by one. Experts
        without a token have none, and others are without tokens in other processes.
        """
        scaled = super()._scale_loss_and_backward(scaler, loss)
        if self._tuned_block is not None and len(device_manager.device_list) > 1:
            for module in self._tuned_block.modules():
                if hasattr(module, "orig_layer"):
                    for parameter in vars(module)["params"].values():
                        if parameter.requires_grad and parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
        return scaled


def share_activation_maxima(block: nn.Module) -> None:
    """Give every layer the largest activation that any process has seen.

    AutoRound makes the scales of static activations (NVFP4, INT8) of it.
    """
    layers = {
        name: module
        for name, module in block.named_modules()
        if isinstance(found := getattr(module, "act_max", None), Tensor)
        and found.numel() == 1
    }
    everywhere = gather({name: layer.act_max.cpu() for name, layer in layers.items()})
    for name, layer in layers.items():
        values = [own[name].flatten() for own in everywhere if name in own]
        layer.act_max = (
            torch.cat(values).max().reshape(layer.act_max.shape).to(layer.act_max)
        )


def check_processes(
    settings: Mapping[str, str],
    samples: int,
    folder: str | None,
    composer: "AlgorithmComposer | None",
) -> None:
    """Refuse several processes that cannot tune one model together.

    Args:
        settings: What decides the tuned weights, as text.
        samples: Calibration samples of this process.
        folder: Where this process exports to, or None.
        composer: AutoRound's, None for single blocks.

    Raises:
        NotImplementedError: An algorithm before this one finds its parameters on the
            samples of each process alone.
        ValueError: Their settings or numbers of samples differ, or they write into the
            same folder.
    """
    if process_count() == 1:
        return
    before = [type(p).__name__ for p in composer.preprocessors] if composer else []
    if before:
        raise NotImplementedError(
            f"world_size={process_count()} with {', '.join(before)}: every process "
            "would find its own scales; allowed are rotations, or one process"
        )
    # own samples have a mask of their own
    own = {n: v for n, v in settings.items() if n != "token_mask"}
    everywhere = gather(own)
    for name in own:
        values = [other.get(name) for other in everywhere]
        if len(set(values)) > 1:
            raise ValueError(
                f"{name}: the processes have {', '.join(map(str, values))}, by rank; "
                "allowed is the same in all of them"
            )
    counts = gather(samples)
    if len(set(counts)) > 1:
        raise ValueError(
            f"nsamples: the processes have {counts} calibration samples, by rank; "
            "allowed are as many in each, because they take every step together; drop "
            "the last ones"
        )
    folders = {"output_dir": folder, "AR_RESUME_DIR": envs.AR_RESUME_DIR or None}
    for name, mine in folders.items():
        paths = gather(None if mine is None else os.path.realpath(mine))
        if len(set(paths) - {None}) < len([path for path in paths if path]):
            raise ValueError(
                f"{name}={str(mine)!r}: several processes would write the same files; "
                "allowed is a folder for each, such as its name with the rank behind "
                "it; what they export is the same, so keep any of them"
            )
