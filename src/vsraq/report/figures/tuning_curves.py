# SPDX-License-Identifier: Apache-2.0
"""Losses of each block over the iterations of its tuning."""

import math
from collections.abc import Sequence
from typing import Any

from vsraq.report.folder import Folder
from vsraq.report.picture import (
    INK,
    MUTED,
    PALETTE,
    Picture,
    Table,
    new_figure,
    plain_axes,
)
from vsraq.report.schema import Run, RunBlock
from vsraq.report.wording import listed, number, percent

_FIRST, _LAST = PALETTE[0], PALETTE[1]


def draw(folder: Folder) -> list[Picture]:
    """Draw a panel per loss, a line per block.

    Args:
        folder: An export with its run's record.
    """
    run = folder.run
    terms = [] if run is None else loss_terms(run)
    if run is None or not terms:
        return []
    figure = new_figure(0.45 + 1.25 * len(terms))
    every = figure.subplots(len(terms), 1, sharex=True, squeeze=False)[:, 0]
    tips: dict[str, list[str]] = {}
    for term, axes in zip(terms, every, strict=True):
        tips |= _draw_term(axes, run, term)
        axes.set_title(term, pad=3)
        plain_axes(axes)
    every[-1].set_xlabel("iteration")
    every[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel("loss over its first value", fontsize=7)
    _name_blocks(figure, run)
    return [
        Picture(
            name="tuning_curves",
            title="Tuning of each block",
            caption="Losses over their values at the first iteration, a line per "
            "block; a dot marks the iteration that was kept.",
            description=_describe(run, terms),
            figure=figure,
            tips=tips,
            colours=_mixes(run),
            table=_table(run, terms),
        )
    ]


def kept(block: RunBlock, losses: Sequence[float]) -> float | None:
    """The loss at the iteration that was kept, over the first one.

    Args:
        block: A tuned block.
        losses: One of its terms, a value per iteration.
    """
    best = block.best_iteration
    if best is None or not 0 <= best < len(losses) or not losses[0] > 0:
        return None
    return losses[best] / losses[0] if math.isfinite(losses[best]) else None


def loss_terms(run: Run) -> list[str]:
    """The losses that some block has more than one value of, reconstruction first.

    Args:
        run: A run's record.
    """
    terms = {
        name: None
        for block in run.blocks
        for name, values in block.losses.items()
        if len(values) > 1 and values[0] > 0
    }
    return sorted(terms, key=lambda name: name != "reconstruction")


def _colour(run: Run, index: int) -> str:
    """A colour between that of the first and that of the last block."""
    from matplotlib.colors import to_hex, to_rgb

    place = index / max(1, len(run.blocks) - 1)
    first, last = to_rgb(_FIRST), to_rgb(_LAST)
    red, green, blue = (a + place * (b - a) for a, b in zip(first, last, strict=True))
    return to_hex((red, green, blue))


def _mixes(run: Run) -> dict[str, str]:
    """The same, from the page's own two colours."""
    last = max(1, len(run.blocks) - 1)
    return {
        _colour(run, index): "color-mix(in srgb, var(--series-1) "
        f"{100 * index / last:.1f}%, var(--series-0))"
        for index in range(1, last)
    }


def _draw_term(axes: Any, run: Run, term: str) -> dict[str, list[str]]:
    tips = {}
    for index, block in enumerate(run.blocks):
        losses = block.losses.get(term, ())
        if len(losses) < 2 or not losses[0] > 0:
            continue
        values = [loss / losses[0] for loss in losses]
        colour = _colour(run, index)
        axes.plot(values, color=colour, linewidth=0.7, alpha=0.85)
        found = kept(block, losses)
        if found is None:
            continue
        gid = f"kept-{term.replace(' ', '-')}-{index}"
        axes.plot(block.best_iteration, found, "o", color=colour, markersize=3, gid=gid)
        tips[gid] = [
            f"{block.name}, {term}: {number(losses[0])} at first, "
            f"{number(found * losses[0])} at iteration {block.best_iteration} "
            f"({percent(found - 1)})"
        ]
    axes.axhline(1, color=MUTED, linewidth=0.5)
    return tips


def _name_blocks(figure: Any, run: Run) -> None:
    """A legend of the first, the middle and the last block."""
    from matplotlib.lines import Line2D

    count = len(run.blocks)
    some = sorted({0, (count - 1) // 2, count - 1})
    lines = [Line2D([], [], color=_colour(run, index), linewidth=1.2) for index in some]
    figure.legend(
        lines,
        [run.blocks[index].name for index in some],
        loc="outside upper left",
        ncols=len(some),
        frameon=False,
        handlelength=1.4,
        columnspacing=1.0,
        labelcolor=INK,
        borderaxespad=0.2,
        borderpad=0.2,
        fontsize=6,
    )


def _describe(run: Run, terms: Sequence[str]) -> str:
    parts = []
    for term in terms:
        changes = [
            change
            for block in run.blocks
            if (change := kept(block, block.losses.get(term, ()) or (0.0,))) is not None
        ]
        if changes:
            mean = sum(changes) / len(changes)
            parts.append(
                f"{term}: {percent(mean - 1)} in the mean of {len(changes)} blocks, "
                f"from {percent(min(changes) - 1)} to {percent(max(changes) - 1)}."
            )
    still = [block.name for block in run.blocks if block.best_iteration == 0]
    tail = (
        f"\n{listed(still)} kept the first iteration: tuning did not help there."
        if still
        else ""
    )
    return "Change at the iteration that was kept.\n" + "\n".join(parts) + tail


def _table(run: Run, terms: Sequence[str]) -> Table:
    rows = []
    for block in run.blocks:
        cells = [block.name, number(block.best_iteration, 1)]
        for term in terms:
            losses = block.losses.get(term, ())
            change = kept(block, losses or (0.0,))
            cells.append(
                "" if change is None else f"{number(losses[0])} ({percent(change - 1)})"
            )
        rows.append(cells)
    heads = [f"{term}: first value (change)" for term in terms]
    return Table(["Block", "Kept iteration", *heads], rows)
