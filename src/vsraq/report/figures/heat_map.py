# SPDX-License-Identifier: Apache-2.0
"""A map of values, row by column, whose cells can be pointed at."""

from collections.abc import Sequence
from typing import Any


def draw_map(
    axes: Any,
    rows: Sequence[Sequence[float | None]],
    colours: Sequence[tuple[float, tuple[float, ...]]],
    norm: Any,
    gid: str,
) -> tuple[Any, Any]:
    """Draw values as an image.

    Args:
        axes: Where to.
        rows: From top to bottom; shorter rows and None leave cells empty.
        colours: Places from 0 to 1, and the RGBA there. What is clear has the colour
            of the page, light or dark.
        norm: matplotlib's, from values to places.
        gid: Of a patch that covers the image, to point at.

    Returns:
        The image, and its values as an array, NaN where a cell is empty.
    """
    import numpy
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    width = max(map(len, rows))
    values = numpy.full((len(rows), width), numpy.nan)
    for index, row in enumerate(rows):
        values[index, : len(row)] = [numpy.nan if v is None else v for v in row]
    image = axes.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list("cells", list(colours)),
        norm=norm,
        aspect="auto",
        interpolation="none",
    )
    cover = Rectangle(
        (-0.5, -0.5), width, len(rows), fc="none", ec="none", gid=gid, zorder=5
    )
    axes.add_patch(cover)
    axes.spines[:].set_linewidth(0.4)
    return image, values


def draw_bar(figure: Any, axes: Any, image: Any, aspect: float) -> Any:
    """Draw what the colours of a map mean, right of it.

    Args:
        figure: matplotlib's.
        axes: Those of the map.
        image: From `draw_map`.
        aspect: Height of the bar over its width.
    """
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=aspect, fraction=0.05)
    bar.outline.set_linewidth(0.4)
    bar.solids.set_rasterized(True)
    bar.ax.tick_params(labelsize=6, size=1.5)
    return bar


def shades(colour: str) -> list[tuple[float, tuple[float, ...]]]:
    """From clear to a colour, as `draw_map` takes them."""
    from matplotlib.colors import to_rgba

    shade = to_rgba(colour)
    return [(0.0, (*shade[:3], 0.0)), (1.0, shade)]
