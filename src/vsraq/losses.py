# SPDX-License-Identifier: Apache-2.0
"""Router-alignment losses, one value per token.

Shapes: T tokens, E experts, K = the router's top-k. Every function takes the
quantized model's raw router logits first and the full-precision ones second,
`(..., E) x (..., E) -> (...)`, and reduces nothing but the expert axis. `pi` sorts the
experts by full-precision logit, highest first; ties go to the lower index. The math
runs in float32 (float64 for float64 input) and is differentiable in `q_logits`.

`fp_logits` may be a `RankedLogits` instead of the full tensor: the first m ranks only,
which is all that most losses read and far less to store per calibration token.

Names are those of `vsraq.OBJECTIVES`; call them as `losses.margin(...)`.
Sources: "VSRAQ" is arXiv:2606.05688, "SRA" is Selective Router Alignment.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from vsraq.hyperparameters import check_hyperparameters
from vsraq.ranks import FpLogits, computed, rank_logits

TokenLoss: TypeAlias = Callable[..., Tensor]


def topk_mse(
    q_logits: Tensor,
    fp_logits: FpLogits,
    *,
    top_k: int,
    multiplier: int | Literal["all"] = 1,
) -> Tensor:
    """Compute the squared logit error over the first m = min(multiplier * K, E) ranks.

    (1/m) sum_{i<=m} (zq_pi(i) - zf_pi(i))^2: VSRAQ Eq. 7 with `multiplier=1`, SRA Eq. 9
    with 3, every expert with "all". Units: logits squared.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or at least m ranks.
        top_k: K, from 1 to E.
        multiplier: How many times K ranks count, a positive int or "all".

    Returns:
        (...), >= 0, zero where the first m logits agree.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(top_k=top_k, multiplier=multiplier)
    m = multiplied_ranks(top_k, _num_experts(q_logits, top_k), multiplier)
    q, fp = _by_rank(q_logits, fp_logits, m)
    return (q - fp).square().mean(-1)


def sigmoid_aware_mse(
    q_logits: Tensor,
    fp_logits: FpLogits,
    *,
    top_k: int,
    gamma: float = 1.0,
    eps: float = 1e-3,
) -> Tensor:
    """Compute the squared error of sigmoid scores, most where the sigmoid is steep.

    (1/K) sum_{i<=K} w_i (s(zq_pi(i)) - s(zf_pi(i)))^2 with s the sigmoid and
    w_i = (p_i (1 - p_i))^gamma + eps, p_i = s(zf_pi(i)): VSRAQ Eq. 8-10.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or at least K ranks.
        top_k: K, from 1 to E.
        gamma: Exponent of the steepness, >= 0.
        eps: Weight that saturated scores keep, >= 0.

    Returns:
        (...), >= 0, zero where the first K logits agree.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(top_k=top_k, gamma=gamma, eps=eps)
    _num_experts(q_logits, top_k)
    q, fp = _by_rank(q_logits, fp_logits, top_k)
    p = fp.sigmoid()
    weight = (p * (1 - p)).pow(gamma) + eps
    return (weight * (q.sigmoid() - p).square()).mean(-1)


def rank(
    q_logits: Tensor, fp_logits: FpLogits, *, top_k: int, margin: float = 0.0
) -> Tensor:
    """Keep the order of the selected experts.

    1/(K-1) sum_{i<K} softplus(margin - (zq_pi(i) - zq_pi(i+1))): VSRAQ Eq. 13. Reads
    only the order of `fp_logits`; it does not vanish when the logits agree. Among the
    first K experts the order is that of the logits, even if the ranking is another: the
    loss must not pull the logits away from those of full precision.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or at least K ranks.
        top_k: K, from 1 to E. K = 1 has no pair and gives 0.
        margin: Gap in logits below which a neighbour pair costs more.

    Returns:
        (...), >= 0.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(top_k=top_k, margin=margin)
    _num_experts(q_logits, top_k)
    q, fp = _by_rank(q_logits, fp_logits, top_k)
    q = q.gather(-1, fp.argsort(dim=-1, descending=True, stable=True))
    gaps = q[..., :-1] - q[..., 1:]
    return F.softplus(margin - gaps).sum(-1) / max(top_k - 1, 1)


def margin(
    q_logits: Tensor, fp_logits: FpLogits, *, top_k: int, boundary: int = 1
) -> Tensor:
    """Keep the margins between the last selected and the nearest unselected experts.

    (1/b) sum_{j<=b} (dq_j - df_j)^2 with d_j = z_pi(K) - z_pi(K+j): VSRAQ Eq. 14-15.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or the first K+b ranks.
        top_k: K, from 1 to E.
        boundary: b >= 1. Where K + b > E, the mean runs over the experts that exist;
            K = E has none and gives 0.

    Returns:
        (...), >= 0, zero where the margins agree. A constant shift of the logits
        changes nothing. Units: logits squared.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(top_k=top_k, boundary=boundary)
    m = boundary_ranks(top_k, _num_experts(q_logits, top_k), boundary)
    q, fp = _by_rank(q_logits, fp_logits, m)
    error = q - fp
    difference = error[..., top_k - 1 : top_k] - error[..., top_k:]
    return difference.square().sum(-1) / max(m - top_k, 1)


def pairwise_margin(
    q_logits: Tensor, fp_logits: FpLogits, *, top_k: int, boundary: int = 1
) -> Tensor:
    """Keep every margin among the selected and the nearest unselected experts.

    Mean over pairs i < j of the first m = min(K + b, E) ranks of
    ((zq_i - zq_j) - (zf_i - zf_j))^2, computed as 2m/(m-1) times the variance of
    zq - zf. A reconstruction of DREAM-MoE's objective from its public description; the
    paper's exact formula is not public.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or the first K+b ranks.
        top_k: K, from 1 to E.
        boundary: b >= 1, unselected experts that take part.

    Returns:
        (...), >= 0, zero where all margins agree (m = 1 has no pair and gives 0). A
        constant shift of the logits changes nothing. Units: logits squared.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(top_k=top_k, boundary=boundary)
    m = boundary_ranks(top_k, _num_experts(q_logits, top_k), boundary)
    q, fp = _by_rank(q_logits, fp_logits, m)
    error = q - fp
    centred = error - error.mean(-1, keepdim=True)
    return centred.square().sum(-1) * (2 / max(m - 1, 1))


def router_kl(
    q_logits: Tensor, fp_logits: FpLogits, *, top_m: int | None = None
) -> Tensor:
    """Compute KL(softmax(zf) || softmax(zq)) in nats (EAQuant, arXiv:2506.13329).

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or at least `top_m` ranks.
        top_m: Renormalise both over the first `top_m` full-precision ranks, 1 to E;
            None takes all experts.

    Returns:
        (...), >= 0. A constant shift of the logits changes nothing.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(top_m=top_m)
    num_experts = q_logits.shape[-1]
    if top_m is not None and top_m > num_experts:
        raise ValueError(f"top_m={top_m}: allowed is 1 to num_experts={num_experts}")
    q, fp = _by_rank(q_logits, fp_logits, top_m or num_experts)
    q_log_p, fp_log_p = q.log_softmax(-1), fp.log_softmax(-1)
    return F.kl_div(q_log_p, fp_log_p, reduction="none", log_target=True).sum(-1)


def mse_kl(
    q_logits: Tensor,
    fp_logits: FpLogits,
    *,
    kl_weight: float = 1.0,
    top_m: int | None = None,
) -> Tensor:
    """Compute the squared logit error over all experts plus `router_kl` (EAQuant).

    (1/E) sum_i (zq_i - zf_i)^2 + kl_weight KL(softmax(zf) || softmax(zq)). EAQuant
    (arXiv:2506.13329) adds both without a weight to score a candidate of the router's
    own scale; here the sum is a loss per token. It takes the KL over the fp top-m.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E), or all ranks.
        kl_weight: Weight of the KL, logits squared per nat, >= 0.
        top_m: Experts of the KL, as in `router_kl`; None takes all.

    Returns:
        (...), >= 0, zero where the logits agree.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(kl_weight=kl_weight, top_m=top_m)
    _check_shapes(q_logits, fp_logits)
    fp_logits = rank_logits(fp_logits)  # once for both terms
    mse = topk_mse(q_logits, fp_logits, top_k=1, multiplier="all")
    return mse + kl_weight * router_kl(q_logits, fp_logits, top_m=top_m)


def input_mse(q_inputs: Tensor, fp_inputs: Tensor) -> Tensor:
    """Compute the squared error of the router's input, the normalized hidden states.

    (1/H) sum_h (xq_h - xf_h)^2. The router and the experts of its layer all read this
    vector, so it covers more than the logits; no paper uses it as a router loss.

    Args:
        q_inputs: Inputs of the router on the quantized path, (..., H).
        fp_inputs: The same in full precision, (..., H).

    Returns:
        (...), >= 0.

    Raises:
        ValueError: The shapes differ.
    """
    if q_inputs.shape != fp_inputs.shape:
        raise ValueError(
            f"q_inputs has shape {tuple(q_inputs.shape)} and fp_inputs "
            f"{tuple(fp_inputs.shape)}: allowed are equal shapes, (..., hidden)"
        )
    return (computed(q_inputs) - computed(fp_inputs)).square().mean(-1)


def vsraq(
    q_logits: Tensor,
    fp_logits: FpLogits,
    *,
    top_k: int,
    boundary: int = 1,
    alpha: float = 0.3,
    gamma: float = 1.0,
    eps: float = 1e-3,
    rank_margin: float = 0.0,
    rank_weight: float = 0.01,
    margin_weight: float = 0.05,
) -> Tensor:
    """Compute the whole router loss of VSRAQ, value and structure alignment (Eq. 17).

    (1 - alpha) topk_mse + alpha sigmoid_aware_mse + rank_weight rank
    + margin_weight margin (Eq. 11 and 16), defaults from Table 1.

    Args:
        q_logits: Quantized router logits, (..., E).
        fp_logits: Full-precision router logits, (..., E) or the first K+b ranks.
        top_k: K, from 1 to E.
        boundary: b of the margin term, >= 1.
        alpha: Share of the sigmoid-aware term, 0 to 1.
        gamma: Exponent of the sigmoid-aware weight, >= 0.
        eps: Floor of the sigmoid-aware weight, >= 0.
        rank_margin: Margin of the rank term, in logits.
        rank_weight: Weight of the rank term, >= 0.
        margin_weight: Weight of the margin term, >= 0.

    Returns:
        (...), >= 0.

    Raises:
        ValueError: A shape or a hyper-parameter is not allowed.
    """
    check_hyperparameters(
        top_k=top_k,
        boundary=boundary,
        alpha=alpha,
        rank_margin=rank_margin,
        rank_weight=rank_weight,
        margin_weight=margin_weight,
    )
    _check_shapes(q_logits, fp_logits)
    ranks = boundary_ranks(top_k, _num_experts(q_logits, top_k), boundary)
    fp_logits = rank_logits(fp_logits, ranks)  # once for all terms
    sigmoid_aware = sigmoid_aware_mse(
        q_logits, fp_logits, top_k=top_k, gamma=gamma, eps=eps
    )
    value = (1 - alpha) * topk_mse(q_logits, fp_logits, top_k=top_k)
    value = value + alpha * sigmoid_aware
    order = rank(q_logits, fp_logits, top_k=top_k, margin=rank_margin)
    margins = margin(q_logits, fp_logits, top_k=top_k, boundary=boundary)
    return value + rank_weight * order + margin_weight * margins


def reduce_tokens(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average over the tokens that count: sum(mask * loss) / sum(mask) (SRA Eq. 8).

    Args:
        loss: Per-token loss, any shape.
        mask: The same shape; 1 (or True) where the token counts, 0 where not.

    Returns:
        A scalar. No token that counts gives exactly 0, still attached to the graph.

    Raises:
        ValueError: `mask` has another shape than `loss`.
    """
    if mask is None:
        return loss.sum() / max(loss.numel(), 1)
    if mask.shape != loss.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: allowed is the shape of the loss, "
            f"{tuple(loss.shape)}"
        )
    weight = mask.to(loss.dtype)
    total = weight.sum()
    # where() instead of an if: no wait for the device
    return (loss * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))


def multiplied_ranks(top_k: int, num_experts: int, multiplier: int | str) -> int:
    """Return how many ranks `topk_mse` reads: min(multiplier * K, E), E for "all"."""
    if multiplier == "all":
        return num_experts
    return min(int(multiplier) * top_k, num_experts)


def boundary_ranks(top_k: int, num_experts: int, boundary: int) -> int:
    """Return how many ranks a margin loss reads: min(K + b, E)."""
    return min(top_k + boundary, num_experts)


def _num_experts(q_logits: Tensor, top_k: int) -> int:
    num_experts = q_logits.shape[-1]
    if top_k > num_experts:
        raise ValueError(f"top_k={top_k}: allowed is 1 to num_experts={num_experts}")
    return num_experts


def _check_shapes(q_logits: Tensor, fp_logits: FpLogits) -> None:
    if q_logits.shape != fp_logits.shape:
        raise ValueError(
            f"q_logits has shape {tuple(q_logits.shape)} and fp_logits "
            f"{tuple(fp_logits.shape)}: allowed are equal shapes (..., num_experts)"
        )


def _by_rank(
    q_logits: Tensor, fp_logits: FpLogits, ranks: int
) -> tuple[Tensor, Tensor]:
    """Return both logits at the first full-precision ranks, (..., ranks) each."""
    _check_shapes(q_logits, fp_logits)
    fp = rank_logits(fp_logits, ranks)
    return computed(q_logits).gather(-1, fp.indices.long()), fp.values
