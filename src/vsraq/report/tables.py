# SPDX-License-Identifier: Apache-2.0
"""The tables of the report: methods by metrics, layers by metrics, tuned blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vsraq.report.figures.expert_load import load_moved
from vsraq.report.figures.tuning_curves import kept, loss_terms
from vsraq.report.schema import Interval, Results, Run, RunRouter
from vsraq.report.wording import fixed, interval, number, overlap


class Metric(NamedTuple):
    """A row of the headline table.

    Attributes:
        key: Its name in the file.
        label: Its name for people.
        unit: Its unit, or empty.
        meaning: What it is, in a few words.
        factor: What the file's number is multiplied with.
        decimals: How many are written.
        ideal: Full precision's value, in the file's unit; None if none is best.
    """

    key: str
    label: str
    unit: str
    meaning: str
    factor: float = 1.0
    decimals: int = 3
    ideal: float | None = 0.0


class Cell(NamedTuple):
    """A cell.

    Attributes:
        text: What is written.
        ends: The ends of the interval, or empty.
        best: Whether it is the best of its row.
        tied: Whether its interval overlaps with that of the best.
        value: What is sorted by, or None.
    """

    text: str
    ends: str = ""
    best: bool = False
    tied: bool = False
    value: float | str | None = None


class Row(NamedTuple):
    """A row of the headline table."""

    metric: Metric
    fp: str
    cells: Sequence[Cell]


class SortableTable(NamedTuple):
    """A table whose columns can be sorted."""

    columns: Sequence[tuple[str, str]]  # head, and what it means
    rows: Sequence[Sequence[Cell]]


OUTPUT = (
    Metric(
        "perplexity", "Perplexity", "", "exp of the mean next-token NLL", ideal=None
    ),
    Metric(
        "excess_nll", "Excess NLL", "1e-3 nats", "NLL beyond full precision", 1e3, 2
    ),
    Metric("kl", "KL", "1e-3 nats", "of the next-token distributions", 1e3, 2),
    Metric("jsd", "JSD", "1e-3 nats", "of the next-token distributions", 1e3, 2),
    Metric("sampled_jsd", "Sampled-JSD", "1e-3 nats", "of what is sampled", 1e3, 2),
    Metric("top1_agreement", "Same top token", "%", "as full precision", 100, 2, 1.0),
)
ROUTING = (
    Metric("jaccard", "Jaccard", "", "overlap of selected experts", 1, 4, 1.0),
    Metric("routing_shift", "Routing shift", "", "1 - rank-biased overlap", 1, 4),
    Metric("drop_inject", "Experts replaced", "%", "of token and layer pairs", 100, 2),
    Metric("order_shift", "Only order shifted", "%", "of the pairs", 100, 2, None),
    Metric("weights_only", "Only weights moved", "%", "of the pairs", 100, 2, None),
    Metric("inside_2k", "Injected inside 2K", "%", "of injected experts", 100, 1, None),
    Metric("inside_3k", "Injected inside 3K", "%", "of injected experts", 100, 1, None),
)
REGIONS = (
    Metric("region_a", "A: output only", "%", "of tokens", 100, 1, None),
    Metric("region_b", "B: both", "%", "of tokens", 100, 1),
    Metric("region_c", "C: neither", "%", "of tokens", 100, 1, 1.0),
    Metric("region_d", "D: routing only", "%", "of tokens", 100, 1, None),
)


def headline(results: Results) -> Mapping[str, Sequence[Row]]:
    """Return the headline table: rows by group.

    Args:
        results: The comparison.
    """
    fp = fixed(results.full_precision.perplexity.value)
    rows = {
        group: [_row(results, metric, fp) for metric in metrics]
        for group, metrics in (
            ("Output", OUTPUT),
            ("Routing", ROUTING),
            ("Tokens that change", REGIONS),
        )
    }
    return rows | {"Cost": _cost(results)}


def _row(results: Results, metric: Metric, perplexity: str) -> Row:
    found = [m.metrics[metric.key] for m in results.methods.values()]
    # of perplexity, the nearest to full precision is that of the least excess NLL
    ideal = metric.ideal
    if metric.key == "perplexity":
        ideal = results.full_precision.perplexity.value
    best = _nearest(found, ideal) if len(found) > 1 else None
    cells = [
        Cell(
            fixed(
                None if i.value is None else metric.factor * i.value, metric.decimals
            ),
            interval(i, metric.factor, metric.decimals),
            best=best is not None and i.value == best.value,
            tied=best is not None and i.value != best.value and overlap(i, best),
        )
        for i in found
    ]
    if metric.key == "perplexity":
        fp = perplexity
    elif metric.ideal is None:
        fp = ""
    else:
        fp = fixed(metric.factor * metric.ideal, 0)
    return Row(metric, fp, cells)


def _nearest(found: Sequence[Interval], ideal: float | None) -> Interval | None:
    values = [i for i in found if i.value is not None]
    if ideal is None or not values:
        return None
    return min(values, key=lambda i: abs((i.value or 0.0) - ideal))


def _cost(results: Results) -> list[Row]:
    fp, methods = results.full_precision, results.methods.values()
    return [
        Row(
            Metric("mebibytes", "Size", "MiB", "of all tensors"),
            fixed(fp.mebibytes, 2),
            [Cell(fixed(method.mebibytes, 2)) for method in methods],
        ),
    ]


_OF_LAYERS: Sequence[tuple[str, str, str, float, int]] = (
    ("jaccard", "Jaccard", "overlap of selected experts", 1, 4),
    ("routing_shift", "Shift", "routing shift: 1 - rank-biased overlap", 1, 4),
    ("drop_inject", "Replaced, %", "tokens with another set of experts", 100, 2),
    (
        "order_shift",
        "Order, %",
        "tokens with the same experts in another order",
        100,
        2,
    ),
    ("inside_2k", "In 2K, %", "injected experts of rank 2K or better", 100, 1),
    ("inside_3k", "In 3K, %", "injected experts of rank 3K or better", 100, 1),
)


def per_layer(results: Results) -> SortableTable:
    """Return a row per layer and method.

    Args:
        results: The comparison.
    """
    columns = [
        ("Layer", "decoder block"),
        ("Method", ""),
        *((label, meaning) for _, label, meaning, _, _ in _OF_LAYERS),
        ("Load moved, %", "choices that another expert gets"),
        ("Idle", "experts without a token"),
    ]
    rows = []
    for index, fp in enumerate(results.layers):
        for name, method in results.methods.items():
            q = method.layers[index]
            moved = 100 * load_moved(q.load, fp.load)
            rows.append(
                [
                    Cell(str(fp.block), fp.name, value=fp.block),
                    Cell(name, value=name),
                    *(
                        _layer_cell(q.metrics[key], f, d)
                        for key, _, _, f, d in _OF_LAYERS
                    ),
                    Cell(fixed(moved, 2), value=moved),
                    Cell(str(q.load.count(0)), value=q.load.count(0)),
                ]
            )
    return SortableTable(columns, rows)


def _layer_cell(found: Interval, factor: float, decimals: int) -> Cell:
    value = None if found.value is None else factor * found.value
    return Cell(fixed(value, decimals), interval(found, factor, decimals), value=value)


def per_block(run: Run) -> SortableTable:
    """Return a row per tuned block.

    Args:
        run: A run's record.
    """
    terms = loss_terms(run)
    columns: list[tuple[str, str]] = [
        ("Block", ""),
        ("Seconds", "its tuning"),
        ("Kept", "the iteration that was kept"),
        *((f"{term}, %", f"change of the {term} loss") for term in terms),
        ("Logit error", "of the router, after its re-fit if that was kept"),
        ("Jaccard", "of the router, after its re-fit if that was kept"),
    ]
    rows = []
    for place, block in enumerate(run.blocks):
        cells = [
            Cell(block.name, value=place),
            _plain(block.seconds, lambda v: fixed(v, 1)),
            _plain(block.best_iteration, lambda v: fixed(v, 0)),
        ]
        for term in terms:
            change = kept(block, block.losses.get(term, ()) or (0.0,))
            percents = None if change is None else 100 * (change - 1)
            cells.append(_plain(percents, lambda v: fixed(v, 1)))
        router = block.routers[0] if block.routers else RunRouter(name="")
        for pair, digits in ((router.logit_error, 3), (router.jaccard, 4)):
            cells.append(_pair(pair, router.refit, digits))
        rows.append(cells)
    return SortableTable(columns, rows)


def _plain(value: float | None, write: Callable[[float | None], str]) -> Cell:
    return Cell(write(value), value=value)


def _pair(pair: Any, kept_refit: bool, digits: int) -> Cell:
    """What a router has now; what it had before, or would have, is for the pointer."""
    now, other = (pair or (None, None))[:: -1 if kept_refit else 1]
    if now is None:
        return Cell(number(None))
    said = "before the re-fit" if kept_refit else "the re-fit was not kept"
    ends = "" if other is None else f"{said}: {number(other, digits)}"
    return Cell(number(now, digits), ends, value=now)
