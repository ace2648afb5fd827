# SPDX-License-Identifier: Apache-2.0
"""What the router losses of a block reach, and the weights that balance them.

SignRound steps by the sign of the gradient's sum, so what counts is how large one
loss's gradient is beside the other's, not how large the losses are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeAlias

import torch
from auto_round.wrapper import WrapperLinear
from torch import Tensor, nn

from vsraq.processes import process_count, sum_over_processes
from vsraq.router_terms import RouterTerm

# Runs a micro-batch. Returns, attached to the graph, its reconstruction error, None if
# no weight is automatic, and its losses, None where a term looks at no sample of it.
MicroBatch: TypeAlias = Callable[[], tuple[Tensor | None, Sequence[Tensor | None]]]


def balance_terms(
    block: nn.Module,
    terms: Sequence[RouterTerm],
    micro_batches: Sequence[MicroBatch],
    auto_ratio: float,
) -> int:
    """Fill in what each term reaches, and each weight that is "auto".

    An automatic weight is auto_ratio * |g_reconstruction| / |g_router|, each the sum
    of the gradient's magnitudes over the tuned parameters that the router loss
    reaches; 0 if it reaches none. The gradients are those of a step, so they are added
    up over its micro-batches. Several processes add up those sums, and what one of
    them reaches is reached.

    Args:
        block: The block, its layers wrapped by AutoRound.
        terms: Its router terms; `reached`, `reaches_something` and an automatic
            `weight` are set.
        micro_batches: Of a step; each runs the block and returns its shares of the
            step's losses.
        auto_ratio: Strength of the automatic weights, > 0.

    Returns:
        How many quantized layers the block has.
    """
    wrapped = [m for m in block.modules() if hasattr(m, "orig_layer")]
    # norms are wrapped too where enable_norm_bias_tuning tunes them
    is_linear = [isinstance(module, WrapperLinear) for module in wrapped]
    layers = [
        [p for p in vars(m)["params"].values() if p.requires_grad] for m in wrapped
    ]
    parameters = [parameter for layer in layers for parameter in layer]
    other, *owns = (
        _of_all_processes(magnitudes)
        for magnitudes in _step_magnitudes(micro_batches, len(terms), parameters)
    )
    for term, own in zip(terms, owns, strict=True):
        position = 0
        for layer, linear in zip(layers, is_linear, strict=True):
            magnitudes = own[position : position + len(layer)]
            reached = any(magnitude is not None for magnitude in magnitudes)
            position += len(layer)
            term.reached += reached and linear
            term.reaches_something |= reached
        if term.weight == "auto":
            router = sum(m for m in own if m is not None)
            there = [o or 0.0 for o, m in zip(other, own, strict=True) if m is not None]
            term.weight = auto_ratio * sum(there) / router if router > 0 else 0.0
    return sum(is_linear)


def _step_magnitudes(
    micro_batches: Sequence[MicroBatch], terms: int, parameters: Sequence[Tensor]
) -> Iterator[list[float | None]]:
    """Gradient magnitudes of a step: of the reconstruction error, then of each term.

    A step of one micro-batch is computed once; with more, every loss computes each of
    them anew, because their graphs together would not fit.
    """
    *before, last = micro_batches
    kept: Sequence[Tensor | None] | None = None
    for index in range(terms + 1):
        for micro_batch in before:
            reconstruction, losses = micro_batch()
            loss = (reconstruction, *losses)[index]
            if loss is not None and loss.requires_grad and parameters:
                loss.backward(inputs=list(parameters))
            del reconstruction, losses, loss
        if kept is None or before:
            reconstruction, losses = last()
            kept = (reconstruction, *losses)
        # the last frees the activations on its way, as a step of the tuning does
        keep_graph = not before and index < terms
        yield _magnitudes(kept[index], parameters, keep_graph=keep_graph)


def _magnitudes(
    loss: Tensor | None, parameters: Sequence[Tensor], *, keep_graph: bool
) -> list[float | None]:
    """Sum of the gradient's magnitudes per parameter; None where there is no path.

    Each gradient is summed and dropped as soon as it is complete. All of a block's
    experts together would be 4 bytes for every one of their weights. Gradients that
    are there already, of other micro-batches, take part.
    """
    sums: dict[Tensor, Tensor] = {}  # tensors are keys by identity

    def drop(parameter: Tensor) -> None:
        if parameter.grad is not None:
            sums[parameter] = parameter.grad.abs().sum()
            parameter.grad = None

    if loss is not None and loss.requires_grad and parameters:
        with ExitStack() as hooks:
            for parameter in parameters:
                handle = parameter.register_post_accumulate_grad_hook(drop)
                hooks.callback(handle.remove)
            loss.backward(retain_graph=keep_graph, inputs=list(parameters))
    for parameter in parameters:  # that this micro-batch does not reach
        drop(parameter)
    # only now, because every one of them waits for its device
    return [s.item() if (s := sums.get(p)) is not None else None for p in parameters]


def _of_all_processes(magnitudes: list[float | None]) -> list[float | None]:
    """Sums over the processes; None only where no process has a path."""
    if process_count() == 1 or not magnitudes:
        return magnitudes
    pairs = [[m or 0.0, float(m is not None)] for m in magnitudes]
    sums = sum_over_processes(torch.tensor(pairs, dtype=torch.float64))
    return [total if paths else None for total, paths in sums.tolist()]
