# SPDX-License-Identifier: Apache-2.0
"""A line per method in one pair of axes, with a legend above."""

from collections.abc import Sequence
from typing import Any

from vsraq.report.picture import legend_above, look, new_figure, plain_axes
from vsraq.report.wording import shortened


class MethodLines:
    """A figure with one pair of axes, or several below each other, and a legend.

    Args:
        height: Of the figure, in inches.
        names: The methods.
        rows: Pairs of axes.

    Attributes:
        figure: matplotlib's.
        every: The axes, from top to bottom.
    """

    def __init__(self, height: float, names: Sequence[str], rows: int = 1) -> None:
        self.figure = new_figure(height)
        self.every: list[Any] = list(self.figure.subplots(rows, 1, squeeze=False)[:, 0])
        for axes in self.every:
            plain_axes(axes)
        handles = [self._handle(index) for index in range(len(names))]
        legend_above(self.figure, handles, [shortened(name) for name in names])

    @property
    def axes(self) -> Any:
        """The first pair of axes."""
        return self.every[0]

    def _handle(self, index: int) -> Any:
        """What stands for a method in the legend: its line with a marker."""
        (handle,) = self.axes.plot([], [], lw=1, markersize=3.2, **look(index))
        return handle

    def label(self, x: str, y: str) -> None:
        """Name the axes of the first pair; those below count something."""
        self.axes.set_xlabel(x)
        self.axes.set_ylabel(y)
        self.axes.xaxis.get_major_locator().set_params(integer=True)

    def draw(
        self,
        x: Sequence[float],
        y: Sequence[Any],
        index: int,
        gid: str,
        size: float,
    ) -> None:
        """Draw the line of a method in the first pair, and markers to point at.

        Args:
            x: Places.
            y: Values.
            index: Of the method.
            gid: Of the markers.
            size: Of a marker, in points.
        """
        self.axes.plot(x, y, lw=1, **line_style(index))
        draw_markers(self.axes, x, y, index, gid, size)


def line_style(index: int) -> dict[str, Any]:
    """The colour and the dash of a method's line."""
    return {name: look(index)[name] for name in ("color", "linestyle")}


def draw_markers(
    axes: Any, x: Sequence[float], y: Sequence[Any], index: int, gid: str, size: float
) -> None:
    """Draw the markers of a method, to point at; see `MethodLines.draw`."""
    style = look(index)
    marks = {"color": style["color"], "marker": style["marker"], "markersize": size}
    axes.plot(x, y, linestyle="none", gid=gid, **marks)
