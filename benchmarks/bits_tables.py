# SPDX-License-Identifier: Apache-2.0
"""The tables and the figure of `benchmarks/bits.py`."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import routing
from bits_grid import PLANS, RANDOM, RECIPES, ROUTING, SCHEMES, WAYS, WITH_HEAD

ITERS = 50  # of AutoRound; cells with other iterations have a table of their own


@dataclass
class Row:
    """One way and recipe in one model, scheme and budget, over the seeds."""

    mebibytes: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    jaccard: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_error: list[float] = field(default_factory=list)
    jaccard_closed: list[float] = field(default_factory=list)
    kl_closed: list[float] = field(default_factory=list)


Key = tuple[str, str, str, str, str]  # model, scheme, budget, way, recipe


def model_names(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Name each model and its weights: training gives others on another CPU."""
    found: dict[str, list[str]] = {model: [] for model in routing.MODELS}
    for result in results:
        if result["weights"] not in found[result["model"]]:
            found[result["model"]].append(result["weights"])
    return {
        (model, weights): f"{model}, weights {index}" if index > 1 else model
        for model, all_weights in found.items()
        for index, weights in enumerate(all_weights, 1)
    }


def rows(results: Sequence[Mapping[str, Any]]) -> dict[Key, Row]:
    """Results by cell; gaps are those of uniform AutoRound of the same seed."""
    model_of = model_names(results)
    plain = {
        (r["model"], r["weights"], r["scheme"], r["seed"], r["iters"]): r
        for r in results
        if (r["way"], r["recipe"]) == ("uniform", "AutoRound")
    }
    table: dict[Key, Row] = defaultdict(Row)
    for result in results:
        names = ("model", "weights", "scheme", "seed", "iters")
        reference = plain.get(tuple(result[name] for name in names))
        if reference is None or "error" in result:
            continue
        names = ("scheme", "budget", "way", "recipe")
        model = model_of[result["model"], result["weights"]]
        row = table[(model, *(result[name] for name in names))]
        jaccard = statistics.mean(result["jaccard"].values())
        before = statistics.mean(reference["jaccard"].values())
        row.mebibytes.append(result["bytes"] / 2**20)
        row.active.append(result["active"] / 2**20)
        row.jaccard.append(jaccard)
        row.kl.append(result["kl"])
        row.nll.append(result["excess_nll"])
        row.nll_error.append(result["excess_nll_error"])
        row.jaccard_closed.append(routing.closed(jaccard, before, 1.0))
        row.kl_closed.append(routing.closed(result["kl"], reference["kl"], 0.0))
    return table


def tables(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every table, by its marker in docs/results.md."""
    usual = [result for result in results if result["iters"] == ITERS]
    long = [result for result in results if result["iters"] != ITERS]
    table = rows(usual)
    return {
        "bits aims": format_aims(table),
        "bits duels": format_duels(table),
        "bits recipes": format_recipes(table),
        "bits long": format_table(rows(long)),
        "bits": format_table(table),
    }


def format_table(table: Mapping[Key, Row]) -> str:
    """Every cell: mean over the seeds, and half the range of what is closed."""
    lines = [
        "| model | scheme | budget | bytes spent by | tuned by | MiB | active MiB | "
        "Jaccard | closed % | KL | closed % | NLL beyond full precision | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = [
        (model, scheme, budget, way, recipe)
        for model in _models(table)
        for scheme, budgets in WAYS.items()
        for budget, ways in budgets.items()
        for way in ways
        for recipe in RECIPES
    ]
    for key_ in order:
        row = table.get(key_)
        if row is None:
            continue
        spread, mean = routing.spread, statistics.mean
        lines.append(
            f"| {' | '.join(key_)} | {mean(row.mebibytes):.3f} | "
            f"{mean(row.active):.3f} | {mean(row.jaccard):.4f} | "
            f"{spread(row.jaccard_closed, 1, 100)} | {mean(row.kl):.4f} | "
            f"{spread(row.kl_closed, 1, 100)} | {mean(row.nll):+.4f} ± "
            f"{mean(row.nll_error):.4f} | {len(row.kl)} |"
        )
    return "\n".join(lines)


def _models(table: Mapping[Key, Row]) -> list[str]:
    """The models of a table, in the order of `routing.MODELS`."""
    order = list(routing.MODELS)
    names = {key_[0] for key_ in table}
    return sorted(names, key=lambda name: (order.index(name.split(",")[0]), name))


def format_recipes(table: Mapping[Key, Row]) -> str:
    """What recipes add to AutoRound, without a plan and on top of one."""
    lines = [
        "| bytes spent by | tuned by | cells | Jaccard, % of the gap that is left | "
        "KL, % less | NLL, difference |",
        "|---|---|---|---|---|---|",
    ]
    for way in ("uniform", "plan"):
        for recipe in RECIPES:
            pairs = [
                (row, plain)
                for key_, row in table.items()
                if key_[3:] == (way, recipe)
                and recipe != "AutoRound"
                and (plain := table.get((*key_[:4], "AutoRound"))) is not None
            ]
            if not pairs:
                continue
            mean = statistics.mean
            gap = mean(
                routing.closed(mean(row.jaccard), mean(plain.jaccard), 1.0)
                for row, plain in pairs
            )
            kl = mean(1 - mean(row.kl) / mean(plain.kl) for row, plain in pairs)
            nll = mean(mean(row.nll) - mean(plain.nll) for row, plain in pairs)
            lines.append(
                f"| {way} | {recipe} | {len(pairs)} | {100 * gap:.1f} | "
                f"{100 * kl:.1f} | {nll:+.4f} |"
            )
    return "\n".join(lines)


# what plans are to close of AutoRound's gap, %: (KL, Jaccard)
AIMS: dict[tuple[tuple[str, ...], str], tuple[float, float]] = {
    (("W4A16",), "+3 % vllm"): (35.0, 35.0),
    (("W4A16", "W3A16"), "0 %"): (45.0, 50.0),
    (("NVFP4",), "+4 %"): (30.0, 30.0),
}


def format_aims(table: Mapping[Key, Row]) -> str:
    """What plans and the default recipe close, mean over models, beside the aims."""
    lines = [
        "| schemes | budget | bytes spent by | cells | Jaccard closed % | aim | "
        "KL closed % | aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (schemes, budget), (kl, jaccard) in AIMS.items():
        for way in (*PLANS, "AutoScheme"):
            found = [
                (model.split(",")[0], row)  # of all weights
                for (model, *key_), row in table.items()
                if key_[0] in schemes and key_[1:] == [budget, way, "default"]
            ]
            if found:
                means = [
                    100 * _mean_of_models(found, lambda row: row.jaccard_closed),
                    100 * _mean_of_models(found, lambda row: row.kl_closed),
                ]
                lines.append(
                    f"| {', '.join(schemes)} | {budget} | {way} | {len(found)} | "
                    f"{means[0]:.1f} | {jaccard:.0f} | {means[1]:.1f} | {kl:.0f} |"
                )
    return "\n".join(lines)


def _mean_of_models(
    found: Sequence[tuple[str, Row]], closed: Callable[[Row], list[float]]
) -> float:
    """Mean over the models of the mean over each one's cells."""
    by_model: dict[str, list[float]] = defaultdict(list)
    for model, row in found:
        by_model[model].append(statistics.mean(closed(row)))
    return statistics.mean(map(statistics.mean, by_model.values()))


def format_duels(table: Mapping[Key, Row]) -> str:
    """Plans beside other ways to spend the same bytes."""
    lines = [
        "| bytes spent by | tuned by | plan is ahead in KL | KL of the plan, % less "
        "(mean) | least | most | ahead in Jaccard | closes % more of the gap (mean) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mean = statistics.mean
    ways = ("AutoScheme", "W4A16_MIXED", "attention first", *RANDOM)
    for way in ways:
        for recipe in RECIPES:
            pairs = [
                (plan, row)
                for key_, row in table.items()
                if key_[3:] == (way, recipe)
                and (plan := table.get((*key_[:3], "plan", recipe))) is not None
            ]
            if not pairs:
                continue
            less = [100 * (1 - mean(plan.kl) / mean(row.kl)) for plan, row in pairs]
            more = [
                100 * (mean(plan.jaccard_closed) - mean(row.jaccard_closed))
                for plan, row in pairs
            ]
            lines.append(
                f"| {way} | {recipe} | {_ahead(less)} | {mean(less):.1f} | "
                f"{min(less):.1f} | {max(less):.1f} | {_ahead(more)} | "
                f"{mean(more):.1f} |"
            )
    return "\n".join(lines)


def _ahead(values: Sequence[float]) -> str:
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def plot(table: Mapping[Key, Row], path: Path) -> None:
    """KL over bytes: a panel for each model and scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = _models(table)
    schemes = [n for n in SCHEMES if any(n == key_[1] for key_ in table)]
    figure, axes = pyplot.subplots(
        len(models),
        len(schemes),
        figsize=(3 * len(schemes), 1 + 2.4 * len(models)),
        squeeze=False,
    )
    panels = [(model, scheme) for model in models for scheme in schemes]
    markers = {
        "uniform": "s",
        "plan": "o",
        ROUTING: "P",
        WITH_HEAD: "*",
        "AutoScheme": "^",
        "W4A16_MIXED": "D",
        "attention first": "v",
    }
    for axis, panel in zip(axes.flat, panels, strict=True):
        for key_, row in table.items():
            if key_[:2] != panel:
                continue
            _, _, _, way, recipe = key_
            axis.plot(
                statistics.mean(row.mebibytes),
                statistics.mean(row.kl),
                markers.get(way, "x"),
                color="tab:blue" if recipe == "default" else "tab:orange",
                label=f"{way}, {recipe}",
                fillstyle="full" if way == "plan" else "none",
            )
        low, high = axis.get_xlim()
        middle, half = (low + high) / 2, max(high - low, 0.06 * high) / 2
        axis.set_xlim(middle - half, middle + half)  # ways may have the same bytes
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(" ".join(panel), fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("export, MiB", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("KL to full precision, nats", fontsize=8)
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        fontsize=6,
        loc="outside lower center",
        ncols=4,
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
