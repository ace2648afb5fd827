# SPDX-License-Identifier: Apache-2.0
"""Full-precision ranks of dropped and of injected experts (SRA, Fig. 2 and 6)."""

from collections.abc import Sequence
from typing import Any

from vsraq.report.folder import Folder
from vsraq.report.picture import (
    INK,
    MUTED,
    Picture,
    Table,
    legend_above,
    look,
    new_figure,
    plain_axes,
)
from vsraq.report.schema import MethodResult, Results
from vsraq.report.wording import percent, shortened


def draw_dropped(folder: Folder) -> list[Picture]:
    """Draw which ranks the dropped experts had, in full precision.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    shares = {n: _shares(m, "dropped_ranks") for n, m in results.methods.items()}
    figure, axes = _axes()
    handles, tips = [], {}
    width = 0.8 / len(shares)
    for index, (name, values) in enumerate(shares.items()):
        offset = (index - (len(shares) - 1) / 2) * width
        colour = look(index)["color"]
        for rank, share in enumerate(values, 1):
            gid = f"dropped-{index}-{rank}"
            axes.bar(rank + offset, 100 * share, 0.9 * width, color=colour, gid=gid)
            tips[gid] = [f"{name}, rank {rank}: {percent(share, 1)} of dropped experts"]
        handles.append(axes.patches[-1])
    axes.set_xlabel("rank in full precision")
    axes.set_ylabel("dropped experts, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, handles, [shortened(name) for name in shares])
    return [
        Picture(
            name="dropped_ranks",
            title="Which experts are lost",
            caption="Ranks that the dropped experts had in full precision, all layers "
            "together; rank 1 has the largest weight.",
            description="\n".join(
                f"{name}: {percent(values[-1])} of the dropped experts had the last "
                f"rank that is chosen, {len(values)}, and {percent(values[0])} the "
                "first."
                for name, values in shares.items()
                if sum(values)
            )
            or "No expert was dropped.",
            figure=figure,
            tips=tips,
            table=_table(shares, 1),
        )
    ]


def draw_injected(folder: Folder) -> list[Picture]:
    """Draw which ranks the injected experts have in full precision.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    top_k = _top_k(results)
    shares = {n: _shares(m, "injected_ranks") for n, m in results.methods.items()}
    figure, axes = _axes()
    experts = top_k + max(map(len, shares.values()))
    end = min(experts, max(3 * top_k + 1, _last_rank(shares, top_k)))
    handles, tips = [], {}
    for index, (name, every) in enumerate(shares.items()):
        gid, values = f"injected-{index}", every[: end - top_k]
        handles.append(_draw_line(axes, values, top_k, look(index), gid))
        tips[gid] = [
            f"{name}, rank {rank}: {percent(share, 1)} of injected experts"
            for rank, share in enumerate(values, top_k + 1)
        ]
    axes.set_xlim(top_k + 0.3, end + 0.7)
    axes.set_ylim(bottom=0)
    for times in (2, 3):
        if times * top_k < experts:
            _mark(axes, times * top_k + 0.5, f"{times}K")
    axes.set_xlabel(f"rank in full precision (top-K: {top_k})")
    axes.set_ylabel("injected experts, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, handles, [shortened(name) for name in shares])
    return [
        Picture(
            name="injected_ranks",
            title="Which experts come instead",
            caption="Ranks that the injected experts have in full precision, all "
            "layers together, with marks behind ranks 2K and 3K.",
            description=_describe_injected(results, top_k),
            figure=figure,
            tips=tips,
            table=_table(shares, top_k + 1),
        )
    ]


def _axes() -> tuple[Any, Any]:
    figure = new_figure(2.1)
    axes = figure.subplots()
    plain_axes(axes)
    return figure, axes


def _top_k(results: Results) -> int:
    """The largest K of the layers."""
    return max(layer.top_k for layer in results.layers)


def _shares(method: MethodResult, name: str) -> list[float]:
    """Shares by rank, of all layers together."""
    counts: list[int] = []
    for layer in method.layers:
        of_layer: Sequence[int] = getattr(layer, name)
        counts += [0] * (len(of_layer) - len(counts))
        for rank, count in enumerate(of_layer):
            counts[rank] += count
    total = sum(counts) or 1
    return [count / total for count in counts]


def _draw_line(
    axes: Any, values: Sequence[float], top_k: int, style: Any, gid: str
) -> Any:
    ranks = range(top_k + 1, top_k + 1 + len(values))
    shares = [100 * value for value in values]
    axes.plot(ranks, shares, color=style["color"], linestyle=style["linestyle"], lw=1)
    size = 3.0 if len(values) <= 64 else 1.8
    marks = {"color": style["color"], "marker": style["marker"], "markersize": size}
    axes.plot(ranks, shares, linestyle="none", gid=gid, **marks)
    (handle,) = axes.plot([], [], lw=1, markersize=3.2, **style)
    return handle


def _last_rank(shares: dict[str, list[float]], top_k: int) -> int:
    """The rank behind which less than 0.1 % of any method's injected experts are."""
    last = top_k
    for values in shares.values():
        left = sum(values)
        for rank, share in enumerate(values, top_k + 1):
            if left < 1e-3:
                break
            left -= share
            last = max(last, rank)
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


def _describe_injected(results: Results, top_k: int) -> str:
    parts = []
    for name, method in results.methods.items():
        near, far = (method.metrics[f"inside_{n}k"].value for n in (2, 3))
        if near is None:
            parts.append(f"{name}: no expert was injected.")
        else:
            parts.append(
                f"{name}: {percent(near)} of the injected experts come from ranks "
                f"{top_k + 1} to {2 * top_k}, {percent(far)} from ranks "
                f"{top_k + 1} to {3 * top_k}."
            )
    return "\n".join(parts)


def _table(shares: dict[str, list[float]], first: int) -> Table:
    longest = max(map(len, shares.values()))
    rows = [
        [
            str(first + i),
            *(percent(s[i] if i < len(s) else None, 1) for s in shares.values()),
        ]
        for i in range(longest)
    ]
    return Table(["Rank", *shares], rows)
