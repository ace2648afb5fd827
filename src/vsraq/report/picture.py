# SPDX-License-Identifier: Apache-2.0
"""A figure with what is said about it; its colours, its size, its files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Okabe and Ito's palette, which colour-blind people can tell apart, without yellow;
# the darker ones first. The report writes its own colours for dark screens instead.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#000000", "#999999"),
)
MARKERS = "osD^vP*X"
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK, MUTED, GRID = "#1f2328", "#59636e", "#dfe3e8"
WIDTH = 3.3  # inches: one column of a two-column page

_STYLE: Any = {
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # a name may have a dollar sign
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "svg.fonttype": "none",
    "svg.hashsalt": "vsraq",
}


class Table(NamedTuple):
    """The values of a figure: rows of cells below column heads."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Grid(NamedTuple):
    """Values of a heat map for those who point at it: rows from top to bottom."""

    row_names: Sequence[str]
    column_name: str
    values: Sequence[Sequence[float | None]]
    unit: str


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: The stem of its files.
        title: What it shows.
        caption: How to read it.
        description: What can be seen, in words from the numbers.
        figure: matplotlib's.
        tips: Texts for those who point at it, by the gid of an artist; for a line of
            markers, one per marker.
        grids: Values of heat maps, by the gid of a patch that covers one.
        table: Its values.
        colours: What the page writes for colours that are not of this file.
    """

    name: str
    title: str
    caption: str
    description: str
    figure: Any
    table: Table
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    colours: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write the figure as PNG and as SVG.

        Args:
            folder: It must exist.

        Returns:
            The files.
        """
        png, svg = (folder / f"{self.name}{end}" for end in (".png", ".svg"))
        words = {"Title": self.title, "Description": self.description}
        self.figure.savefig(png, metadata=words, facecolor="white")
        self.figure.savefig(svg, metadata=words | {"Date": None}, facecolor="white")
        return png, svg


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        RuntimeError: It is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "matplotlib is not installed, and figures need it; run `pip install "
            "'vsraq[report]'`"
        )


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and save in the style of all figures."""
    check_matplotlib()
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def new_figure(height: float) -> Any:
    """An empty figure, one column wide.

    Args:
        height: In inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def plain_axes(axes: Any, grid: str = "y") -> None:
    """Take away what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of a method; any two of the first eight differ in two."""
    turn = index // len(PALETTE)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": DASHES[(index + turn) % len(DASHES)],
    }


def legend_above(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend above all axes, in as many columns as fit."""
    widest = max(map(len, names))
    columns = max(1, min(len(names), 62 // (widest + 7)))
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
        borderaxespad=0.2,
        borderpad=0.2,
    )
