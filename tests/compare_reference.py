# SPDX-License-Identifier: Apache-2.0
"""The slow twin of `vsraq.compare`: every figure, token by token, in plain Python."""

import math

import numpy as np
import torch

import reference
from vsraq.capture import RouterCapture
from vsraq.routers import BoundRouter, find_routers


@torch.no_grad()
def passes(model, sequences):
    """Each sequence: output logits, and every router's experts, best first."""
    routers = find_routers(model)
    for ids in sequences:
        with RouterCapture(model, routers) as capture:
            logits = model(input_ids=ids[None]).logits[0].double().tolist()
            raw = capture.take()
        order = {}
        for router in routers:
            bound: BoundRouter = router.bind(model)
            order[router.name] = bound.ranking(raw[router.name][0]).tolist()
        yield logits, order


def change(q_order, fp_order, top_k):
    """What happened to the choice of one token."""
    q, fp = q_order[:top_k], fp_order[:top_k]
    injected = [fp_order.index(e) for e in q if e not in fp]
    return {
        "jaccard": reference.jaccard(q, fp),
        "routing_shift": reference.routing_shift(q, fp),
        "weights_only": float(q == fp),
        "order_shift": float(q != fp and set(q) == set(fp)),
        "drop_inject": float(set(q) != set(fp)),
        "injected": len(injected),
        "inside_2k": sum(rank < 2 * top_k for rank in injected),
        "inside_3k": sum(rank < 3 * top_k for rank in injected),
        "dropped_ranks": [fp_order.index(e) for e in fp if e not in q],
        "injected_ranks": injected,
    }


def outputs(q, fp, following, sampling):
    """What happened to the output of one token; `following` may be None."""
    q_p, fp_p = (reference.softmax(dict(enumerate(z))) for z in (q, fp))
    found = {
        "kl": sum(p * math.log(p / q_p[v]) for v, p in fp_p.items() if p > 0),
        "jsd": reference.jsd(q, fp),
        "sampled_jsd": reference.sampled_jsd(q, fp, **sampling),
        "top1_agreement": float(np.argmax(q) == np.argmax(fp)),
    }
    if following is not None:
        found["q_nll"], found["fp_nll"] = (-math.log(p[following]) for p in (q_p, fp_p))
    return found


def region(sampled_jsd, routing_shift, thresholds):
    output = sampled_jsd > thresholds["sampled_jsd"]
    routing = routing_shift > thresholds["routing_shift"]
    if output:
        return "region_b" if routing else "region_a"
    return "region_d" if routing else "region_c"


def tokens(q_model, fp_model, sequences, sampling, thresholds):
    """[{metric: value, "layers": {name: change}, "sequence": i}] of every token."""
    routers = find_routers(fp_model)
    found = []
    both = zip(
        sequences, passes(q_model, sequences), passes(fp_model, sequences), strict=True
    )
    for number, (ids, (q, q_order), (fp, fp_order)) in enumerate(both):
        for place in range(len(ids)):
            last = place + 1 == len(ids)
            token = outputs(
                q[place], fp[place], None if last else int(ids[place + 1]), sampling
            )
            token["layers"] = {
                r.name: change(q_order[r.name][place], fp_order[r.name][place], r.top_k)
                for r in routers
            }
            shifts = [c["routing_shift"] for c in token["layers"].values()]
            token["routing_shift"] = sum(shifts) / len(shifts)
            token["region"] = region(
                token["sampled_jsd"], token["routing_shift"], thresholds
            )
            token["load"] = {
                r.name: (
                    q_order[r.name][place][: r.top_k],
                    fp_order[r.name][place][: r.top_k],
                )
                for r in routers
            }
            found.append(token | {"sequence": number})
    return found


def _mean(values):
    return sum(values) / len(values)


def layer_metrics(changes):
    """The metrics of some (token, layer) pairs."""
    injected = sum(c["injected"] for c in changes)
    found = {
        name: _mean([c[name] for c in changes])
        for name in ("jaccard", "routing_shift", "weights_only")
    }
    for name in ("order_shift", "drop_inject"):
        found[name] = _mean([c[name] for c in changes])
    for name in ("inside_2k", "inside_3k"):
        inside = sum(c[name] for c in changes)
        found[name] = inside / injected if injected else None
    return found


def metrics(found):
    """All metrics of a method over tokens."""
    predicted = [t for t in found if "q_nll" in t]
    result = {
        "perplexity": math.exp(_mean([t["q_nll"] for t in predicted])),
        "excess_nll": _mean([t["q_nll"] - t["fp_nll"] for t in predicted]),
    }
    for name in ("kl", "jsd", "sampled_jsd", "top1_agreement"):
        result[name] = _mean([t[name] for t in found])
    result |= layer_metrics([c for t in found for c in t["layers"].values()])
    for letter in "abcd":
        name = f"region_{letter}"
        result[name] = _mean([float(t["region"] == name) for t in found])
    return result


def histogram(values, edges):
    """Counts, below, above."""
    counts, below, above = [0] * (len(edges) - 1), 0, 0
    for value in values:
        if value < edges[0]:
            below += 1
        elif value > edges[-1]:
            above += 1
        else:
            last = len(counts) - 1
            counts[
                next((i for i in range(last) if edges[i] <= value < edges[i + 1]), last)
            ] += 1
    return counts, below, above


def percentile_interval(values, statistic, seed, resamples=2000):
    """A bootstrap over sequences by hand, with numpy's own draws."""
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        picked = generator.integers(0, len(values), len(values))
        drawn.append(statistic([values[i] for i in picked]))
    return np.percentile(drawn, [2.5, 97.5])
