# SPDX-License-Identifier: Apache-2.0
"""From the sums of a method to its figures and their intervals.

Shapes: N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vsraq.analysis.intervals import Interval, ratio_intervals
from vsraq.analysis.results import (
    LAYER_METRICS,
    METRICS,
    HistogramCounts,
    Method,
    MethodLayer,
)
from vsraq.analysis.tally import Tally

_INSIDE = ("inside_2k", "inside_3k")
_FP_NLL, _Q_NLL = "fp_nll", "q_nll"


@dataclass(frozen=True)
class _Ratio:
    """A metric as two sums of each sequence, (N,) each."""

    numerator: Tensor
    denominator: Tensor


def summarize(
    tally: Tally,
    *,
    source: str,
    mebibytes: float | None,
    seconds: float,
    tokens: int,
    seed: int,
) -> tuple[Method, Interval]:
    """Compute the figures of a method.

    Args:
        tally: Its sums.
        source: What was compared.
        mebibytes: Its size.
        seconds: Wall time of its pass.
        tokens: Tokens of the text.
        seed: Of the bootstrap.

    Returns:
        The figures, and the perplexity in full precision.
    """
    layers = tally.layer_sums()
    ratios = _model_ratios(tally)
    for name, sums in layers.items():
        ratios |= {f"{name}/{m}": r for m, r in _layer_ratios(tally, [sums]).items()}
    found = ratio_intervals(
        np.stack([r.numerator.numpy() for r in ratios.values()], axis=1),
        np.stack([r.denominator.numpy() for r in ratios.values()], axis=1),
        seed=seed,
    )
    intervals = dict(zip(ratios, found, strict=True))
    intervals["perplexity"] = intervals[_Q_NLL].exp()
    method = Method(
        source=source,
        mebibytes=mebibytes,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        metrics={name: intervals[name] for name in METRICS},
        layers=[
            MethodLayer(
                name=name,
                metrics={m: intervals[f"{name}/{m}"] for m in LAYER_METRICS},
                dropped_ranks=tally.dropped[name].tolist(),
                injected_ranks=tally.injected[name].tolist(),
                load=tally.load[name].tolist(),
            )
            for name in layers
        ],
        histograms={
            name: HistogramCounts(h.edges, h.counts, h.below, h.above)
            for name, h in tally.histograms.items()
        },
    )
    return method, intervals[_FP_NLL].exp()


def _model_ratios(tally: Tally) -> dict[str, _Ratio]:
    sums = tally.token_sums()
    per_prediction = (_Q_NLL, _FP_NLL, "excess_nll")
    ratios = {
        name: _Ratio(values, sums["predicted" if name in per_prediction else "tokens"])
        for name, values in sums.items()
        if name not in ("tokens", "predicted")
    }
    return ratios | _layer_ratios(tally, list(tally.layer_sums().values()))


def _layer_ratios(
    tally: Tally, layers: Sequence[dict[str, Tensor]]
) -> dict[str, _Ratio]:
    """Return the layer metrics over some layers together."""
    total = {
        name: torch.stack([layer[name] for layer in layers]).sum(0)
        for name in layers[0]
    }
    pairs = tally.token_sums()["tokens"] * len(layers)
    return {
        name: _Ratio(total[name], total["injected"] if name in _INSIDE else pairs)
        for name in LAYER_METRICS
    }
