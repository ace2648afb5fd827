# SPDX-License-Identifier: Apache-2.0
"""A panel per method, side by side, with the same axes."""

from collections.abc import Sequence
from math import log10
from typing import Any

from vsraq.report.picture import new_figure
from vsraq.report.wording import shortened


def panels(names: Sequence[str], height: float = 1.75) -> tuple[Any, list[Any]]:
    """A figure with a panel per method, two in a row.

    Args:
        names: The methods.
        height: Of one row, in inches.

    Returns:
        The figure, and the axes of each method.
    """
    columns = 1 if len(names) == 1 else 2
    rows = -(-len(names) // columns)
    figure = new_figure(max(2.2, rows * height + 0.2))
    every = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat = list(every.flat)
    for axes, name in zip(flat, names, strict=False):
        axes.set_title(shortened(name), pad=3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in flat[len(names) :]:
        axes.set_visible(False)
    if len(flat) > len(names):  # the panel above the gap has an axis of its own
        flat[len(names) - columns].tick_params(labelbottom=True)
    return figure, flat[: len(names)]


def near_zero_axis(axis: Any, start: float) -> None:
    """Make an axis logarithmic, with a place for 0.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        start: From here on it is logarithmic; below, it is linear down to 0.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes = axis.axes
    scale = axes.set_xscale if axis.axis_name == "x" else axes.set_yscale
    scale("symlog", linthresh=start, linscale=0.6)
    ticks = [0.0, *(10.0**e for e in range(-9, 1) if 10.0**e >= 0.99 * start)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power))


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float, _place: object) -> str:
    if value == 0:
        return "0"
    exponent = round(log10(value))
    return "1" if exponent == 0 else f"10{str(exponent).translate(_RAISED)}"
