# SPDX-License-Identifier: Apache-2.0
"""How the routing of a token changed, from full-precision ranks alone.

A quantized model chooses K experts, best first. Each has a rank in full precision, from
0 for the best to E - 1, and every routing metric follows from these K ranks: an expert
of rank >= K is injected, and the ranks below K that are missing are dropped.

Shapes: T tokens, E experts, K top-k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsraq.routers import BoundRouter


def expert_ranks(router: BoundRouter, logits: Tensor) -> Tensor:
    """Compute the rank of every expert, 0 for the first that the router chooses.

    Args:
        router: The router.
        logits: Its raw logits, (T, E).

    Returns:
        (T, E), uint8 where E <= 256, else int16.

    Raises:
        ValueError: The router follows no known rule.
    """
    experts = logits.shape[-1]
    order = router.ranking(logits)
    positions = torch.arange(experts, device=logits.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, positions)
    chosen = router.select(logits)
    # of equal scores, `select` may take others than `ranking` puts first
    differs = (ranks.gather(-1, chosen) != positions[:, : router.top_k]).any(-1)
    if differs.any():
        ranks[differs] = _ranks_after(chosen[differs], order[differs])
    return ranks.to(torch.uint8 if experts <= 256 else torch.int16)


def _ranks_after(chosen: Tensor, order: Tensor) -> Tensor:
    """Rank the chosen experts first, and the others in their order."""
    top_k, experts = chosen.shape[-1], order.shape[-1]
    ranks = torch.full_like(order, -1)
    ranks.scatter_(
        -1, chosen, torch.arange(top_k, device=order.device).expand_as(chosen)
    )
    others = order[ranks.gather(-1, order) < 0].view(len(order), -1)
    rest = torch.arange(top_k, experts, device=order.device)
    return ranks.scatter_(-1, others, rest.expand_as(others))


class RoutingChange(NamedTuple):
    """What quantization did to the choice of one router, for each of T tokens.

    Attributes:
        jaccard: Overlap of the chosen sets (VSRAQ Eq. 18), a fraction.
        routing_shift: 1 - RBO / (1 - p^K) (SRA Eq. 3-5), a fraction.
        weights_only: 1 where the same experts come in the same order (SRA Fig. 1a).
        order_shift: 1 where the same experts come in another order (SRA Fig. 1b).
        drop_inject: 1 where another expert is chosen (SRA Fig. 1c).
        injected: How many others are.
        inside_2k: How many of these are among the 2K best in full precision.
        inside_3k: How many are among the 3K best.
    """

    jaccard: Tensor
    routing_shift: Tensor
    weights_only: Tensor
    order_shift: Tensor
    drop_inject: Tensor
    injected: Tensor
    inside_2k: Tensor
    inside_3k: Tensor


def routing_change(q_ranks: Tensor, *, p: float = 0.9) -> RoutingChange:
    """Compute every routing metric of one router.

    Args:
        q_ranks: Full-precision ranks, from 0, of the experts that the quantized model
            chooses, best first, (T, K).
        p: Weight of a rank against the one before it in the routing shift.

    Returns:
        Float32, (T,) each.
    """
    top_k = q_ranks.shape[-1]
    place = torch.arange(top_k, device=q_ranks.device)
    kept = q_ranks < top_k
    shared = kept.sum(-1)
    same_order = (q_ranks == place).all(-1)
    same_set = shared == top_k
    # A place j with rank r is in both of the first d experts from d = max(j, r) + 1 on.
    weight = _overlap_weights(top_k, p).to(q_ranks.device)
    both_from = torch.maximum(q_ranks, place).clamp(max=top_k)
    shift = (weight[place] - weight[both_from]).sum(-1)
    return RoutingChange(
        jaccard=shared.float() / (2 * top_k - shared),
        routing_shift=shift.clamp(max=1),
        weights_only=same_order.float(),
        order_shift=(same_set & ~same_order).float(),
        drop_inject=(~same_set).float(),
        injected=(top_k - shared).float(),
        inside_2k=(~kept & (q_ranks < 2 * top_k)).sum(-1).float(),
        inside_3k=(~kept & (q_ranks < 3 * top_k)).sum(-1).float(),
    )


def _overlap_weights(top_k: int, p: float) -> Tensor:
    """What an expert adds to RBO / (1 - p^K), by the place from which both have it.

    Returns:
        (K + 1,): the sum over d > place of p^(d-1) (1 - p) / (1 - p^K) / d; 0 last.
    """
    depth = torch.arange(1, top_k + 1, dtype=torch.float64)
    terms = p ** (depth - 1) * ((1 - p) / (1 - p**top_k)) / depth
    from_place = terms.flip(0).cumsum(0).flip(0)
    return torch.cat((from_place, torch.zeros(1, dtype=torch.float64))).float()


def rank_counts(q_ranks: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Count the ranks of dropped and of injected experts (SRA Fig. 2 and 6).

    Args:
        q_ranks: As in `routing_change`, (T, K).
        experts: E.

    Returns:
        Dropped experts by rank, (K,), and injected ones by rank from K on, (E - K,).
    """
    tokens, top_k = q_ranks.shape
    counts = torch.bincount(q_ranks.flatten(), minlength=experts)
    return tokens - counts[:top_k], counts[top_k:]
