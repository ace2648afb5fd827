# SPDX-License-Identifier: Apache-2.0
"""Make all processes that tune a model together end with the same weights.

Under torch.distributed AutoRound 0.16 averages the gradients of the processes, each of
which has samples of its own. Everything else each process decides for itself: which
iteration was the best, which tokens are masked, what the largest activation is; and
each of them exports. So plain AutoRound ends with different weights in every process.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.utils.device_manager import device_manager
from auto_round.wrapper import WrapperLinear
from torch import Tensor, nn

from vsraq.autoround.activation_ranges import needs_activation_ranges
from vsraq.autoround.process_checks import check_equal_weights
from vsraq.processes import (
    gather,
    is_first_process,
    mean_over_processes,
    process_count,
    sum_over_processes,
)

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

logger = logging.getLogger("autoround.vsraq")


class _FirstProcessOnly(logging.Filter):
    """A filter of messages from all but the first process, except warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or is_first_process()


_FIRST_PROCESS_ONLY = _FirstProcessOnly()


class SeveralProcesses(SignRoundQuantizer):
    """SignRound with the same decisions in all processes.

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

    def register_fp_input_forward_hooks(self, block: nn.Module) -> list[Any]:
        """Register AutoRound's hooks, and share activation ranges after the forward."""
        handles: list[Any] = super().register_fp_input_forward_hooks(block)
        return handles + self._shared_ranges(block)

    def register_qinput_forward_hooks(self, block: nn.Module) -> list[Any]:
        """Register AutoRound's hooks, and share activation ranges after the forward."""
        handles: list[Any] = super().register_qinput_forward_hooks(block)
        return handles + self._shared_ranges(block)

    def _shared_ranges(self, block: nn.Module) -> list[Any]:
        """Return handles that share the ranges when AutoRound removes them.

        Just before the tuning would be too late: after the forward pass AutoRound gives
        experts that got no token in this process the largest range of all experts.
        """
        if process_count() == 1 or not needs_activation_ranges(self.scheme):
            return []
        return [_AfterForward(lambda: share_activation_maxima(block))]

    def quantize_block(
        self,
        block: nn.Module,
        fp_inputs: Any,
        input_others: dict[str, Any],
        fp_outputs: Any,
        q_inputs: Any,
        block_ctx: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Tune one block with the activation ranges of all processes.

        Raises:
            RuntimeError: The processes end with different weights.
        """

        def tune() -> Any:
            return super(SeveralProcesses, self).quantize_block(
                block,
                fp_inputs,
                input_others,
                fp_outputs,
                q_inputs,
                block_ctx,
                *args,
                **kwargs,
            )

        if process_count() == 1:
            return tune()
        share_activation_maxima(block)
        share_importance(block)
        self._tuned_block = block
        try:
            best_params = tune()
        finally:
            self._tuned_block = None
        check_equal_weights("+".join(block_ctx.block_names), block)
        return best_params

    def _compute_valid_token_mask(self, input_ids: list[Tensor]) -> list[Tensor] | None:
        """Return AutoRound's mask; all ones if only other processes have padding.

        Masked and unmasked losses differ in scale.
        """
        masks: list[Tensor] | None = super()._compute_valid_token_mask(input_ids)
        if any(gather(masks is not None)) and masks is None:
            masks = [torch.ones_like(ids, dtype=torch.long) for ids in input_ids]
        return masks

    def _get_non_zero_cnt(self, tensor: list[Tensor], indices: list[int]) -> float:
        """Average a step's count of valid tokens, which divides AutoRound's loss."""
        count: int = super()._get_non_zero_cnt(tensor, indices)
        if process_count() == 1:
            return count
        return mean_over_processes(torch.tensor(count, dtype=torch.float64)).item()

    def _step(self, scaler: Any, optimizer: Any, lr_schedule: Any) -> None:
        """Take AutoRound's step, then clamp the ranges of all layers to their bounds.

        AutoRound clamps in a layer's forward pass, so it would skip experts that get
        no token in this process but do in others.
        """
        super()._step(scaler, optimizer, lr_schedule)
        if self._tuned_block is None:
            return
        for module in self._tuned_block.modules():
            if isinstance(module, WrapperLinear):
                parameters: dict[str, Tensor] = vars(module)["params"]
                weight, activation = module.minmax_scale_bound, (0.0, 1.0)
                for name in parameters.keys() & {"min_scale", "max_scale"}:
                    parameters[name].data.clamp_(*weight)
                for name in parameters.keys() & {"act_min_scale", "act_max_scale"}:
                    parameters[name].data.clamp_(*activation)

    def _scale_loss_and_backward(self, scaler: Any, loss: Tensor) -> Any:
        """Run AutoRound's backward pass; with several devices, add missing gradients.

        There AutoRound averages the existing gradients one by one. Experts without a
        token have none, and these are not the same experts in every process.
        """
        scaled = super()._scale_loss_and_backward(scaler, loss)
        if self._tuned_block is not None and len(device_manager.device_list) > 1:
            for module in self._tuned_block.modules():
                if hasattr(module, "orig_layer"):
                    for parameter in vars(module)["params"].values():
                        if parameter.requires_grad and parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
        return scaled


class _AfterForward:
    """A handle like a hook's; AutoRound removes it after the forward pass."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.remove = action


def share_activation_maxima(block: nn.Module) -> None:
    """Give every layer the largest activation that any process has seen.

    AutoRound makes the scales of static activations (NVFP4, INT8) from it.

    Args:
        block: The block, its layers not wrapped yet. A layer that got no token in this
            process gets the value of the others.

    Raises:
        NotImplementedError: A layer has a scale per token.
    """
    layers = dict(block.named_modules())
    maxima = {
        name: found.cpu()
        for name, module in layers.items()
        if isinstance(found := getattr(module, "act_max", None), Tensor)
        and found.numel() > 0
    }
    everywhere = gather(maxima)
    for name in sorted(set().union(*everywhere)):
        values = [other[name] for other in everywhere if name in other]
        if any(value.numel() != 1 for value in values):
            raise NotImplementedError(
                f"world_size={process_count()}: {name} has a static activation scale "
                "for every token; allowed with several processes is one for all"
            )
        largest = torch.cat([value.flatten() for value in values]).max()
        module = layers[name]
        device = next(module.parameters()).device
        module.act_max = largest.reshape(values[0].shape).to(device)


def share_importance(block: nn.Module) -> None:
    """Give every layer the sums of squared activations of all processes.

    AutoRound's algorithm extension searches scales with them.

    Args:
        block: The block, its layers not wrapped yet; to be called once.
    """
    layers = dict(block.named_modules())
    everywhere = gather(
        {
            name: len(found)
            for name, module in layers.items()
            if isinstance(found := getattr(module, "imatrix", None), Tensor)
        }
    )
    widths: dict[str, int] = {}
    for other in everywhere:
        widths |= other
    for name, width in sorted(widths.items()):
        module = layers[name]
        device = next(module.parameters()).device
        sums = getattr(module, "imatrix", torch.zeros(width, device=device))
        module.imatrix = sum_over_processes(sums)
