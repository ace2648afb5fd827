# SPDX-License-Identifier: Apache-2.0
"""Tokens: routing shift against Sampled-JSD, JSD against Sampled-JSD (SRA, Fig. 3, 7).

The points are pixels, also in an SVG, because there are thousands of them.
"""

from math import log
from typing import Any

from vsraq.report.figures.small_panels import near_zero_axis, panels
from vsraq.report.folder import Folder
from vsraq.report.picture import GRID, INK, MUTED, Picture, Table, look
from vsraq.report.schema import Results
from vsraq.report.wording import fixed, number, percent

_REGIONS = {
    "a": "output changes, routing does not",
    "b": "both change",
    "c": "neither changes",
    "d": "routing changes, output does not",
}
_LN2 = log(2)


def draw_regions(folder: Folder) -> list[Picture]:
    """Draw routing shift against Sampled-JSD, with the regions A to D.

    Args:
        folder: A comparison with its sampled tokens.
    """
    results, tokens = folder.results, folder.tokens
    if results is None or tokens is None:
        return []
    limits = results.thresholds
    widest = max(float(found["routing_shift"].max()) for found in tokens.values())
    right = max(1.05 * widest, 2 * limits.routing_shift)
    figure, every = panels(list(tokens))
    tips: dict[str, list[str]] = {}
    for index, (name, axes) in enumerate(zip(tokens, every, strict=True)):
        found = tokens[name]
        _points(axes, found["routing_shift"], found["sampled_jsd"], index)
        near_zero_axis(axes.yaxis, _start(limits.sampled_jsd))
        axes.set_xlim(0, right)
        axes.set_ylim(0, 1)
        tips |= _draw_limits(axes, results, name, index)
    figure.supxlabel("routing shift (mean of layers)", fontsize=7)
    figure.supylabel("Sampled-JSD, nats", fontsize=7)
    return [
        Picture(
            name="routing_and_output",
            title="Does it matter? Routing and output of each token",
            caption=f"{len(next(iter(found.values()))):,} tokens. A token's output "
            f"counts as changed above {limits.sampled_jsd:g} nats of "
            f"Sampled-JSD, its routing above a shift of "
            f"{limits.routing_shift:g}; percentages are of all tokens.",
            description=_describe_regions(results),
            figure=figure,
            tips=tips,
            table=_region_table(results),
        )
    ]


def _start(threshold: float) -> float:
    """Where an axis of divergences becomes logarithmic; a threshold may be 0."""
    return max(threshold, 1e-5) / 10


def draw_divergences(folder: Folder) -> list[Picture]:
    """Draw full-vocabulary JSD against Sampled-JSD.

    Args:
        folder: A comparison with its sampled tokens.
    """
    results, tokens = folder.results, folder.tokens
    if results is None or tokens is None:
        return []
    start = _start(results.thresholds.sampled_jsd)
    figure, every = panels(list(tokens))
    for index, (name, axes) in enumerate(zip(tokens, every, strict=True)):
        _points(axes, tokens[name]["jsd"], tokens[name]["sampled_jsd"], index)
        for axis in (axes.xaxis, axes.yaxis):
            near_zero_axis(axis, start)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.6, linestyle=(0, (3, 2)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    figure.supxlabel("JSD of the whole vocabulary, nats", fontsize=7)
    figure.supylabel("Sampled-JSD, nats", fontsize=7)
    rows, parts = [], []
    for name, found in tokens.items():
        above = float((found["sampled_jsd"] > found["jsd"]).mean())
        zero = float((found["sampled_jsd"] == 0).mean())
        parts.append(
            f"{name}: the Sampled-JSD is the larger one for {percent(above)} of the "
            f"tokens, and exactly 0 for {percent(zero)}."
        )
        means = (found[key].mean() for key in ("jsd", "sampled_jsd"))
        rows.append([name, *(number(float(m)) for m in means), percent(above)])
    return [
        Picture(
            name="jsd_and_sampled_jsd",
            title="All tokens of the vocabulary, or those that are sampled",
            caption="Divergence of the whole next-token distribution, and of the "
            "candidates that sampling leaves; equal on the dashed line.",
            description="\n".join(parts),
            figure=figure,
            table=Table(
                ["Method", "Mean JSD", "Mean Sampled-JSD", "Sampled-JSD larger"], rows
            ),
        )
    ]


def _points(axes: Any, x: Any, y: Any, index: int) -> None:
    axes.grid(True, color=GRID)
    axes.scatter(
        x,
        y,
        s=2.2,
        color=look(index)["color"],
        alpha=0.35,
        linewidths=0,
        rasterized=True,
        clip_on=False,  # many lie on the axis itself
        zorder=2,
    )


def _draw_limits(
    axes: Any, results: Results, name: str, index: int
) -> dict[str, list[str]]:
    """Draw the limits of the regions and their shares; return texts to point at."""
    from matplotlib.patches import Rectangle

    limits, metrics = results.thresholds, results.methods[name].metrics
    x, y = limits.routing_shift, limits.sampled_jsd
    line = {"color": INK, "linewidth": 0.7, "linestyle": (0, (3, 2))}
    axes.axvline(x, **line)
    axes.axhline(y, **line)
    right = axes.get_xlim()[1]
    places = {
        "a": ((0, y, x, 1 - y), (0.03, 0.98, "left", "top")),
        "b": ((x, y, right - x, 1 - y), (0.98, 0.98, "right", "top")),
        "c": ((0, 0, x, y), (0.03, 0.04, "left", "bottom")),
        "d": ((x, 0, right - x, y), (0.98, 0.04, "right", "bottom")),
    }
    tips = {}
    for region, ((left, bottom, width, height), corner) in places.items():
        gid = f"region-{index}-{region}"
        share = percent(metrics[f"region_{region}"].value)
        cover = Rectangle((left, bottom), width, height, fc="none", ec="none", gid=gid)
        axes.add_patch(cover)
        tips[gid] = [f"{name}, region {region.upper()}: {share} ({_REGIONS[region]})"]
        axes.text(
            corner[0],
            corner[1],
            f"{region.upper()} {share}",
            transform=axes.transAxes,
            ha=corner[2],
            va=corner[3],
            fontsize=6.5,
            fontweight="bold",
            zorder=4,
            bbox={"fc": "#ffffff", "ec": "none", "alpha": 0.75, "pad": 0.8},
        )
    return tips


def _describe_regions(results: Results) -> str:
    parts = []
    for name, method in results.methods.items():
        shares = {r: percent(method.metrics[f"region_{r}"].value) for r in _REGIONS}
        parts.append(
            f"{name}: {shares['b']} of the tokens change in both (B), {shares['d']} "
            f"only in routing (D), {shares['a']} only in output (A), {shares['c']} in "
            "neither (C)."
        )
    return "\n".join(parts)


def _region_table(results: Results) -> Table:
    rows = [
        [
            f"{region.upper()}: {words}",
            *(
                f"{fixed(100 * (m.metrics[f'region_{region}'].value or 0), 1)} %"
                for m in results.methods.values()
            ),
        ]
        for region, words in _REGIONS.items()
    ]
    return Table(["Region", *results.methods], rows)
