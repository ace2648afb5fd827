# SPDX-License-Identifier: Apache-2.0
"""Select the tokens of a run: those whose output changes when the model is rounded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from auto_round.algorithms.composer import AlgorithmComposer
from torch import Tensor

from vsraq.autoround.rounded_pass import RoundedPass, Streams
from vsraq.tokens import Sampling, TokenMask, check_thresholds
from vsraq.tokens.output_head import output_head
from vsraq.tokens.shift import output_shift


class SelectionDoneError(Exception):
    """Signal that ends a run which only selects tokens.

    Attributes:
        selection: What it selected.
    """

    def __init__(self, selection: "TokenSelection") -> None:
        super().__init__(str(selection))
        self.selection = selection


@dataclass(frozen=True)
class TokenSelection:
    """Selected tokens, and the time that it took.

    Attributes:
        mask: The mask.
        seconds: Wall-clock time.
    """

    mask: TokenMask
    seconds: float

    def __str__(self) -> str:
        mask = self.mask
        return (
            f"selected {mask.selected} of {mask.total} tokens ({mask.share:.1%}) with "
            f"tau={mask.tau:g}, shift_threshold={mask.shift_threshold}, "
            f"{mask.sampling}, in {self.seconds:.1f} s"
        )


@torch.no_grad()
def select_tokens_of_run(
    orchestrator: Any,
    composer: AlgorithmComposer,
    token_ids: Sequence[Tensor],
    *,
    tau: float = 1e-4,
    shift_threshold: float | None = None,
    sampling: Sampling | None = None,
    chunk_tokens: int = 1024,
) -> TokenSelection:
    """Compute the token mask of a run that AutoRound has prepared.

    Call it from a quantizer's `prepare_run`: block inputs are cached then, and no block
    is tuned. It changes neither these inputs, nor the model, nor a random state.

    The rounded model is the one that AutoRound's `rtn` without search makes: weights
    rounded to nearest in each layer's own scheme, and activations where that quantizes
    them, with scales from the full-precision pass; layers in full precision stay so.
    Transforms that the run would still apply block by block (AWQ, a layer-wise
    rotation) are not in it.

    Time: two passes of all blocks and two of the output head. Memory beyond one block
    (for a model in memory: beyond it and its rounded weights): the hidden states of
    both paths on the cache device, 2 T H values and T H more while a block runs, and
    `output_shift`'s one chunk.

    Args:
        orchestrator: AutoRound's, with its block inputs collected.
        composer: AutoRound's, which `prepare_run` is called with.
        token_ids: Those of the samples, from `TokenRecorder`; (1, S) each.
        tau: Select tokens whose Sampled-JSD is above it, nats (SRA Eq. 7).
        shift_threshold: And whose routing shift, mean over the MoE layers, is above it,
            a fraction (SRA Table 4); None does not look at the routing.
        sampling: How outputs are sampled; None takes that of the model's
            `generation_config`, from its folder where AutoRound has been given one.
        chunk_tokens: How many tokens' logits exist at once, on each path.

    Returns:
        The mask and the time.

    Raises:
        ValueError: A threshold is not allowed, the token ids do not fit, or the routing
            is asked for in a model without routers.
        NotImplementedError: The model has several stacks of blocks, or its forward
            takes no `inputs_embeds`.
        RuntimeError: A tensor is neither in memory nor on disk, or outputs are not
            finite.
    """
    started = time.perf_counter()
    check_thresholds(tau, shift_threshold)
    rounded = RoundedPass.of(orchestrator, composer)
    with torch.compiler.set_stance("force_eager"):
        streams = rounded.run(len(token_ids), with_routing=shift_threshold is not None)
        sampling = sampling or rounded.sampling()
        changes = _output_changes(rounded, streams, sampling, chunk_tokens)
    masks = [change > tau for change in changes]
    if streams.shift is not None and shift_threshold is not None:
        moved = streams.shift.compute() > shift_threshold
        lengths = [len(mask) for mask in masks]
        masks = [m & s for m, s in zip(masks, moved.split(lengths), strict=True)]
    mask = TokenMask.of(
        masks,
        token_ids,
        model=rounded.model_name,
        scheme=str(orchestrator.scheme),
        tau=tau,
        shift_threshold=shift_threshold,
        sampling=sampling,
    )
    return TokenSelection(mask, time.perf_counter() - started)


def _output_changes(
    rounded: RoundedPass, streams: Streams, sampling: Sampling, chunk_tokens: int
) -> list[Tensor]:
    """Compute the Sampled-JSD of each token, (S,) for each sample, nats."""
    runner = rounded.runner
    with (
        output_head(
            rounded.model,
            rounded.blocks,
            device=runner.device,
            autocast=runner.amp_dtype if runner.amp else None,
            returns_tuple=streams.returns_tuple,
        ) as head,
        rounded.rounded_head(head) as q_head,
    ):
        return output_shift(
            _hidden_states(streams.q_states),
            _hidden_states(streams.fp_states),
            head,
            q_head=q_head,
            sampling=sampling,
            chunk_tokens=chunk_tokens,
        )


def _hidden_states(states: Any) -> list[Tensor]:
    return states["hidden_states"] if isinstance(states, dict) else states
