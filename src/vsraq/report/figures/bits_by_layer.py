# SPDX-License-Identifier: Apache-2.0
"""Bits of an export's layers, and the damages of its plan's units."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vsraq.bits.plan import BitPlan, PlannedUnit
from vsraq.report.bits import Bits, places
from vsraq.report.figures.heat_map import draw_bar, draw_map, shades
from vsraq.report.folder import Folder
from vsraq.report.picture import (
    INK,
    PALETTE,
    Grid,
    Picture,
    Table,
    new_figure,
)
from vsraq.report.wording import counted, listed, number

_BLUE, _VERMILION = PALETTE[:2]
_DIGITS = re.compile(r"\d+")


def draw(folder: Folder) -> list[Picture]:
    """Draw a map of bits, kind of layer by block; with a plan, one of damages.

    The bits are those of the export's layers, or those of the plan where there is no
    export. There is no map of bits that could not be read.

    Args:
        folder: An export, or one with a plan.
    """
    bits = folder.bits
    if bits is None and folder.plan is not None and not folder.unread:
        bits = _planned_bits(folder.plan)
    found = [] if bits is None or not bits.cells else [_draw_bits(bits)]
    if folder.plan is not None:
        found.append(_draw_damages(folder.plan))
    return found


def _planned_bits(plan: BitPlan) -> Bits:
    """The bits that a plan gives its units, by the names of their schemes."""
    cells, outside = {}, {}
    found = _places(plan.units)
    for unit in plan.units:
        digits = _DIGITS.search(unit.chosen)
        if digits is None:
            continue
        kind, block = found[unit.name]
        if block is None:
            outside[kind] = float(digits[0])
        else:
            cells[kind, block] = float(digits[0])
    return Bits(
        blocks=tuple(sorted({block for _, block in cells})),
        kinds=tuple(dict.fromkeys(kind for kind, _ in cells)),
        cells=cells,
        outside=outside,
    )


def _places(units: Sequence[PlannedUnit]) -> dict[str, tuple[str, int | None]]:
    """Kinds and blocks by the name of the unit; its size is that of its base scheme."""
    return places({u.name: u.candidates[u.base].bytes for u in units})


def _draw_bits(bits: Bits) -> Picture:
    figure = new_figure(0.75 + 0.17 * len(bits.kinds))
    axes = figure.subplots()
    values = [[bits.cells.get((k, b)) for b in bits.blocks] for k in bits.kinds]
    # full precision is paler than any scheme, more bits are bluer
    tones = [[None if v is None else min(v, 9.0) for v in row] for row in values]
    gid = "bits-map"
    _draw_map(axes, tones, (1.0, 9.0), _BLUE, gid)
    if len(bits.blocks) <= 16:
        _write(axes, values, tones)
    _label(axes, bits.kinds, bits.blocks)
    common = _most_common([v for row in values for v in row if v is not None])
    others = [
        f"{kind} in block {block} has {value:.3g}"
        for (kind, block), value in bits.cells.items()
        if value != common and value < 16
    ]
    outside = "".join(f" {k} has {v:g} bits." for k, v in bits.outside.items())
    words = (
        f"Most quantized layers have {common:g} bits, "
        f"{counted(len(others), 'other')}: {listed(others)}."
        if others
        else f"All quantized layers have {common:g} bits."
    )
    return Picture(
        name="bits",
        title="Bits of each layer",
        caption="Bits per weight, scales left out; routed experts are one row. 16 and "
        "32 are not quantized.",
        description=words + outside,
        figure=figure,
        grids={gid: Grid(bits.kinds, "block", values, "bits")},
        table=_map_table(bits.kinds, bits.blocks, values),
    )


def _most_common(values: Sequence[float]) -> float:
    quantized = [value for value in values if value < 16] or list(values)
    return max(dict.fromkeys(quantized), key=quantized.count)


def _draw_damages(plan: BitPlan) -> Picture:
    routing = plan.metric == "routing"
    key, title, unit = (
        ("routing", "1 - Jaccard", "%") if routing else ("kl", "KL", "1e-3 nats")
    )
    factor = 100.0 if routing else 1e3
    cells = _damages(plan.units, key, factor)
    kinds = tuple(dict.fromkeys(kind for kind, _ in cells))
    blocks = tuple(sorted({block for _, block in cells}))
    values = [[cells.get((k, b)) for b in blocks] for k in kinds]
    top = max(cells.values(), default=0.0) or 1.0
    gid = "damage-map"
    figure = new_figure(0.9 + 0.17 * len(kinds))
    axes = figure.subplots()
    image = _draw_map(axes, values, (0.0, top), _VERMILION, gid)
    bar = draw_bar(figure, axes, image, 12)
    bar.set_label(unit, fontsize=6.5)
    _label(axes, kinds, blocks)
    worst = max(cells, key=cells.__getitem__) if cells else ("", 0)
    return Picture(
        name="damages",
        title="What each unit damages",
        caption=f"{title} to full precision when only this unit is rounded, with the "
        f"scheme that it has without a plan ({plan.scheme}), {unit}.",
        description=f"The most comes from {worst[0]} in block {worst[1]}: "
        f"{number(cells.get(worst))} {unit}. With {plan.scheme} everywhere the model "
        f"has {number(factor * getattr(plan.uniform, key))} {unit}, with the plan "
        f"{number(factor * getattr(plan.planned, key))}.",
        figure=figure,
        grids={gid: Grid(kinds, "block", values, unit)},
        table=_map_table(kinds, blocks, values),
    )


def _damages(
    units: Sequence[PlannedUnit], key: str, factor: float
) -> dict[tuple[str, int], float]:
    cells = {}
    found = _places(units)
    for unit in units:
        kind, block = found[unit.name]
        if block is not None:
            cells[kind, block] = factor * getattr(unit.candidates[unit.base], key)
    return cells


def _draw_map(
    axes: Any,
    values: Sequence[Sequence[float | None]],
    limits: tuple[float, float],
    colour: str,
    gid: str,
) -> Any:
    from matplotlib.colors import Normalize

    image, _ = draw_map(axes, values, shades(colour), Normalize(*limits), gid)
    return image


def _write(
    axes: Any,
    values: Sequence[Sequence[float | None]],
    tones: Sequence[Sequence[float | None]],
) -> None:
    """Write the numbers into the cells."""
    for row, (numbers, of_row) in enumerate(zip(values, tones, strict=True)):
        for column, (value, tone) in enumerate(zip(numbers, of_row, strict=True)):
            if value is not None:
                text = f"{value:g}" if value == round(value) else f"{value:.1f}"
                dark = (tone or 0.0) > 5.5
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="#fefefe" if dark else INK,
                )


def _label(axes: Any, kinds: Sequence[str], blocks: Sequence[int]) -> None:
    step = -(-len(blocks) // 12)
    places = range(0, len(blocks), step)
    axes.set_xticks(places, [str(blocks[place]) for place in places])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0)
    axes.set_xlabel("block")


def _map_table(
    kinds: Sequence[str],
    blocks: Sequence[int],
    values: Sequence[Sequence[float | None]],
) -> Table:
    by_kind: Mapping[str, Sequence[float | None]] = dict(
        zip(kinds, values, strict=True)
    )
    rows = [
        [str(block), *(number(by_kind[kind][i]) for kind in kinds)]
        for i, block in enumerate(blocks)
    ]
    return Table(["Block", *kinds], rows)
