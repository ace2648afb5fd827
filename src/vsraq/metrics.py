# SPDX-License-Identifier: Apache-2.0
"""Routing and output metrics, one value per token, and a streaming mean of them.

Shapes: T tokens, E experts, K top-k, V vocabulary. The quantized argument comes first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def jaccard(q_selected: Tensor, fp_selected: Tensor) -> Tensor:
    """Overlap of the selected expert sets: |Tf & Tq| / |Tf | Tq| (VSRAQ Eq. 18).

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
    """KL(fp || q) of the next-token distributions, in nats.

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


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, in nats.

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
        """The mean.

        Raises:
            ValueError: Nothing was added.
        """
        if self.count == 0:
            raise ValueError("StreamingMean has seen 0 values: update() it first")
        return self.total / self.count


def _check_equal_shapes(name: str, q: Tensor, fp: Tensor) -> None:
    if q.shape != fp.shape:
        raise ValueError(
            f"q_{name} has shape {tuple(q.shape)} and fp_{name} {tuple(fp.shape)}: "
            "allowed are equal shapes"
        )
