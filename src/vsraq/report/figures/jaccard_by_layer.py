# SPDX-License-Identifier: Apache-2.0
"""Jaccard of each layer's selected experts with full precision's (VSRAQ, Fig. 1)."""

from vsraq.report.figures.lines import MethodLines
from vsraq.report.folder import Folder
from vsraq.report.picture import Picture, Table, look
from vsraq.report.schema import Results
from vsraq.report.wording import fixed, interval


def draw(folder: Folder) -> list[Picture]:
    """Draw a line per method over the decoder blocks.

    Args:
        folder: A comparison.
    """
    results = folder.results
    if results is None:
        return []
    lines = MethodLines(2.2, list(results.methods))
    lines.label("decoder block", "Jaccard with full precision")
    tips = {}
    for index, name in enumerate(results.methods):
        _draw_line(lines, results, name, index)
        tips[f"jaccard-{index}"] = _tips(results, name)
    return [
        Picture(
            name="jaccard_by_layer",
            title="Where the routing moves",
            caption="Overlap of the selected experts with full precision, per layer "
            "(1 is the same experts for every token); bands are 95 % intervals.",
            description=_describe(results),
            figure=lines.figure,
            tips=tips,
            table=_table(results),
        )
    ]


def _draw_line(lines: MethodLines, results: Results, name: str, index: int) -> None:
    blocks = [layer.block for layer in results.layers]
    found = [r.metrics["jaccard"] for r in results.methods[name].layers]
    values = [i.value for i in found]
    low = [i.value if i.low is None else i.low for i in found]
    high = [i.value if i.high is None else i.high for i in found]
    colour = look(index)["color"]
    lines.axes.fill_between(blocks, low, high, color=colour, alpha=0.16, linewidth=0)
    size = 3.2 if len(blocks) <= 24 else 2.0
    lines.draw(blocks, values, index, f"jaccard-{index}", size)


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
