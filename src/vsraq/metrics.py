# SPDX-License-Identifier: Apache-2.0
"""Routing and output metrics, one value per token, and a streaming mean of them.

Shapes: T tokens, E experts, K top-k, V vocabulary. The quantized argument comes first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def jaccard(q_selected: Tensor, fp_selected: Tensor) -> Tensor:
    """Compute the overlap of selected experts: |Tf & Tq| / |Tf | Tq| (VSRAQ Eq. 18).

    Args:
        q_selected: Expert indices of the quantized model, (..., K), unique per token.
        fp_selected: Expert indices of the full-precision model, (..., K).

    Returns:
        (...), a fraction from 0 to 1; 1 means the same set in any order.

    Raises:
        ValueError: The shapes differ.
    """
    _check_equal_shapes("selected", q_selected, fp_selected)
    same = q_selected.unsqueeze(-1) == fp_selected.unsqueeze(-2)
    shared = same.sum((-1, -2)).float()
    return shared / (2 * q_selected.shape[-1] - shared)


def output_kl(q_logits: Tensor, fp_logits: Tensor) -> Tensor:
    """Compute KL(fp || q) of the next-token distributions, in nats.

    Args:
        q_logits: Output logits of the quantized model, (..., V).
        fp_logits: Output logits of the full-precision model, (..., V).

    Returns:
        (...), >= 0.

    Raises:
        ValueError: The shapes differ.
    """
    _check_equal_shapes("logits", q_logits, fp_logits)
    q_log_p = q_logits.float().log_softmax(-1)
    fp_log_p = fp_logits.float().log_softmax(-1)
    return F.kl_div(q_log_p, fp_log_p, reduction="none", log_target=True).sum(-1)


def jsd(q_logits: Tensor, fp_logits: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of next-token distributions (SRA Eq. 10).

    (KL(fp || m) + KL(q || m)) / 2 with m = (fp + q) / 2, over the whole vocabulary and
    without a temperature.

    Args:
        q_logits: Output logits of the quantized model, (..., V); -inf masks a token.
        fp_logits: Output logits of the full-precision model, (..., V).

    Returns:
        (...), nats, from 0 to ln 2; exactly 0 for equal logits.

    Raises:
        ValueError: The shapes differ, or logits are +inf, NaN or all -inf.
    """
    _check_equal_shapes("logits", q_logits, fp_logits)
    _check_highest("q_logits", q_logits.amax(-1))
    _check_highest("fp_logits", fp_logits.amax(-1))
    return jsd_of_probabilities(
        q_logits.float().softmax(-1), fp_logits.float().softmax(-1)
    )


def sampled_jsd(
    q_logits: Tensor,
    fp_logits: Tensor,
    *,
    temperature: float = 0.6,
    top_k: int | None = 20,
    top_p: float | None = 0.95,
) -> Tensor:
    """Compute the JSD of what the two models would sample (SRA Eq. 2, 11-12).

    Each model's distribution is cut to its own candidates and renormalised on them;
    tokens that only the other model has as candidates get zero. Candidates are those
    that transformers' `generate` leaves, in its order: temperature, then top-k (equal
    logits at the k-th place all stay), then top-p among them.

    Memory: besides the logits, O(tokens * top_k); O(tokens * V) where `top_k` is None.

    Args:
        q_logits: Output logits of the quantized model, (..., V); -inf masks a token.
        fp_logits: Output logits of the full-precision model, (..., V).
        temperature: What the logits are divided by, > 0.
        top_k: How many candidates at most, >= 0; None or 0 takes the whole vocabulary.
        top_p: The smallest set of candidates with this probability stays, above 0 to 1;
            None or 1 keeps all.

    Returns:
        (...), nats, from 0 to ln 2; exactly 0 for equal logits.

    Raises:
        ValueError: The shapes differ, logits are +inf, NaN or all -inf, or a sampling
            parameter is not allowed.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _check_equal_shapes("logits", q_logits, fp_logits)
    sampling = (temperature, top_k, top_p)
    return candidates_jsd(
        candidates("q_logits", q_logits, *sampling),
        candidates("fp_logits", fp_logits, *sampling),
    )


def candidates_jsd(
    q_candidates: tuple[Tensor, Tensor], fp_candidates: tuple[Tensor, Tensor]
) -> Tensor:
    """Compute `sampled_jsd` from what `candidates` has found, (...), nats."""
    (q_index, q_p), (fp_index, fp_p) = q_candidates, fp_candidates
    # The union without a V-sized tensor: concatenated and sorted by token, a token
    # occurs at most twice, once per model, in neighbouring places.
    index, order = torch.cat((q_index, fp_index), -1).sort(dim=-1, stable=True)
    q_p = F.pad(q_p, (0, fp_p.shape[-1])).gather(-1, order)
    fp_p = F.pad(fp_p, (q_index.shape[-1], 0)).gather(-1, order)
    twice = index[..., 1:] == index[..., :-1]
    fp_of_next = torch.where(twice, fp_p[..., 1:], 0.0)
    fp_p = fp_p + F.pad(fp_of_next, (0, 1))
    # the second of a pair is counted with the first
    fp_p[..., 1:] = torch.where(twice, 0.0, fp_p[..., 1:])
    return jsd_of_probabilities(q_p, fp_p)


def routing_shift(q_selected: Tensor, fp_selected: Tensor, *, p: float = 0.9) -> Tensor:
    """Compute how far the ranked experts moved: 1 - RBO / (1 - p^K) (SRA Eq. 3-5).

    RBO = (1 - p) sum_{d<=K} p^(d-1) A_d with A_d the overlap of the first d experts of
    both rankings, divided by d; 1 - p^K is the RBO of equal rankings.

    Args:
        q_selected: Expert indices of the quantized model, best first, (..., K), unique
            per token.
        fp_selected: Expert indices of the full-precision model, best first, (..., K).
        p: Weight of a rank against the one before it, between 0 and 1.

    Returns:
        (...), a fraction from 0 (the same experts in the same order) to 1 (no shared
        expert).

    Raises:
        ValueError: The shapes differ, or `p` is not allowed.
    """
    if not 0 < p < 1:
        raise ValueError(f"p={p!r}: allowed is a number between 0 and 1")
    _check_equal_shapes("selected", q_selected, fp_selected)
    same = q_selected.unsqueeze(-1) == fp_selected.unsqueeze(-2)
    shared = same.float().cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    depth = torch.arange(1, q_selected.shape[-1] + 1, device=q_selected.device)
    weight = p ** (depth - 1) * ((1 - p) / (1 - p ** len(depth)))
    # a sum of disagreements, so that equal rankings give exactly 0
    return ((1 - shared / depth) * weight).sum(-1).clamp(max=1)


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each next token, in nats.

    Args:
        logits: (B, S, V).
        input_ids: (B, S).

    Returns:
        (B, S - 1); exp of its mean is the perplexity.
    """
    log_p = logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)


@dataclass
class StreamingMean:
    """Mean of all values seen, accumulated in float64."""

    total: float = 0.0
    count: int = 0

    def update(self, values: Tensor) -> None:
        """Add every element of `values`."""
        self.total += values.to(torch.float64).sum().item()
        self.count += values.numel()

    def compute(self) -> float:
        """Return the mean.

        Raises:
            ValueError: Nothing was added.
        """
        if self.count == 0:
            raise ValueError("StreamingMean has seen 0 values: update() it first")
        return self.total / self.count


def check_sampling(
    *, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Check the parameters of `sampled_jsd`.

    Raises:
        ValueError: One is not allowed; the message has its name, its value and what
            is allowed.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature!r}: allowed is a finite number > 0; for greedy "
            "decoding pass top_k=1"
        )
    if top_k is not None and (int(top_k) != top_k or top_k < 0):
        raise ValueError(
            f"top_k={top_k!r}: allowed is an int >= 0, or None; both 0 and None take "
            "the whole vocabulary"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p={top_p!r}: allowed is a number above 0, at most 1, or None"
        )


def candidates(
    name: str,
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor]:
    """Find the tokens that a model would sample from, as `sampled_jsd` does.

    Args:
        name: What an error calls the logits.
        logits: (..., V).
        temperature: As `check_sampling` allows, and so are the next two.
        top_k: How many candidates at most; None or 0 takes the whole vocabulary.
        top_p: Probability that they hold; None or 1 keeps all.

    Returns:
        Tokens, (..., m), the most likely first and equal ones by index, and their
        probabilities, 0 where filtered out.

    Raises:
        ValueError: Logits are +inf, NaN or all -inf.
    """
    vocabulary = logits.shape[-1]
    values, index = _highest(logits, min(top_k or vocabulary, vocabulary))
    _check_highest(name, values[..., 0])
    scores = values.float() / temperature
    if top_p is not None and top_p < 1:
        # from the least likely on, as transformers sums them
        cumulative = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        removed = cumulative <= 1 - top_p
        removed[..., :1] = False
        scores = scores.masked_fill(removed, -math.inf)
    return index, scores.softmax(-1)


def _highest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` highest logits of each token and all equal to the last of them.

    Returns:
        Values (..., m), best first and equal ones by index, -inf where a token has
        fewer, and their indices.
    """
    vocabulary = logits.shape[-1]
    # equal logits are frequent in bfloat16, and one more shows whether there are any
    width, more = count, 1 if logits.dtype == torch.float32 else count
    while True:
        # Comparing all V to the last one would take several times as long as these.
        width = min(width + more, vocabulary)
        values, index = _top(logits, width)
        lowest = values[..., count - 1, None]
        # clamped, because -inf is no candidate where fewer than `count` are finite
        among = values >= lowest.clamp(min=torch.finfo(logits.dtype).min)
        most = int(among.sum(-1).max()) if among.numel() else count
        if most < width or width == vocabulary:
            break
        more = width
    most = max(most, 1)
    values = values.masked_fill(values < lowest, -math.inf)
    # topk leaves the order of equal logits open, and top-p may cut among them
    index, order = index[..., :most].sort(dim=-1)
    values, order = (
        values[..., :most].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    )
    return values, index.gather(-1, order)


_BLOCK = 64  # neighbouring logits


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Do what `topk` does, in a third of the time for a large vocabulary on a CPU.

    The highest `count` logits are in the `count` blocks with the highest maxima, or
    equal to some that are there.
    """
    vocabulary = logits.shape[-1]
    blocks = vocabulary // _BLOCK
    if logits.device.type != "cpu" or blocks < 8 * count:
        return logits.topk(count, dim=-1)
    inside = logits[..., : blocks * _BLOCK].unflatten(-1, (blocks, _BLOCK))
    highest = inside.amax(-1).topk(count, dim=-1, sorted=False).indices
    index = (highest.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK)).flatten(-2)
    rest = torch.arange(blocks * _BLOCK, vocabulary)
    index = torch.cat((index, rest.expand(*index.shape[:-1], -1)), -1)
    values, order = logits.gather(-1, index).topk(count, dim=-1)
    return values, index.gather(-1, order)


def jsd_of_probabilities(q: Tensor, fp: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of two distributions over the same tokens.

    Args:
        q: Probabilities of the quantized model, (..., N).
        fp: Those of the full-precision model, (..., N).

    Returns:
        (...), nats, from 0 to ln 2; exactly 0 for equal ones.
    """
    total = q + fp
    # With d in [-1, 1], q = m (1 + d) and fp = m (1 - d): small differences do not
    # cancel, as they would in q log(q / m) + fp log(fp / m).
    d = (q - fp).div_(total.clamp(min=torch.finfo(total.dtype).tiny))
    terms = _xlog(d).add_(_xlog(d.neg()))
    return terms.mul_(total).sum(-1).div(4).clamp(0, math.log(2))


def _xlog(d: Tensor) -> Tensor:
    """Compute (1 + d) log(1 + d), 0 at d = -1; xlog1py takes eight times as long."""
    # no other logarithm is as low as -1e3, so the product is 0 at d = -1 only
    return d.log1p().clamp_(min=-1e3).mul_(d + 1)


def _check_highest(name: str, highest: Tensor) -> None:
    """Refuse logits that give no distribution; a NaN counts as the highest."""
    bad = highest[~highest.isfinite()]
    if bad.numel():
        raise ValueError(
            f"{name}: {bad.numel()} tokens have {bad[0].item()} as highest logit; "
            "allowed are finite numbers, and -inf for some but not all entries; look "
            "for inf or NaN in the model's weights or inputs"
        )


def _check_equal_shapes(name: str, q: Tensor, fp: Tensor) -> None:
    if q.shape != fp.shape:
        raise ValueError(
            f"q_{name} has shape {tuple(q.shape)} and fp_{name} {tuple(fp.shape)}: "
            "allowed are equal shapes"
        )
