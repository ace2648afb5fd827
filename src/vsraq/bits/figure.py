# SPDX-License-Identifier: Apache-2.0
"""A bit plan as a figure: damage per MiB, and damage over the budget."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vsraq.bits.plan import BitPlan
from vsraq.bits.tradeoffs import (
    MIB,
    budget_curve,
    damage_of,
    plan_damage,
    slopes,
)

SUFFIXES = (".png", ".svg")
# Okabe and Ito's palette, which colour-blind people can tell apart; without yellow
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#000000", "#999999"),
)
_MARKERS = "osD^vP*X"


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn.

    Args:
        path: The figure.

    Raises:
        ValueError: Its name says no format that is drawn.
        RuntimeError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"figure={str(path)!r}: allowed is a name that ends with "
            f"{' or '.join(SUFFIXES)}"
        )
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            f"figure={str(path)!r}: matplotlib is not installed; run `pip install "
            "matplotlib`, or install vsraq[report]"
        )


def plot_plan(plan: BitPlan, path: Path) -> None:
    """Draw a plan.

    Left, for each unit: the damage per MiB that more bits take away, and that fewer
    bits add. Right: the least damage over the size of the export, and what was
    measured.

    Args:
        plan: The plan.
        path: The figure; its folder must exist.

    Raises:
        ValueError: Its name says no format that is drawn.
        RuntimeError: matplotlib is not installed.
    """
    check_figure(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "vsraq"}
    with rc_context(style):
        figure = Figure(figsize=(7.2, 3.4), dpi=200, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_units(left, plan)
        _draw_budgets(right, plan)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, axis="y", color="#e0e0e0", linewidth=0.6)
            axes.set_axisbelow(True)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, metadata=metadata)


def _draw_units(axes: Any, plan: BitPlan) -> None:
    """Draw a line over the blocks for each kind of unit."""
    metric, title, unit, factor = _measure(plan)
    mebi, size_unit = (1024, "GiB") if plan.uniform.bytes >= 10 * 2**30 else (1, "MiB")
    factor *= mebi
    more, fewer = slopes(plan, metric)
    kinds = list(dict.fromkeys([*more, *fewer]))
    every = [s for found in (more, fewer) for line in found.values() for s in line]
    # a log axis has no place for what is not above 0: it lies on the floor
    heights = [factor * s.per_mib for s in every if s.per_mib > 0]
    floor = min(heights, default=1.0) / 2
    size = 4.5 if len({s.block for s in every}) <= 16 else 2.8
    for found, dash in ((more, "-"), (fewer, ":")):
        for kind, line in found.items():
            colour, marker = _style(kinds.index(kind))
            points = [(s.block, max(factor * s.per_mib, floor)) for s in line]
            axes.plot(*zip(*points, strict=True), dash, color=colour, linewidth=0.9)
            pairs = list(zip(points, line, strict=True))
            for chosen in (False, True):
                marked = [point for point, slope in pairs if slope.chosen is chosen]
                axes.plot(
                    [block for block, _ in marked],
                    [height for _, height in marked],
                    marker,
                    markersize=size,
                    markeredgewidth=0.8,
                    markeredgecolor=colour,
                    markerfacecolor=colour if chosen else "white",
                    linestyle="none",
                )
    _log(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"Units: {title} per {size_unit}", loc="left", fontsize=8)
    axes.set_xlabel("decoder block")
    axes.set_ylabel(f"{unit} per {size_unit}")
    _unit_legend(axes, kinds, bool(fewer))


def _style(index: int) -> tuple[str, str]:
    """Return a colour and a marker; both differ between the first eight kinds."""
    turn = index // len(_COLOURS)
    return _COLOURS[index % len(_COLOURS)], _MARKERS[(index + turn) % len(_MARKERS)]


def _log(axes: Any) -> None:
    """Make an axis logarithmic, with several numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not any(y > 0 for line in axes.lines for y in line.get_ydata()):
        return  # it has no logarithm
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1,) if high / low > 1e3 else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _unit_legend(axes: Any, kinds: Sequence[str], fewer: bool) -> None:
    from matplotlib.lines import Line2D

    entries = []
    for index, kind in enumerate(kinds):
        colour, marker = _style(index)
        line = Line2D([], [], color=colour, marker=marker, linewidth=0.9, markersize=4)
        line.set_label(_short(kind))
        entries.append(line)
    grey = "#555555"
    entries.append(Line2D([], [], color=grey, linewidth=0.9, label="more bits save"))
    if fewer:
        label = "fewer bits cost"
        line = Line2D([], [], color=grey, linewidth=0.9, linestyle=":", label=label)
        entries.append(line)
    dot = Line2D([], [], color=grey, marker="o", linestyle="none", markersize=4)
    dot.set_label("filled: in the plan")
    _legend(axes, 2, handles=[*entries, dot])


def _legend(axes: Any, columns: int, **options: Any) -> None:
    """Put a legend below the axes."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=columns,
        fontsize=6.5,
        frameon=False,
        handlelength=1.8,
        **options,
    )


def _short(kind: str) -> str:
    """Return a unit's kind without what all models call alike."""
    return kind.replace("self_attn.", "").replace("mlp.", "").replace("mixer.", "")


def _draw_budgets(axes: Any, plan: BitPlan) -> None:
    """Draw the least damage over the size of the export."""
    metric, title, unit, factor = _measure(plan)
    sizes, predicted = budget_curve(plan, metric)
    blue, orange = _COLOURS[:2]
    shares = [100 * (size / plan.uniform.bytes - 1) for size in sizes]
    values = [factor * value for value in predicted]
    axes.plot(shares, values, color=blue, linewidth=1.2, label="predicted, best choice")
    planned = 100 * (plan.planned.bytes / plan.uniform.bytes - 1)
    uniform_size, planned_size = map(_size, (plan.uniform.bytes, plan.planned.bytes))
    points = (
        (planned, plan_damage(plan, metric), "o", "white", "predicted, this plan"),
        (planned, damage_of(plan.planned, metric), "o", blue, "measured, this plan"),
        (
            0,
            damage_of(plan.uniform, metric),
            "s",
            orange,
            f"measured, all {plan.scheme}",
        ),
    )
    notes = (planned_size, planned_size, uniform_size)
    for (share, value, marker, fill, label), note in zip(points, notes, strict=True):
        axes.plot(
            share,
            factor * value,
            marker,
            # a ring around the measured value, if they are equal
            markersize=8.5 if fill == "white" else 5.5,
            markerfacecolor=fill,
            markeredgecolor=orange if fill == orange else blue,
            label=f"{label} ({note})",
        )
    _log(axes)
    axes.set_title(f"Budget: {title}", loc="left", fontsize=8)
    axes.set_xlabel(f"bytes of the export, % more than all {plan.scheme}")
    axes.set_ylabel(unit)
    _legend(axes, 1)


def _size(count: int) -> str:
    mebi = count / MIB
    return f"{mebi / 1024:,.2f} GiB" if mebi >= 1024 else f"{mebi:,.2f} MiB"


def _measure(plan: BitPlan) -> tuple[str, str, str, float]:
    """Return the metric that is drawn, its title, its unit, and how many there are."""
    if plan.metric == "routing":
        return "routing", "1 - Jaccard", "%", 100.0
    return "kl", "KL", "1e-3 nats", 1e3
