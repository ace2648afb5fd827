# SPDX-License-Identifier: Apache-2.0
"""What to look at first in a comparison: sentences from its numbers."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from vsraq.report.figures.expert_load import load_moved, relative_load
from vsraq.report.figures.ranks import injected_ranks
from vsraq.report.schema import MethodResult, Replay, Results
from vsraq.report.wording import (
    counted,
    fixed,
    listed,
    mean,
    number,
    overlap,
    percent,
)

_WORTH = 0.02  # of the load: below, its moves are not worth a sentence


class Finding(NamedTuple):
    """One thing to look at.

    Attributes:
        headline: In a few words.
        text: The numbers behind it.
        advice: What can be done about it; may be empty.
    """

    headline: str
    text: str
    advice: str = ""


def compared(results: Results, replay: Replay | None) -> list[Finding]:
    """Return what to look at first in a comparison.

    Layers, ranks and load are those of the method whose output is nearest to full
    precision (the least KL).

    Args:
        results: The comparison.
        replay: A replay of the same folder, or None.
    """
    best = nearest(results, "kl")
    method = results.methods[best]
    found = [*_best_method(results, best), *_worst_layer(results, best)]
    found += [*_injected(results, best), *_regions(method, best)]
    if replay is not None and replay.chosen:
        found.append(replayed(replay))
    found += [*_idle_experts(results, best), *_moved_load(results, best)]
    return [*found, *_perplexity(results)]


def nearest(results: Results, metric: str, wanted: float = 0.0) -> str:
    """The method whose metric is nearest to a value."""

    def distance(name: str) -> float:
        value = results.methods[name].metrics[metric].value
        return float("inf") if value is None else abs(value - wanted)

    return min(results.methods, key=distance)


def _best_method(results: Results, best: str) -> Iterator[Finding]:
    methods = results.methods
    kl = {name: m.metrics["kl"] for name, m in methods.items()}
    routed = nearest(results, "jaccard", 1.0)
    if len(methods) == 1:
        jaccard = methods[best].metrics["jaccard"].value
        yield Finding(
            f"{best} keeps {percent(jaccard, 1)} of the routing",
            f"Mean Jaccard {fixed(jaccard)}; its output is {number(kl[best].value)} "
            "nats of KL away from full precision.",
        )
        return
    others = sorted((n for n in methods if n != best), key=lambda n: kl[n].value or 0.0)
    second = others[0]
    tied = overlap(kl[best], kl[second])
    routing = {name: m.metrics["jaccard"] for name, m in methods.items()}
    rest = max((n for n in methods if n != routed), key=lambda n: routing[n].value or 0)
    alike = overlap(routing[routed], routing[rest])
    intervals = ", with intervals that overlap"
    text = (
        f"KL {number(kl[best].value)} nats, against {number(kl[second].value)} of "
        f"{second}{intervals if tied else ''}. {routed} keeps most of the routing: "
        f"mean Jaccard {fixed(routing[routed].value)}, against "
        f"{fixed(routing[rest].value)} of {rest}{intervals if alike else ''}."
    )
    yield Finding(
        f"{best} and {second} are about as near to full precision"
        if tied
        else f"{best} is nearest to full precision",
        text,
        "To tell them apart, compare on more text." if tied else "",
    )


def _worst_layer(results: Results, best: str) -> Iterator[Finding]:
    found = results.methods[best].layers
    values = [layer.metrics["jaccard"].value or 0.0 for layer in found]
    if len(values) < 2 or min(values) == max(values):
        return
    worst = min(range(len(values)), key=values.__getitem__)
    drops = [a - b for a, b in itertools.pairwise(values)]
    step = max(range(len(drops)), key=drops.__getitem__)
    blocks = [layer.block for layer in results.layers]
    text = (
        f"Jaccard {fixed(values[worst])}, against {fixed(mean(values))} in the mean "
        f"of {len(values)} layers ({best})."
    )
    if drops[step] > 0:
        text += (
            f" The largest step down is from layer {blocks[step]} to layer "
            f"{blocks[step + 1]}: {fixed(drops[step])}."
        )
    yield Finding(
        f"Layer {blocks[worst]} loses most",
        text,
        "Bits in the layers before it help most; `vsraq plan` finds which.",
    )


def _injected(results: Results, best: str) -> Iterator[Finding]:
    share = results.methods[best].metrics["inside_3k"].value
    near = results.methods[best].metrics["inside_2k"].value
    if share is None:
        return
    low = share < 0.8
    yield Finding(
        f"{percent(share)} of injected experts come from {injected_ranks(results, 3)}",
        f"{percent(near)} come from {injected_ranks(results, 2)} ({best}). "
        + (
            "Many come from far behind, so the router's inputs have moved a lot."
            if low
            else "These were near misses in full precision."
        ),
        "More bits, or a re-fit of the routers, help more than a router loss."
        if low
        else "Router losses that read the first 3K ranks see nearly all of them.",
    )


def _regions(method: MethodResult, best: str) -> Iterator[Finding]:
    a, b, d = (method.metrics[f"region_{region}"].value or 0.0 for region in "abd")
    if not a + b + d:
        return
    moved = b + d
    if moved and d / moved > 0.5:
        headline = f"Most routing changes do not reach the output: {percent(d / moved)}"
        advice = "Token selection aligns only the tokens that matter."
    elif b >= a:
        headline = f"{percent(b)} of the tokens change in routing and in output"
        advice = "These are the tokens that better routing can mend."
    else:
        headline = f"{percent(a)} of the tokens change in output, not in routing"
        advice = "There the weights are at fault, not the routers: more bits help."
    yield Finding(
        headline,
        f"Both change in {percent(b, 1)} of the tokens (B), only the routing in "
        f"{percent(d, 1)} (D), only the output in {percent(a, 1)} (A) ({best}).",
        advice,
    )


def replayed(replay: Replay) -> Finding:
    """Say what better routing could mend; some token was chosen."""
    before, after = (r["sampled_jsd"].value for r in (replay.before, replay.after))
    change = "" if not before or after is None else percent(after / before - 1)
    of_region = f" of region {replay.region}"
    where = {"all": "", "mask": " of the mask"}.get(replay.region, of_region)
    return Finding(
        f"With the right experts, {percent(replay.improved.value)} of the tokens"
        f"{where} come closer",
        f"Their mean Sampled-JSD goes from {number(before)} to {number(after)} nats "
        f"({change}), in {replay.method}. That is the most that better routing alone "
        "could mend.",
    )


def _idle_experts(results: Results, best: str) -> Iterator[Finding]:
    lost = [
        f"{expert} in layer {fp.block}"
        for fp, q in zip(results.layers, results.methods[best].layers, strict=True)
        for expert, (before, after) in enumerate(zip(fp.load, q.load, strict=True))
        if before and not after
    ]
    never = sum(layer.load.count(0) for layer in results.layers)
    if lost:
        yield Finding(
            f"{counted(len(lost), 'expert')} that full precision uses got no token",
            f"Expert {listed(lost)} ({best}).",
        )
    if never:
        total = sum(len(layer.load) for layer in results.layers)
        yield Finding(
            f"This text never reaches {never:,} of {total:,} experts",
            "In full precision no token chose them, so nothing is known about them "
            "here.",
            "Compare on more text, or on other text.",
        )


def _moved_load(results: Results, best: str) -> Iterator[Finding]:
    pairs = list(zip(results.layers, results.methods[best].layers, strict=True))
    moved = [load_moved(q.load, fp.load) for fp, q in pairs]
    worst = max(range(len(moved)), key=moved.__getitem__)
    if moved[worst] < _WORTH:
        return
    fp, q = pairs[worst]
    before, after = relative_load(fp.load), relative_load(q.load)
    expert = max(range(len(after)), key=lambda e: abs(after[e] - before[e]))
    yield Finding(
        f"{percent(moved[worst], 1)} of the load of layer {fp.block} goes to other "
        "experts",
        f"Expert {expert} changes most: from {fixed(before[expert], 2)} to "
        f"{fixed(after[expert], 2)} times the even share ({best}).",
    )


def _perplexity(results: Results) -> Iterator[Finding]:
    excess = {name: m.metrics["excess_nll"] for name, m in results.methods.items()}
    alike = [
        name
        for name, i in excess.items()  # one sequence has no interval
        if i.low is not None and i.high is not None and i.low <= 0 <= i.high
    ]
    below = [n for n, i in excess.items() if (i.value or 0) < 0 and n not in alike]
    judge = "Judge by KL and Sampled-JSD, which any difference makes larger."
    if below:
        yield Finding(
            f"The perplexity of {listed(below)} is lower than that of full precision",
            "That is no sign of a better model: the output is another one.",
            judge,
        )
    if alike:
        yield Finding(
            f"Perplexity cannot tell {listed(alike)} from full precision",
            "The interval of the NLL beyond full precision has 0 in it, so a "
            "comparison by perplexity would say nothing.",
            judge,
        )
