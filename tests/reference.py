# SPDX-License-Identifier: Apache-2.0
"""Slow loop twins of our losses and metrics: the papers' formulas, token by token."""

import math

import numpy as np


def _order(fp):
    return sorted(range(len(fp)), key=lambda e: (-fp[e], e))


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def topk_mse(q, fp, *, top_k, multiplier=1):
    m = len(fp) if multiplier == "all" else min(multiplier * top_k, len(fp))
    first = _order(fp)[:m]
    return sum((q[e] - fp[e]) ** 2 for e in first) / m


def sigmoid_aware_mse(q, fp, *, top_k, gamma=1.0, eps=1e-3):
    total = 0.0
    for e in _order(fp)[:top_k]:
        p = _sigmoid(fp[e])
        total += ((p * (1 - p)) ** gamma + eps) * (_sigmoid(q[e]) - p) ** 2
    return total / top_k


def rank(q, fp, *, top_k, margin=0.0):
    if top_k == 1:
        return 0.0
    order = _order(fp)
    total = 0.0
    for i in range(top_k - 1):
        total += _softplus(margin - (q[order[i]] - q[order[i + 1]]))
    return total / (top_k - 1)


def margin(q, fp, *, top_k, boundary=1):
    order = _order(fp)
    last = order[top_k - 1]
    near = order[top_k : top_k + boundary]
    if not near:
        return 0.0
    return sum(((q[last] - q[e]) - (fp[last] - fp[e])) ** 2 for e in near) / len(near)


def pairwise_margin(q, fp, *, top_k, boundary=1):
    near = _order(fp)[: top_k + boundary]
    pairs = [(i, j) for n, i in enumerate(near) for j in near[n + 1 :]]
    if not pairs:
        return 0.0
    return sum(((q[i] - q[j]) - (fp[i] - fp[j])) ** 2 for i, j in pairs) / len(pairs)


def router_kl(q, fp, *, top_m=None):
    first = _order(fp)[:top_m]
    q_sum = sum(math.exp(q[e]) for e in first)
    fp_sum = sum(math.exp(fp[e]) for e in first)
    total = 0.0
    for e in first:
        p = math.exp(fp[e]) / fp_sum
        total += p * (math.log(p) - math.log(math.exp(q[e]) / q_sum))
    return total


def vsraq(
    q,
    fp,
    *,
    top_k,
    boundary=1,
    alpha=0.3,
    gamma=1.0,
    eps=1e-3,
    rank_margin=0.0,
    rank_weight=0.01,
    margin_weight=0.05,
):
    return (
        (1 - alpha) * topk_mse(q, fp, top_k=top_k)
        + alpha * sigmoid_aware_mse(q, fp, top_k=top_k, gamma=gamma, eps=eps)
        + rank_weight * rank(q, fp, top_k=top_k, margin=rank_margin)
        + margin_weight * margin(q, fp, top_k=top_k, boundary=boundary)
    )


def jaccard(q_selected, fp_selected):
    q, fp = set(q_selected), set(fp_selected)
    return len(q & fp) / len(q | fp)


def mse_kl(q, fp, *, kl_weight=1.0, top_m=None):
    mse = sum((a - b) ** 2 for a, b in zip(q, fp, strict=True)) / len(fp)
    return mse + kl_weight * router_kl(q, fp, top_m=top_m)


def routing_shift(q_selected, fp_selected, p=0.9):
    k = len(fp_selected)
    rbo = 0.0
    for d in range(1, k + 1):
        overlap = len(set(q_selected[:d]) & set(fp_selected[:d])) / d
        rbo += (1 - p) * p ** (d - 1) * overlap
    return 1 - rbo / (1 - p**k)


def candidates(logits, temperature, top_k, top_p):
    """{token: probability} of what one model would sample from, in float64."""
    scores = {v: z / temperature for v, z in enumerate(logits) if z > -math.inf}
    if top_k:
        lowest = sorted(scores.values(), reverse=True)[:top_k][-1]
        scores = {v: s for v, s in scores.items() if s >= lowest}
    p = softmax(scores)
    if top_p is not None and top_p < 1:
        kept, mass = [], 0.0
        for v in sorted(p, key=lambda v: -p[v]):
            if mass >= top_p:
                break
            kept.append(v)
            mass += p[v]
        p = softmax({v: scores[v] for v in kept})
    return p


def softmax(scores):
    highest = max(scores.values())
    total = sum(np.exp(np.float64(s) - highest) for s in scores.values())
    return {v: np.exp(np.float64(s) - highest) / total for v, s in scores.items()}


def divergence(q, fp):
    total = 0.0
    for v in q.keys() | fp.keys():
        a, b = q.get(v, 0.0), fp.get(v, 0.0)
        m = (a + b) / 2
        total += (a * np.log(a / m) if a else 0) + (b * np.log(b / m) if b else 0)
    return total / 2


def jsd(q, fp):
    return divergence(candidates(q, 1.0, None, None), candidates(fp, 1.0, None, None))


def sampled_jsd(q, fp, *, temperature=0.6, top_k=20, top_p=0.95):
    values = (temperature, top_k, top_p)
    return divergence(candidates(q, *values), candidates(fp, *values))


def logits_of(ranked):
    """The logits in the order of the experts, of which all ranks were kept."""
    logits = ranked.values.new_full(ranked.shape, math.nan)
    return logits.scatter_(-1, ranked.indices.long(), ranked.values)
