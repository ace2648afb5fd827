# SPDX-License-Identifier: Apache-2.0
"""Jaccard of each layer's selected experts with full precision's (VSRAQ, Fig. 1)."""

from typing import Any

from vsraq.report.folder import Folder
from vsraq.report.picture import (
    Picture,
    Table,
    legend_above,
    look,
    new_figure,
    plain_axes,
)
from vsraq.report.schema import Results
from vsraq.report.wording import fixed, interval, shortened


def draw(folder: Folder) -> list[Picture]:
    """Draw a line per method over the decoder blocks.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    figure = new_figure(2.2)
    axes = figure.subplots()
    tips = {}
    handles = []
    for index, name in enumerate(results.methods):
        handles.append(_draw_line(axes, results, name, index))
        tips[f"jaccard-{index}"] = _tips(results, name)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("Jaccard with full precision")
    axes.xaxis.get_major_locator().set_params(integer=True)
    plain_axes(axes)
    legend_above(figure, handles, [shortened(name) for name in results.methods])
    return [
        Picture(
            name="jaccard_by_layer",
            title="Where the routing moves",
            caption="Overlap of the selected experts with full precision, per layer "
            "(1 is the same experts for every token); bands are 95 % intervals.",
            description=_describe(results),
            figure=figure,
            tips=tips,
            table=_table(results),
        )
    ]


def _draw_line(axes: Any, results: Results, name: str, index: int) -> Any:
    blocks = [layer.block for layer in results.layers]
    found = [r.metrics["jaccard"] for r in results.methods[name].layers]
    values = [i.value for i in found]
    style = look(index)
    low = [i.value if i.low is None else i.low for i in found]
    high = [i.value if i.high is None else i.high for i in found]
    axes.fill_between(blocks, low, high, color=style["color"], alpha=0.16, linewidth=0)
    size = 3.2 if len(blocks) <= 24 else 2.0
    axes.plot(blocks, values, color=style["color"], linestyle=style["linestyle"], lw=1)
    marks = {"color": style["color"], "marker": style["marker"], "markersize": size}
    axes.plot(blocks, values, linestyle="none", gid=f"jaccard-{index}", **marks)
    (handle,) = axes.plot([], [], lw=1, markersize=3.2, **style)
    return handle


def _tips(results: Results, name: str) -> list[str]:
    layers = zip(results.layers, results.methods[name].layers, strict=True)
    return [
        f"{name}, layer {layer.block}: Jaccard "
        f"{fixed(found.metrics['jaccard'].value, 4)} "
        f"({interval(found.metrics['jaccard'], decimals=4)})"
        for layer, found in layers
    ]


def _describe(results: Results) -> str:
    parts = []
    for name, method in results.methods.items():
        values = [found.metrics["jaccard"].value or 0.0 for found in method.layers]
        first, last = results.layers[0].block, results.layers[-1].block
        lowest = min(range(len(values)), key=values.__getitem__)
        parts.append(
            f"{name}: from {fixed(values[0])} in layer {first} to {fixed(values[-1])} "
            f"in layer {last}, lowest {fixed(values[lowest])} in layer "
            f"{results.layers[lowest].block}."
        )
    return "\n".join(parts)


def _table(results: Results) -> Table:
    rows = []
    for index, layer in enumerate(results.layers):
        found = [m.layers[index].metrics["jaccard"] for m in results.methods.values()]
        rows.append([str(layer.block), *(fixed(i.value, 4) for i in found)])
    return Table(["Layer", *results.methods], rows)
