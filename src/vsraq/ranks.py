# SPDX-License-Identifier: Apache-2.0
"""A router's full-precision logits in rank order, as the losses read them.

Shapes: T tokens, E experts, m ranks. Most losses read the first ranks only, and those
take far less memory per calibration token than all logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankedLogits:
    """The first m full-precision ranks of each token.

    Attributes:
        values: Logits in the order of the ranking, descending unless another ranking
            than theirs was given, float32, shape (..., m).
        indices: Their expert indices, int16, shape (..., m).
        num_experts: E.
    """

    values: Tensor
    indices: Tensor
    num_experts: int

    @property
    def shape(self) -> torch.Size:
        """That of the logits that were ranked, (..., E)."""
        return torch.Size((*self.values.shape[:-1], self.num_experts))

    def to(self, device: torch.device | str) -> "RankedLogits":
        """Return the same ranks on another device."""
        return RankedLogits(
            self.values.to(device), self.indices.to(device), self.num_experts
        )

    def __len__(self) -> int:
        """Return the number of tokens, if these are the first dimension."""
        return len(self.values)

    def __getitem__(self, tokens: slice) -> "RankedLogits":
        """Return some of the tokens."""
        return RankedLogits(self.values[tokens], self.indices[tokens], self.num_experts)

    def first(self, ranks: int) -> "RankedLogits":
        """Return the first ranks.

        Raises:
            ValueError: Fewer were kept.
        """
        available = self.values.shape[-1]
        if available < ranks:
            raise ValueError(
                f"fp_logits holds {available} ranks: this loss reads {ranks}; "
                f"keep them with rank_logits(fp_logits, {ranks})"
            )
        return RankedLogits(
            self.values[..., :ranks], self.indices[..., :ranks], self.num_experts
        )


# full-precision logits as a loss takes them: of all experts, or the first ranks only
FpLogits: TypeAlias = Tensor | RankedLogits


def rank_logits(
    fp_logits: FpLogits, ranks: int | None = None, ranking: Tensor | None = None
) -> RankedLogits:
    """Keep the logits of the first `ranks` experts of each token.

    Args:
        fp_logits: Full-precision router logits, (..., E), or ranks of them, whose
            order stays.
        ranks: m, from 1 to E; None keeps all E.
        ranking: Expert indices, (..., E), the first rank first, such as
            `BoundRouter.ranking` gives; None ranks by the logits.

    Returns:
        The ranked form, detached.

    Raises:
        ValueError: `ranks` is outside 1..E, or fewer were kept.
    """
    num_experts = fp_logits.shape[-1]
    ranks = num_experts if ranks is None else ranks
    if not 1 <= ranks <= num_experts:
        raise ValueError(f"ranks={ranks}: allowed is 1 to num_experts={num_experts}")
    if isinstance(fp_logits, RankedLogits):
        return fp_logits.first(ranks)
    logits = computed(fp_logits.detach())
    if ranking is None:
        ranking = logits.argsort(dim=-1, descending=True, stable=True)
    values, indices = logits.gather(-1, ranking), ranking
    # contiguous() so that the full sort is not kept alive by a view of it
    return RankedLogits(
        values[..., :ranks].contiguous(),
        indices[..., :ranks].to(torch.int16).contiguous(),
        num_experts,
    )


# the full-precision side of a loss: ranked logits, or inputs, (T, H)
FpTarget: TypeAlias = RankedLogits | Tensor


def concatenate(parts: Sequence[FpTarget]) -> FpTarget:
    """Join the targets of several calls or samples of one router, in order."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    ranks = [part for part in parts if isinstance(part, RankedLogits)]
    return RankedLogits(
        torch.cat([part.values for part in ranks]),
        torch.cat([part.indices for part in ranks]),
        ranks[0].num_experts,
    )


def is_finite(target: FpTarget) -> bool:
    """Whether all values of a target are finite."""
    values = target if isinstance(target, Tensor) else target.values
    return bool(torch.isfinite(values).all())


def split_samples(
    block: str, router: str, calls: Sequence[FpTarget], tokens: Sequence[int]
) -> list[FpTarget]:
    """Split the targets of router calls into one for each calibration sample.

    Raises:
        RuntimeError: The router saw other tokens than the block, or its values are not
            finite.
    """
    seen = sum(len(call) for call in calls)
    if seen != sum(tokens):
        raise RuntimeError(
            f"block {block}: router {router} saw {seen} tokens, the block "
            f"{sum(tokens)}; allowed is every token exactly once"
        )
    if not all(is_finite(call) for call in calls):
        raise RuntimeError(
            f"block {block}: router {router} has non-finite full-precision values; "
            "look for inf or NaN in the model's weights or the calibration inputs"
        )
    # one call at a time: all of them concatenated would be the same memory once more
    samples: list[FpTarget] = []
    rest: FpTarget | None = None  # of a sample that ends in a later call
    for call in calls:
        left = call if rest is None else concatenate([rest, call])
        while len(samples) < len(tokens) and len(left) >= tokens[len(samples)]:
            count = tokens[len(samples)]
            samples.append(left[:count])
            left = left[count:]
        rest = left if len(left) else None
    return samples


def computed(logits: Tensor) -> Tensor:
    """Convert logits to the losses' precision: float64 stays, others are float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
