# SPDX-License-Identifier: Apache-2.0
"""Full-precision ranks of dropped and of injected experts (SRA, Fig. 2 and 6)."""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple

from vsraq.report.figures.lines import MethodLines, draw_markers
from vsraq.report.folder import Folder
from vsraq.report.picture import INK, MUTED, Picture, Table, look
from vsraq.report.schema import MethodResult, Results
from vsraq.report.wording import percent


def draw_dropped(folder: Folder) -> list[Picture]:
    """Draw which ranks the dropped experts had, in full precision.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    shares = {n: _dropped(m) for n, m in results.methods.items()}
    lines = MethodLines(2.1, list(shares))
    lines.label("rank in full precision", "dropped experts, %")
    tips = {}
    width = 0.8 / len(shares)
    for index, (name, values) in enumerate(shares.items()):
        gid, ranks = f"dropped-{index}", range(1, len(values) + 1)
        # side by side: shares of several methods are often the same
        places = [rank + (index + 0.5) * width - 0.4 for rank in ranks]
        heights = [100 * share for share in values]
        colour = look(index)["color"]
        lines.axes.bar(places, heights, 0.9 * width, color=colour, alpha=0.45)
        draw_markers(lines.axes, places, heights, index, gid, 2.2)
        tips[gid] = [
            f"{name}, rank {rank}: {percent(share, 1)} of dropped experts"
            for rank, share in zip(ranks, values, strict=True)
        ]
    lines.axes.set_ylim(bottom=0)
    return [
        Picture(
            name="dropped_ranks",
            title="Which experts are lost",
            caption="Ranks that the dropped experts had in full precision, all layers "
            "together; rank 1 has the largest weight.",
            description=_describe_dropped(results, shares),
            figure=lines.figure,
            tips=tips,
            table=_table("Rank", [str(n + 1) for n in range(_longest(shares))], shares),
        )
    ]


def draw_injected(folder: Folder) -> list[Picture]:
    """Draw which ranks the injected experts have in full precision.

    Where K differs between layers, ranks are counted in multiples of a layer's own K.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    steps = _Steps.of(results)
    shares = {n: _injected(m, results, steps) for n, m in results.methods.items()}
    end = max(2 * steps.per_k, _last(shares))
    lines = MethodLines(2.1, list(shares))
    tips = {}
    for index, (name, every) in enumerate(shares.items()):
        gid, values = f"injected-{index}", every[:end]
        size = 3.0 if len(values) <= 64 else 1.8
        places = [steps.place(step) for step in range(len(values))]
        lines.draw(places, [100 * share for share in values], index, gid, size)
        tips[gid] = [
            f"{name}, {steps.name(step)}: {percent(share, 1)} of injected experts"
            for step, share in enumerate(values)
        ]
    _finish(lines, steps, end, _longest(shares))
    names = [steps.name(step) for step in range(_longest(shares))]
    return [
        Picture(
            name="injected_ranks",
            title="Which experts come instead",
            caption="Ranks that the injected experts have in full precision, all "
            "layers together, with marks behind ranks 2K and 3K."
            + ("" if steps.equal else " K is that of each layer."),
            description=_describe_injected(results, steps),
            figure=lines.figure,
            tips=tips,
            table=_table("Rank", [n.removeprefix("rank ") for n in names], shares),
        )
    ]


class _Steps(NamedTuple):
    """Ranks behind K in steps that all layers share.

    A layer's step is K / `per_k` ranks, so that K, 2K and 3K are ends of steps in every
    layer. Where all K are equal, a step is one rank.

    Attributes:
        per_k: Steps from K to 2K.
        equal: Whether all layers have the same K, which is `per_k` then.
    """

    per_k: int
    equal: bool

    @classmethod
    def of(cls, results: Results) -> "_Steps":
        every = {layer.top_k for layer in results.layers}
        return cls(gcd(*every), len(every) == 1)

    def place(self, step: float) -> float:
        """Where a step is drawn: at its rank, or in the middle of its ranks over K."""
        if self.equal:
            return self.per_k + 1 + step
        return 1 + (step + 0.5) / self.per_k

    def name(self, step: int) -> str:
        """The ranks of a step."""
        if self.equal:
            return f"rank {self.per_k + 1 + step}"
        low, high = (1 + place / self.per_k for place in (step, step + 1))
        return f"rank over {low:.3g} K to {high:.3g} K"

    def ranks(self, times: int) -> str:
        """Those from K on to a multiple of K."""
        if self.equal:
            return f"ranks {self.per_k + 1} to {times * self.per_k}"
        return f"ranks K + 1 to {times}K"


def injected_ranks(results: Results, times: int) -> str:
    """Name the ranks behind K up to a multiple of it, such as "ranks 5 to 12".

    Args:
        results: A comparison.
        times: The multiple.
    """
    return _Steps.of(results).ranks(times)


def _dropped(method: MethodResult) -> list[float]:
    """Shares by rank, of all layers together."""
    return _of_all([layer.dropped_ranks for layer in method.layers])


def _injected(method: MethodResult, results: Results, steps: _Steps) -> list[float]:
    """Shares by step behind K, of all layers together."""
    counts = []
    for layer, fp in zip(method.layers, results.layers, strict=True):
        size, found = fp.top_k // steps.per_k, layer.injected_ranks
        counts.append([sum(found[i : i + size]) for i in range(0, len(found), size)])
    return _of_all(counts)


def _of_all(counts: Sequence[Sequence[int]]) -> list[float]:
    """Add up the layers, place by place, and divide by the sum of all."""
    sums = [0] * max(map(len, counts))
    for of_layer in counts:
        for place, count in enumerate(of_layer):
            sums[place] += count
    total = sum(sums) or 1
    return [count / total for count in sums]


def _longest(shares: Mapping[str, Sequence[float]]) -> int:
    return max(map(len, shares.values()))


def _finish(lines: MethodLines, steps: _Steps, end: int, longest: int) -> None:
    """Set the limits, the marks and the names of the axes."""
    axes = lines.axes
    if steps.equal:
        label, margin = f"rank in full precision (top-K: {steps.per_k})", 0.7
    else:
        label, margin = "rank in full precision, in multiples of K", 0.7 / steps.per_k
    lines.label(label, "injected experts, %")
    axes.set_xlim(steps.place(0) - margin, steps.place(min(end, longest) - 1) + margin)
    axes.set_ylim(bottom=0)
    for times in (2, 3):
        last = (times - 1) * steps.per_k  # the first step behind it
        if last < longest:
            _mark(axes, steps.place(last - 0.5), f"{times}K")


def _last(shares: Mapping[str, Sequence[float]]) -> int:
    """The step behind which less than 0.1 % of any method's injected experts are."""
    last = 0
    for values in shares.values():
        left = sum(values)
        for step, share in enumerate(values, 1):
            if left < 1e-3:
                break
            left -= share
            last = max(last, step)
    return last


def _mark(axes: Any, place: float, text: str) -> None:
    axes.axvline(place, color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)), zorder=0)
    axes.annotate(
        text,
        (place, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2, -2),
        textcoords="offset points",
        va="top",
        fontsize=6.5,
        color=INK,
    )


def _describe_dropped(results: Results, shares: Mapping[str, Sequence[float]]) -> str:
    parts = []
    top_ks = sorted({layer.top_k for layer in results.layers})
    for name, values in shares.items():
        layers = results.methods[name].layers
        total = sum(sum(layer.dropped_ranks) for layer in layers)
        if total:
            last = sum(layer.dropped_ranks[-1] for layer in layers) / total
            parts.append(
                f"{name}: {percent(last)} of the dropped experts had the last rank "
                f"that is chosen, {' or '.join(map(str, top_ks))}, and "
                f"{percent(values[0])} the first."
            )
    return "\n".join(parts) or "No expert was dropped."


def _describe_injected(results: Results, steps: _Steps) -> str:
    parts = []
    for name, method in results.methods.items():
        near, far = (method.metrics[f"inside_{n}k"].value for n in (2, 3))
        if near is None:
            parts.append(f"{name}: no expert was injected.")
        else:
            parts.append(
                f"{name}: {percent(near)} of the injected experts come from "
                f"{steps.ranks(2)}, {percent(far)} from {steps.ranks(3)}."
            )
    return "\n".join(parts)


def _table(
    head: str, places: Sequence[str], shares: Mapping[str, Sequence[float]]
) -> Table:
    rows = [
        [
            place,
            *(percent(s[i] if i < len(s) else None, 1) for s in shares.values()),
        ]
        for i, place in enumerate(places)
    ]
    return Table([head, *shares], rows)
