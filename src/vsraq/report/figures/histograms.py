# SPDX-License-Identifier: Apache-2.0
"""Distributions over tokens (SRA, Fig. 8), and what a replay changes (SRA, Fig. 4)."""

import itertools
from collections.abc import Sequence
from typing import Any

from vsraq.report.figures.lines import MethodLines, draw_markers, line_style
from vsraq.report.figures.small_panels import near_zero_axis
from vsraq.report.folder import Folder
from vsraq.report.picture import (
    INK,
    MUTED,
    PALETTE,
    Picture,
    Table,
    new_figure,
    plain_axes,
)
from vsraq.report.schema import Histogram, Replay, Results
from vsraq.report.wording import number, percent

_BLUE, _VERMILION = PALETTE[:2]
_METRICS = {
    "routing_shift": "routing shift (mean of layers)",
    "sampled_jsd": "Sampled-JSD, nats",
}


def draw_distributions(folder: Folder) -> list[Picture]:
    """Draw how routing shift and Sampled-JSD are distributed.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    lines = MethodLines(3.3, list(results.methods), rows=2)
    tips: dict[str, list[str]] = {}
    for metric, axes in zip(_METRICS, lines.every, strict=True):
        for index, (name, method) in enumerate(results.methods.items()):
            found = method.histograms[metric]
            gid = f"{metric}-{index}"
            _draw_steps(axes, found, index, gid)
            tips[gid] = [f"{name}, {text}" for text in _bin_texts(found, metric)]
        limit = getattr(results.thresholds, metric)
        axes.axvline(limit, color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)))
        axes.set_xlabel(_METRICS[metric])
        axes.set_ylabel("tokens, %")
        axes.set_ylim(bottom=0)
    return [
        Picture(
            name="distributions",
            title="How many tokens change, and by how much",
            caption="Share of all tokens per bin; the dashed lines are the limits of "
            "the regions A to D. A quantile of the table is the bin in which it lies.",
            description=_describe(results),
            figure=lines.figure,
            tips=tips,
            table=_table(results),
        )
    ]


def draw_replay(folder: Folder) -> list[Picture]:
    """Draw how full precision's routing changes the output of the quantized model.

    Args:
        folder: One with a replay.
    """
    replay = folder.replay
    if replay is None or not replay.change.total:
        return []
    figure = new_figure(2.0)
    axes = figure.subplots()
    tips = _draw_change(axes, replay)
    axes.axvline(0, color=INK, linewidth=0.7)
    axes.set_xlabel("change of Sampled-JSD by full precision's routing, nats")
    axes.set_ylabel("chosen tokens, %")
    plain_axes(axes)
    before, after = (
        found["sampled_jsd"].value for found in (replay.before, replay.after)
    )
    named = {"all": "all tokens", "mask": "those of a mask"}
    where = named.get(replay.region, f"region {replay.region}")
    beyond = replay.change.below + replay.change.above
    rows = _change_rows(replay.change)
    return [
        Picture(
            name="replay",
            title="What the right experts would mend",
            caption=f"{replay.method} with the experts and routing weights of full "
            f"precision on {replay.chosen:,} tokens ({where}). Left of 0 the output "
            "comes closer to full precision."
            + (
                f" {percent(beyond / replay.change.total, 1)} of them lie beyond the "
                "axis."
                if beyond
                else ""
            ),
            description=f"The output of {percent(replay.improved.value)} of these "
            f"tokens comes closer; their mean Sampled-JSD goes from {number(before)} "
            f"to {number(after)} nats.",
            figure=figure,
            tips=tips,
            table=Table(["Change, nats", "Tokens", "Share"], rows),
        )
    ]


def _is_logarithmic(edges: Sequence[float]) -> bool:
    """Whether the edges' ratios are alike, not their differences."""
    positive = [edge for edge in edges if edge > 0]
    if len(positive) < 3:
        return False
    first, last = positive[1] - positive[0], positive[-1] - positive[-2]
    return last > 1.5 * first


def _draw_steps(axes: Any, found: Histogram, index: int, gid: str) -> None:
    edges = list(found.edges)
    total = found.total or 1
    shares = [100 * count / total for count in found.counts]
    axes.stairs(shares, edges, baseline=None, lw=1, **line_style(index))
    if _is_logarithmic(edges):
        near_zero_axis(axes.xaxis, edges[0] if edges[0] > 0 else edges[1])
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    left, right = axes.get_xlim() if index else (edges[0], edges[0])
    axes.set_xlim(min(left, edges[0]), max(right, _end(found)))
    draw_markers(axes, middles, shares, index, gid, 1.8)


def _end(found: Histogram) -> float:
    """The edge behind which less than 0.1 % of the tokens are."""
    left = found.above
    for edge, count in zip(found.edges[:0:-1], found.counts[::-1], strict=True):
        left += count
        if left > 1e-3 * found.total:
            return edge
    return found.edges[-1]


def _bin_texts(found: Histogram, metric: str) -> list[str]:
    total = found.total or 1
    bins = zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    return [
        f"{_METRICS[metric].split(',')[0]} {number(low)} to {number(high)}: "
        f"{percent(count / total, 1)} of tokens"
        for low, high, count in bins
    ]


def _describe(results: Results) -> str:
    parts = []
    for name, method in results.methods.items():
        found = method.histograms["sampled_jsd"]
        total = found.total or 1
        small = found.below + sum(
            count
            for edge, count in zip(found.edges[1:], found.counts, strict=True)
            if edge <= 0.1 * (1 + 1e-9)
        )
        beyond = (
            f" ({percent(found.below / total)} lie left of the axis)"
            if found.below
            else ""
        )
        parts.append(
            f"{name}: {percent(small / total, 1)} of the tokens have a Sampled-JSD "
            f"below 0.1 nats{beyond}."
        )
    return "\n".join(parts)


def _table(results: Results) -> Table:
    rows = []
    for metric, words in _METRICS.items():
        for name, method in results.methods.items():
            found = method.histograms[metric]
            total = found.total or 1
            points = (0.1, 0.5, 0.9, 0.99)
            quantiles = [_quantile(found, point) for point in points]
            below = percent(found.below / total, 1)
            rows.append([words, name, *quantiles, below])
    columns = ["Value", "Method", "10 %", "Median", "90 %", "99 %", "Left of the axis"]
    return Table(columns, rows)


def _quantile(found: Histogram, share: float) -> str:
    """Name the bin in which a share of the tokens is reached."""
    reached, wanted = found.below, share * found.total
    if reached >= wanted:
        return f"below {number(found.edges[0])}"
    bins = zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    for low, high, count in bins:
        reached += count
        if reached >= wanted:
            return f"{number(low)} to {number(high)}"
    return f"above {number(found.edges[-1])}"


def _draw_change(axes: Any, replay: Replay) -> dict[str, list[str]]:
    found = replay.change
    tips = {}
    bins = zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    for index, (low, high, count) in enumerate(bins):
        gid = f"change-{index}"
        side = MUTED if low < 0 < high else _BLUE if high <= 0 else _VERMILION
        axes.bar(
            low,
            100 * count / found.total,
            width=high - low,
            align="edge",
            color=side,
            edgecolor="#ffffff",
            linewidth=0.3,
            gid=gid,
        )
        tips[gid] = [
            f"change {number(low)} to {number(high)} nats: "
            f"{percent(count / found.total, 1)} of the chosen tokens"
        ]
    _name_sides(axes)
    return tips


def _name_sides(axes: Any) -> None:
    for place, side, text, colour in (
        (0.01, "left", "closer to full precision", _BLUE),
        (0.99, "right", "further away", _VERMILION),
    ):
        axes.text(
            place,
            1.01,
            text,
            transform=axes.transAxes,
            ha=side,
            va="bottom",
            fontsize=6.5,
            color=colour,
        )


def _change_rows(found: Histogram) -> list[list[str]]:
    bins = zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    rows = [(f"{number(low)} to {number(high)}", count) for low, high, count in bins]
    rows.insert(0, (f"below {number(found.edges[0])}", found.below))
    rows.append((f"above {number(found.edges[-1])}", found.above))
    return [[w, f"{n:,}", percent(n / found.total, 1)] for w, n in rows if n]
