# SPDX-License-Identifier: Apache-2.0
"""How the next-token distribution of a token changed: every metric from one softmax.

`vsraq.metrics` has the same metrics one by one. Together they take less than half the
time: each distribution is computed once, in parts that stay in the processor's cache.

Shapes: n tokens, V vocabulary.
"""

import math
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from vsraq.metrics import candidates, candidates_jsd, jsd_of_probabilities
from vsraq.tokens.sampling import Sampling

# float32 values of a part: six such tensors are alive at once
_PART_VALUES = 2**17


class OutputChange(NamedTuple):
    """The output of a quantized model against full precision, for each of n tokens.

    Attributes:
        q_nll: NLL of the next token, nats; 0 where it is unknown.
        fp_nll: The same in full precision.
        kl: KL(fp || q), nats.
        jsd: Jensen-Shannon divergence over the vocabulary (SRA Eq. 10), nats.
        sampled_jsd: The same of what would be sampled (SRA Eq. 2, 11-12), nats.
        top1_agreement: 1 where both find the same token most likely.
    """

    q_nll: Tensor
    fp_nll: Tensor
    kl: Tensor
    jsd: Tensor
    sampled_jsd: Tensor
    top1_agreement: Tensor


def output_change(
    q_logits: Tensor, fp_logits: Tensor, next_ids: Tensor, sampling: Sampling
) -> OutputChange:
    """Compute every output metric of some tokens.

    Args:
        q_logits: Output logits of the quantized model, (n, V); -inf masks a token.
        fp_logits: Those of the full-precision model, (n, V), on the same device.
        next_ids: The token after each, (n,); negative where there is none.
        sampling: How outputs are sampled.

    Returns:
        Float32, (n,) each; divergences are exactly 0 for equal logits. What is
        infinite is for `check_finite`.

    Raises:
        ValueError: The vocabularies differ, or logits are +inf, NaN or all -inf.
    """
    if q_logits.shape != fp_logits.shape:
        raise ValueError(
            f"the quantized model gives {q_logits.shape[-1]} logits per token and the "
            f"full-precision one {fp_logits.shape[-1]}: allowed are equal vocabularies"
        )
    values = asdict(sampling)
    q_found = candidates("the quantized model's logits", q_logits, **values)
    fp_found = candidates("the full-precision logits", fp_logits, **values)
    part = max(_PART_VALUES // q_logits.shape[-1], 8)
    if q_logits.device.type != "cpu":
        part = len(q_logits)
    parts = [
        _divergences(*tensors)
        for tensors in zip(
            *(t.split(part) for t in (q_logits, fp_logits, next_ids)), strict=True
        )
    ]
    q_nll, fp_nll, kl, jsd = (torch.cat(own) for own in zip(*parts, strict=True))
    same = q_found[0][:, 0] == fp_found[0][:, 0]
    return OutputChange(
        q_nll, fp_nll, kl, jsd, candidates_jsd(q_found, fp_found), same.float()
    )


def check_finite(
    outputs: OutputChange, shape: tuple[int, int], name: str, first: int
) -> None:
    """Refuse figures that are infinite, because a token has no probability.

    Args:
        outputs: Of B sequences with S tokens, (B S,) each.
        shape: (B, S).
        name: Of the quantized model.
        first: How many sequences came before these.

    Raises:
        ValueError: One is; the message says in which model, and where.
    """
    length = shape[1]
    for field, model in (
        ("fp_nll", "the full-precision model"),
        ("q_nll", name),
        ("kl", name),
    ):
        bad = ~getattr(outputs, field).isfinite()
        if not bad.any():
            continue
        place = int(bad.nonzero()[0])
        sequence, position = first + place // length, place % length
        if field == "kl":
            what = "a token that has one in full precision, after"
            allowed = "to the tokens that have one in full precision"
        else:
            what, position = "the token at", position + 1
            allowed = "to every token of the text"
        raise ValueError(
            f"{model} gives no probability (a logit of -inf) to {what} position "
            f"{position} of sequence {sequence}, counted from 0, so its "
            f"{'KL' if field == 'kl' else 'NLL'} is infinite; allowed are models that "
            f"give one {allowed}; leave that text out, or look for what masks the logit"
        )


# 1 - d^2 below this has lost too many digits
_FAR = 1e-3


def _divergences(
    q_logits: Tensor, fp_logits: Tensor, next_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the NLL of q and fp, KL and JSD, (n,) each."""
    q_scores, q_p, q_log_sum = _softmax(q_logits)
    fp_scores, fp_p, fp_log_sum = _softmax(fp_logits)
    known = next_ids >= 0
    index = next_ids.clamp(min=0).unsqueeze(-1)
    q_nll, fp_nll = (
        torch.where(known, (log_sum - scores.gather(-1, index)).squeeze(-1), 0.0)
        for scores, log_sum in ((q_scores, q_log_sum), (fp_scores, fp_log_sum))
    )
    # log p_fp - log p_q; infinite scores are those of masked tokens
    masked = bool(fp_scores.amin().isneginf() or q_scores.amin().isneginf())
    ratio = fp_scores.sub_(q_scores).sub_(fp_log_sum - q_log_sum)
    if masked:  # a token without probability counts for nothing
        ratio.masked_fill_(fp_p == 0, 0)
    kl = torch.linalg.vecdot(fp_p, ratio).clamp_(min=0)
    return q_nll, fp_nll, kl, _jsd(q_p, fp_p, ratio, q_scores)


def _jsd(q_p: Tensor, fp_p: Tensor, ratio: Tensor, free: Tensor) -> Tensor:
    """Compute the JSD from probabilities and log p_fp - log p_q; overwrites `free`.

    With d = (q - fp) / (q + fp), JSD is the sum of (q + fp) / 4 times
    (1 + d) log(1 + d) + (1 - d) log(1 - d) = log(1 - d^2) - d ratio: one logarithm
    instead of two. Where d is near 1 it is not exact enough.
    """
    total = torch.add(q_p, fp_p, out=free)
    d = torch.sub(q_p, fp_p)
    d.div_(total.clamp_(min=torch.finfo(total.dtype).tiny))
    terms = torch.mul(d, d).neg_()
    if terms.amin() < _FAR - 1:
        return jsd_of_probabilities(q_p, fp_p)
    terms.log1p_().addcmul_(d, ratio, value=-1)
    return torch.linalg.vecdot(terms, total).div_(4).clamp_(0, math.log(2))


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores z - max, (n, V), softmax, (n, V), and log sum exp score, (n, 1)."""
    scores = logits.float()
    scores = scores - scores.amax(-1, keepdim=True)
    p = scores.softmax(-1)
    # the highest score is 0, so the highest probability is 1 / sum exp score
    return scores, p, p.amax(-1, keepdim=True).log_().neg_()
