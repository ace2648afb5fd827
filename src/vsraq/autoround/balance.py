# SPDX-License-Identifier: Apache-2.0
"""What the router losses of a block reach, and the weights that balance them.

SignRound steps by the sign of the gradient's sum. So what counts is how large one
loss's gradient is compared with the other's, not how large the losses are.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeAlias

import torch
from auto_round.wrapper import WrapperLinear
from torch import Tensor, nn

from vsraq.processes import process_count, sum_over_processes
from vsraq.router_terms import RouterTerm

logger = logging.getLogger("autoround.vsraq")

# Runs a micro-batch. Returns its reconstruction error (None if no weight is automatic)
# and its router losses (None where a term uses no sample of it), attached to the graph.
MicroBatch: TypeAlias = Callable[[], tuple[Tensor | None, Sequence[Tensor | None]]]


def balance_terms(
    block: nn.Module,
    terms: Sequence[RouterTerm],
    micro_batches: Sequence[MicroBatch],
    auto_ratio: float,
    name: str,
) -> int:
    """Fill in what each term reaches, and each weight that is "auto".

    An automatic weight is auto_ratio * |g_reconstruction| / |g_router|, each the sum
    of the gradient's magnitudes over the tuned parameters that the router loss
    reaches; 0 if it reaches none. The gradients are those of a step, so they are added
    up over its micro-batches. Several processes add up those sums; a parameter counts
    as reached if one of them reaches it. A parameter whose gradients are not finite
    takes no part, and a warning names its layer.

    Args:
        block: The block, its layers wrapped by AutoRound.
        terms: Its router terms; `reached`, `reaches_something` and an automatic
            `weight` are set.
        micro_batches: Of a step; each runs the block and returns its shares of the
            step's losses.
        auto_ratio: Strength of the automatic weights, > 0.
        name: The block's, for the warning.

    Returns:
        How many quantized layers the block has.
    """
    named = {n: m for n, m in block.named_modules() if hasattr(m, "orig_layer")}
    wrapped = list(named.values())
    # norms are wrapped too where enable_norm_bias_tuning tunes them
    is_linear = [isinstance(module, WrapperLinear) for module in wrapped]
    layers = [
        [p for p in vars(m)["params"].values() if p.requires_grad] for m in wrapped
    ]
    parameters = [parameter for layer in layers for parameter in layer]
    of_reconstruction, *per_term = (
        _of_all_processes(magnitudes)
        for magnitudes in _step_magnitudes(micro_batches, len(terms), parameters)
    )
    owners = [n for n, layer in zip(named, layers, strict=True) for _ in layer]
    finite = _all_finite([of_reconstruction, *per_term])
    _warn_of_infinite(name, owners, finite)
    for term, of_term in zip(terms, per_term, strict=True):
        position = 0
        for layer, linear in zip(layers, is_linear, strict=True):
            magnitudes = of_term[position : position + len(layer)]
            reached = any(magnitude is not None for magnitude in magnitudes)
            position += len(layer)
            term.reached += reached and linear
            term.reaches_something |= reached
        if term.weight == "auto":
            both = [
                (r or 0.0, m)
                for r, m, use in zip(of_reconstruction, of_term, finite, strict=True)
                if use and m is not None
            ]
            router = sum(m for _, m in both)
            reached_sum = sum(r for r, _ in both)
            term.weight = auto_ratio * reached_sum / router if router > 0 else 0.0
    return sum(is_linear)


def _all_finite(magnitudes: Sequence[Sequence[float | None]]) -> list[bool]:
    """Return for each parameter whether every loss' gradient of it is finite."""
    return [
        all(m is None or math.isfinite(m) for m in of_parameter)
        for of_parameter in zip(*magnitudes, strict=True)
    ]


def _warn_of_infinite(name: str, owners: Sequence[str], finite: Sequence[bool]) -> None:
    broken = dict.fromkeys(n for n, f in zip(owners, finite, strict=True) if not f)
    if broken:
        logger.warning(
            "vsraq: block %s: the gradients of %d of %d quantized layers are not "
            "finite (%s), so automatic weights are balanced without these; calibrate "
            "on more text (nsamples, seqlen), or give router_weight and "
            "next_router_weight as numbers",
            name,
            len(broken),
            len(set(owners)),
            ", ".join(list(broken)[:3]) + (", ..." if len(broken) > 3 else ""),
        )


def _step_magnitudes(
    micro_batches: Sequence[MicroBatch], terms: int, parameters: Sequence[Tensor]
) -> Iterator[list[float | None]]:
    """Yield a step's gradient magnitudes: of the reconstruction, then of each term.

    A step of one micro-batch is computed once. With more micro-batches, each is
    computed again for every loss, because their graphs together would not fit.
    """
    *before, last = micro_batches
    last_losses: Sequence[Tensor | None] | None = None
    for index in range(terms + 1):
        for micro_batch in before:
            reconstruction, losses = micro_batch()
            loss = (reconstruction, *losses)[index]
            if loss is not None and loss.requires_grad and parameters:
                loss.backward(inputs=list(parameters))
            del reconstruction, losses, loss
        if last_losses is None or before:
            reconstruction, losses = last()
            last_losses = (reconstruction, *losses)
        # the last backward pass frees the activations, as a tuning step does
        keep_graph = not before and index < terms
        yield _magnitudes(last_losses[index], parameters, keep_graph=keep_graph)


def _magnitudes(
    loss: Tensor | None, parameters: Sequence[Tensor], *, keep_graph: bool
) -> list[float | None]:
    """Sum the gradient's magnitudes per parameter; None where there is no path.

    Each gradient is summed and dropped as soon as it is complete. All of a block's
    experts together would be 4 bytes for every one of their weights. Gradients of
    earlier micro-batches are included.
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
    for parameter in parameters:  # those not reached by this micro-batch
        drop(parameter)
    # only now, because each conversion waits for its device
    return [s.item() if (s := sums.get(p)) is not None else None for p in parameters]


def _of_all_processes(magnitudes: list[float | None]) -> list[float | None]:
    """Sum over the processes; None only where no process has a path."""
    if process_count() == 1 or not magnitudes:
        return magnitudes
    pairs = [[m or 0.0, float(m is not None)] for m in magnitudes]
    sums = sum_over_processes(torch.tensor(pairs, dtype=torch.float64))
    return [total if paths else None for total, paths in sums.tolist()]
