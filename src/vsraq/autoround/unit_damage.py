# SPDX-License-Identifier: Apache-2.0
"""Round some layers of a model, and measure what that does to its routers and output.

All trials go through the model side by side, in one pass over its blocks: each block is
loaded once, runs in full precision on every trial's hidden states, and with rounded
layers for those trials that have some in it.

All of it is float32, whatever the model's dtype. In bfloat16 the smallest change of a
weight moves hidden states by a rounding step, which changes as many experts as a layer
in 4 bits does: all trials would have that in common.

Shapes: S streams, N tokens, H hidden width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from auto_round.algorithms.composer import AlgorithmComposer
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.compressors.utils import check_need_act_calibration
from auto_round.data_type.utils import update_block_global_scale_if_needed
from auto_round.utils import (
    convert_module_to_hp_if_necessary,
    set_amax_for_all_moe_layers,
    set_module,
)
from auto_round.utils.offload import OffloadManager
from torch import Tensor, nn
from tqdm import tqdm

from vsraq.autoround.block_copy import copy_block, split_experts
from vsraq.autoround.rounded_layer import copy_layer, rounded_layer
from vsraq.bits.damage import Damage
from vsraq.block_stream import BlockCall, BlockCalls, why_not_alone
from vsraq.blocks import decoder_blocks
from vsraq.capture import RouterCapture
from vsraq.metrics import StreamingMean, jaccard, output_kl
from vsraq.routers import BoundRouter, Router, find_routers, routers_inside
from vsraq.tokens.output_head import output_head

# a scheme, by the names of AutoRound's QuantizationScheme
SchemeFields = Mapping[str, Any]

CHUNK_TOKENS = 512  # whose logits over the vocabulary exist at once
_TRIED_TOKENS = 64  # that blocks which run alone are tried with


@dataclass(frozen=True)
class Trial:
    """Layers that are rounded, and their schemes; all others stay as they are."""

    schemes: Mapping[str, SchemeFields]

    def inside(self, block: str) -> dict[str, SchemeFields]:
        """Return the schemes of a block's layers, by names inside it."""
        prefix = f"{block}."
        return {
            name.removeprefix(prefix): fields
            for name, fields in self.schemes.items()
            if name.startswith(prefix)
        }


@dataclass(frozen=True)
class MeasuredModel:
    """A model whose experts are linear layers, as AutoRound prepares it.

    Attributes:
        module: The model; blocks may be on disk.
        blocks: Names of its decoder blocks, in order.
        routers: Its routers.
        offloader: AutoRound's, which knows where tensors that are not loaded are.
        device: Where blocks are computed.
    """

    module: nn.Module
    blocks: tuple[str, ...]
    routers: tuple[Router, ...]
    offloader: OffloadManager
    device: torch.device

    @classmethod
    def of(
        cls,
        module: nn.Module,
        offloader: OffloadManager,
        device: torch.device,
        router_pattern: str | None = None,
    ) -> Self:
        """Find the routers and the blocks of a model.

        Args:
            module: The model.
            offloader: See the attributes.
            device: See the attributes.
            router_pattern: What names the routers; None finds them.

        Raises:
            ValueError: It has no MoE router.
            NotImplementedError: Its routers are not in one list of blocks.
        """
        routers = find_routers(module, router_pattern=router_pattern)
        if not routers:
            raise ValueError(
                f"model={type(module).__name__}: it has no MoE router; allowed are "
                "mixture-of-experts models"
            )
        blocks = decoder_blocks(module, routers)
        if not blocks:
            raise NotImplementedError(
                f"model={type(module).__name__}: its routers are not in one list of "
                "blocks; allowed are models with one decoder"
            )
        return cls(module, blocks, routers, offloader, device)

    def load(self, name: str) -> nn.Module:
        """Load a copy of a block, in float32.

        Raises:
            RuntimeError: A tensor is neither in memory nor on disk.
        """
        split_experts(self.module.get_submodule(name))
        block = copy_block(
            self.module,
            name,
            self.offloader,
            "nothing can be measured; load the model into memory before AutoRound gets "
            "it",
        )
        convert_module_to_hp_if_necessary(block, torch.float32, self.device)  # FP8
        return block.to(self.device, torch.float32).eval()

    @torch.no_grad()
    def check(self, input_ids: Tensor) -> None:
        """Check that blocks which run alone give what the model itself gives.

        A model that is not in memory is not checked: it cannot run as a whole.

        Args:
            input_ids: Token ids, (B, S); a few of them are tried.

        Raises:
            NotImplementedError: They do not.
        """
        for name in self.blocks:
            split_experts(self.module.get_submodule(name))
        if any(p.is_meta or p.numel() == 0 for p in self.module.parameters()):
            return
        reason = why_not_alone(self.module, self.blocks, input_ids[:1, :_TRIED_TOKENS])
        if reason:
            raise NotImplementedError(
                f"model={type(self.module).__name__}: its blocks cannot be run one by "
                f"one, so nothing can be measured: {reason}; allowed are models whose "
                "blocks pass on hidden states only"
            )


@dataclass
class _Stream:
    """A trial on its way through the model.

    Attributes:
        trial: What it rounds.
        states: Its hidden states, one (B, S, H) per batch; None before the first block
            that it changes.
        changed: Sum over the routers so far of 1 - Jaccard.
    """

    trial: Trial
    states: list[Tensor] | None = None
    changed: float = 0.0


@torch.no_grad()
def measure_damage(
    model: MeasuredModel,
    trials: Sequence[Trial],
    batches: Sequence[Tensor],
    *,
    progress: str | None = None,
) -> list[Damage]:
    """Measure what each trial does to a model.

    Layers are rounded to nearest with AutoRound's own functions, activations included.

    Memory: S N H values on the CPU, one block, and its rounded layers, all float32.
    Time: one pass of a block for each stream that has begun.

    Args:
        model: The model.
        trials: What is rounded.
        batches: Token ids, each (B, S), without padding.
        progress: Title of a progress bar; None shows none.

    Returns:
        The damage of each trial.

    Raises:
        RuntimeError: A tensor is neither in memory nor on disk.
        NotImplementedError: The model takes no `inputs_embeds`.
    """
    streams = [_Stream(trial) for trial in trials]
    calls = BlockCalls(model.module, model.blocks)
    fp_states: list[Tensor] | None = None
    returns_tuple = False
    names = tqdm(model.blocks, progress or "", disable=progress is None, unit="block")
    with torch.compiler.set_stance("force_eager"):
        for position, name in enumerate(names):
            block = model.load(name)
            given = [calls.of(position, ids).float_on(model.device) for ids in batches]
            before = fp_states or [call.states.cpu() for call in given]
            run = _BlockRun(block, given, routers_inside(model.routers, name))
            with _activation_ranges(block, name, trials):
                fp_states, fp_chosen, returns_tuple = run(before)
            for stream in streams:
                layers = stream.trial.inside(name)
                if stream.states is None and not layers:
                    continue
                with _rounded(block, layers, model.device):
                    stream.states, chosen, _ = run(stream.states or before)
                for router, experts in chosen.items():
                    overlap = jaccard(experts, fp_chosen[router])
                    stream.changed += 1 - overlap.mean().item()
            calls.passed(position, returns_tuple)
            block.to("meta")  # a reference cycle may keep the module itself
        kls = _output_damage(model, streams, fp_states or [], returns_tuple)
    count = max(len(model.routers), 1)
    return [
        Damage(kl, stream.changed / count)
        for kl, stream in zip(kls, streams, strict=True)
    ]


@dataclass(frozen=True)
class _BlockRun:
    """One block, what the model passes to it, and its routers."""

    block: nn.Module
    calls: Sequence[BlockCall]
    routers: Sequence[Router]

    def __call__(
        self, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor], bool]:
        """Return states after the block, experts by router (N, K), and if in tuples."""

        def choose(router: BoundRouter, logits: Tensor) -> Tensor:
            return router.select(logits).to("cpu", torch.int16)

        after, is_tuple, chosen = [], False, {}
        with ExitStack() as stack:
            capture = None
            if self.routers:
                capture = RouterCapture(self.block, self.routers, choose)
                stack.enter_context(capture)
            for call, given in zip(self.calls, states, strict=True):
                output, is_tuple = call.run(self.block, given)
                after.append(output.cpu())
            if capture is not None:
                chosen = {n: torch.cat(c) for n, c in capture.take().items()}
        return after, chosen, is_tuple


@contextmanager
def _rounded(
    block: nn.Module, schemes: Mapping[str, SchemeFields], device: torch.device
) -> Iterator[None]:
    """Put rounded copies in the place of layers; they are put back afterwards."""
    originals = {name: block.get_submodule(name) for name in schemes}
    try:
        for name, fields in schemes.items():
            set_module(block, name, _round(originals[name], fields, device))
        yield
    finally:
        for name, layer in originals.items():
            set_module(block, name, layer)


def _round(layer: nn.Module, fields: SchemeFields, device: torch.device) -> nn.Module:
    copied = copy_layer(layer)
    for name, value in fields.items():
        setattr(copied, name, value)
    # AutoRound sets it in blocks only; its default
    vars(copied).setdefault("scale_dtype", torch.float16)
    return rounded_layer(copied, device)


@contextmanager
def _activation_ranges(
    block: nn.Module, name: str, trials: Sequence[Trial]
) -> Iterator[None]:
    """Collect what activation scales need while the block runs in full precision."""
    quantized: dict[str, SchemeFields] = {}
    for trial in trials:
        for layer, fields in trial.inside(name).items():
            bits = fields.get("act_bits") or 16
            # of a layer's schemes, the one whose scales are fixed beforehand
            fixed = check_need_act_calibration(
                fields.get("act_dynamic"), fields.get("act_data_type"), bits
            )
            if fixed or (bits < 16 and layer not in quantized):
                quantized[layer] = fields
    if not quantized:
        yield
        return
    for layer, fields in quantized.items():
        for key, value in fields.items():
            setattr(block.get_submodule(layer), key, value)
    composer = AlgorithmComposer([RTNConfig()])
    handles = composer._register_act_max_hooks(block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if handles:
        set_amax_for_all_moe_layers(block, attr_name="act_max")
    fields = next(iter(quantized.values()))
    update_block_global_scale_if_needed(
        block, fields["data_type"], fields["group_size"]
    )


def _output_damage(
    model: MeasuredModel,
    streams: Sequence[_Stream],
    fp_states: Sequence[Tensor],
    returns_tuple: bool,
) -> list[float]:
    """Compute the KL of each stream's output."""
    means = [StreamingMean() for _ in streams]
    outside = [
        {n: f for n, f in s.trial.schemes.items() if not _is_inside(n, model.blocks)}
        for s in streams
    ]
    with output_head(
        model.module,
        model.blocks,
        device=model.device,
        dtype=torch.float32,
        returns_tuple=returns_tuple,
    ) as head:
        for index, fp in enumerate(fp_states):
            rows = fp.flatten(0, 1).split(CHUNK_TOKENS)
            for part, fp_rows in enumerate(rows):
                fp_logits = head(fp_rows)
                for stream, layers, mean in zip(streams, outside, means, strict=True):
                    states = fp if stream.states is None else stream.states[index]
                    q_rows = states.flatten(0, 1).split(CHUNK_TOKENS)[part]
                    with _rounded(model.module, layers, model.device):
                        mean.update(output_kl(head(q_rows), fp_logits))
    return [mean.compute() for mean in means]


def _is_inside(layer: str, blocks: Sequence[str]) -> bool:
    return any(layer.startswith(f"{block}.") for block in blocks)
