# SPDX-License-Identifier: Apache-2.0
"""95 % intervals of ratios: a bootstrap over sequences.

Tokens of one sequence depend on each other, so whole sequences are drawn. One draw
serves all metrics, and a metric is a ratio of two sums over the drawn sequences.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

LEVEL = 0.95
RESAMPLES = 2000
# float64 values of the weights that exist at once
_BATCH_VALUES = 2**18
_NOTHING = 1e100  # a ratio without a denominator; scipy warns of NaN

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval.

    Attributes:
        value: The figure; None for a share of nothing.
        low: Lower end; None for one sequence, which says nothing of others.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def exp(self) -> "Interval":
        """Return the interval of the exponential: it keeps percentiles."""
        ends = (self.value, self.low, self.high)
        return Interval(*(None if end is None else math.exp(end) for end in ends))


def ratio_intervals(
    numerators: Array, denominators: Array, *, seed: int
) -> list[Interval]:
    """Compute sum(numerator) / sum(denominator) over sequences, with percentiles.

    Args:
        numerators: (N sequences, M metrics).
        denominators: (N, M), >= 0.
        seed: Of the draws.

    Returns:
        M intervals; resamples without a denominator are left out.
    """
    count = len(numerators)
    value = _ratio(numerators.sum(0), denominators.sum(0))
    low = high = np.full_like(value, np.nan)
    if count > 1:
        low, high = _percentiles(numerators, denominators, seed)
    return [
        Interval(*(None if math.isnan(end) else float(end) for end in ends))
        for ends in zip(value, low, high, strict=True)
    ]


def _percentiles(
    numerators: Array, denominators: Array, seed: int
) -> tuple[Array, Array]:
    count = len(numerators)

    def ratios(sequences: NDArray[np.int64], axis: int = -1) -> Array:
        """(..., N) drawn sequences -> (M, ...)."""
        draws = np.atleast_2d(sequences)
        offset = np.arange(len(draws))[:, None] * count
        weights = np.bincount((draws + offset).ravel(), minlength=draws.size)
        times = weights.reshape(draws.shape).astype(np.float64)
        found = _ratio(times @ numerators, times @ denominators).T
        found[np.isnan(found)] = _NOTHING
        return found if sequences.ndim > 1 else found[:, 0]

    result = bootstrap(
        (np.arange(count),),
        ratios,
        n_resamples=RESAMPLES,
        batch=max(_BATCH_VALUES // count, 1),
        vectorized=True,
        method="percentile",
        confidence_level=LEVEL,
        rng=np.random.default_rng(seed),
    )
    drawn: Array = result.bootstrap_distribution
    # scipy's own percentiles know no resample without a denominator
    empty = (drawn == _NOTHING).all(-1)
    drawn[drawn == _NOTHING] = np.nan
    drawn[empty] = 0
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(drawn, [tail, 100 - tail], axis=-1)
    low[empty] = high[empty] = np.nan
    return low, high


def _ratio(numerator: Array, denominator: Array) -> Array:
    nothing = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    ratio: Array = np.divide(numerator, denominator, out=nothing, where=denominator > 0)
    return ratio
