# SPDX-License-Identifier: Apache-2.0
"""Tokens per expert and layer: full precision, quantized, and the difference."""

from collections.abc import Sequence
from typing import Any

from vsraq.report.figures.heat_map import draw_bar, draw_map, shades
from vsraq.report.folder import Folder
from vsraq.report.picture import INK, PALETTE, Grid, Picture, Table, new_figure
from vsraq.report.schema import Results
from vsraq.report.wording import counted, fixed, percent

_BLUE, _VERMILION = PALETTE[:2]
_UNIT = "times the even share"


def draw(folder: Folder) -> list[Picture]:
    """Draw three heat maps, layer by expert, for each method.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    return [_draw_method(results, i, n) for i, n in enumerate(results.methods)]


def relative_load(load: Sequence[int]) -> list[float]:
    """Tokens per expert over those that each would have if all had the same.

    Args:
        load: Tokens per expert, E.
    """
    total = sum(load)
    return [count * len(load) / total if total else 0.0 for count in load]


def load_moved(load: Sequence[int], fp_load: Sequence[int]) -> float:
    """The share of choices that another expert gets: total variation of the loads.

    Args:
        load: Tokens per expert in the quantized model, E.
        fp_load: The same in full precision.
    """
    total, fp_total = sum(load) or 1, sum(fp_load) or 1
    pairs = zip(load, fp_load, strict=True)
    return sum(abs(q / total - fp / fp_total) for q, fp in pairs) / 2


def _draw_method(results: Results, index: int, name: str) -> Picture:
    fp = [relative_load(layer.load) for layer in results.layers]
    q = [relative_load(layer.load) for layer in results.methods[name].layers]
    change = [
        [b - a for a, b in zip(*rows, strict=True)] for rows in zip(fp, q, strict=True)
    ]
    panel = min(1.5, 0.55 + 0.045 * len(fp))
    figure = new_figure(3 * panel + 0.55)
    every = figure.subplots(3, 1, sharex=True)
    titles = ("full precision", "quantized", "difference")
    top = max(abs(v - 1) for rows in (fp, q) for row in rows for v in row) or 1.0
    largest = max((abs(v) for row in change for v in row), default=0.0) or 1.0
    grids = {}
    for title, axes, rows in zip(titles, every, (fp, q, change), strict=True):
        differs = title == "difference"
        gid = f"load-{title.replace(' ', '-')}"
        _draw_map(figure, axes, rows, largest if differs else top, differs, gid)
        axes.set_title(title, pad=3)
        grids[gid] = Grid(
            [f"layer {layer.block}" for layer in results.layers],
            "expert",
            rows,
            _UNIT,
        )
    every[-1].set_xlabel("expert")
    figure.supylabel("decoder block", fontsize=7)
    _label_blocks(every, [layer.block for layer in results.layers])
    return Picture(
        name=f"expert_load_{index}",
        title=f"Load of the experts: {name}",
        caption="Tokens per expert, in multiples of what each would have if all had "
        "the same: blue is more, vermilion less. A cross is an expert that no token "
        "chose.",
        description=_describe(results, name),
        figure=figure,
        grids=grids,
        table=_table(results, name),
    )


def _draw_map(
    figure: Any,
    axes: Any,
    rows: Sequence[Sequence[float]],
    top: float,
    differs: bool,
    gid: str,
) -> None:
    import numpy
    from matplotlib.colors import TwoSlopeNorm

    # from vermilion to clear to blue
    less = [(0.5 - place / 2, shade) for place, shade in shades(_VERMILION)]
    more = [(0.5 + place / 2, shade) for place, shade in shades(_BLUE)]
    norm = (
        TwoSlopeNorm(0, -top, top)
        if differs
        else TwoSlopeNorm(1, max(0.0, 1 - top), 1 + top)
    )
    image, values = draw_map(axes, rows, [*less[::-1], *more], norm, gid)
    if not differs:
        idle = numpy.argwhere(values == 0)
        axes.plot(
            idle[:, 1],
            idle[:, 0],
            "x",
            color=INK,
            markersize=2.2 if values.shape[1] <= 64 else 1.4,
            markeredgewidth=0.6,
        )
    draw_bar(figure, axes, image, 10)


def _label_blocks(every: Sequence[Any], blocks: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def block(row: float, _place: object) -> str:
        index = round(row)
        inside = 0 <= index < len(blocks) and abs(row - index) < 1e-6
        return str(blocks[index]) if inside else ""

    for axes in every:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(block))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _describe(results: Results, name: str) -> str:
    method = results.methods[name]
    moved = [
        load_moved(q.load, fp.load)
        for q, fp in zip(method.layers, results.layers, strict=True)
    ]
    most = max(range(len(moved)), key=moved.__getitem__)
    idle = sum(layer.load.count(0) for layer in method.layers)
    fp_idle = sum(layer.load.count(0) for layer in results.layers)
    busiest = max(
        (value, layer.block, expert)
        for layer in results.layers
        for expert, value in enumerate(relative_load(layer.load))
    )
    without = (
        f"{counted(idle, 'expert')} of the quantized model and {fp_idle:,} of full "
        "precision got no token"
        if idle or fp_idle
        else "Every expert got tokens"
    )
    return (
        f"{percent(moved[most], 1)} of the load moves to other experts in layer "
        f"{results.layers[most].block}, the most of all layers. {without}. The "
        f"busiest expert of full precision is {busiest[2]} in layer {busiest[1]}, with "
        f"{fixed(busiest[0], 1)} times the even share."
    )


def _table(results: Results, name: str) -> Table:
    rows = []
    layers = zip(results.methods[name].layers, results.layers, strict=True)
    for q, fp in layers:
        rows.append(
            [
                str(fp.block),
                percent(load_moved(q.load, fp.load), 1),
                *(fixed(max(relative_load(r.load)), 2) for r in (fp, q)),
                *(str(r.load.count(0)) for r in (fp, q)),
            ]
        )
    columns = ("Layer", "Load moved", "Busiest, fp", "Busiest", "Idle, fp", "Idle")
    return Table(columns, rows)
