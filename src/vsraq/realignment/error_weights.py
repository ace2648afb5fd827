# SPDX-License-Identifier: Apache-2.0
"""How much each error of a router's logits counts in its re-fit, and what that costs.

Shapes: T tokens, E experts, K top-k, H hidden width.
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Weighting: TypeAlias = Literal["uniform", "top_3k", "boundary"]
# bytes that the sums of a weighted re-fit may take
WEIGHTED_LIMIT = 8 * 2**30


def check_weighted_size(hidden: int, num_experts: int) -> None:
    """Refuse a weighted re-fit that is too large: one H x H system for each expert.

    Raises:
        ValueError: It needs more than `WEIGHTED_LIMIT` bytes.
    """
    size = num_experts * hidden**2 * 8
    if size > WEIGHTED_LIMIT:
        raise ValueError(
            f"a weighted re-fit of {num_experts} experts with hidden size {hidden} "
            f"needs {num_experts} x {hidden}^2 x 8 bytes = {size / 2**30:.1f} GiB; "
            f"allowed are {WEIGHTED_LIMIT / 2**30:.0f} GiB, so fit all errors alike "
            '(weighting="uniform"), with one system for all experts'
        )


def error_weights(scores: Tensor, top_k: int, weighting: Weighting) -> Tensor | None:
    """Compute how much the error of each expert's logit counts, per token.

    Args:
        scores: Full-precision selection scores, (T, E).
        top_k: K.
        weighting: "uniform"; "top_3k", 1 for the first 3K experts and 0.05 for the
            others; "boundary", 1 at the boundary of the selection and falling with
            the distance from it: 1 / (1 + 2 |s - m| / (s_1 - m)), m the middle
            between the K-th and the (K+1)-th score.

    Returns:
        (T, E), or None for "uniform".

    Raises:
        ValueError: `weighting` is none of the three.
    """
    if weighting == "uniform":
        return None
    num_experts = scores.shape[-1]
    if weighting == "top_3k":
        ranked = scores.topk(min(3 * top_k, num_experts), dim=-1).indices
        return torch.full_like(scores, 0.05).scatter_(-1, ranked, 1.0)
    if weighting == "boundary":
        ranked = scores.topk(min(top_k + 1, num_experts), dim=-1).values
        last, following = ranked[:, -2:-1], ranked[:, -1:]
        # groups may leave no expert that could have been selected instead
        middle = torch.where(following.isfinite(), (last + following) / 2, last)
        spread = (ranked[:, :1] - middle).clamp_min(torch.finfo(scores.dtype).tiny)
        return 1 / (1 + 2 * (scores - middle).abs() / spread)
    raise ValueError(
        f"weighting={weighting!r}: allowed are {', '.join(get_args(Weighting))}"
    )
