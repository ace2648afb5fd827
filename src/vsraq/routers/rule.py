# SPDX-License-Identifier: Apache-2.0
"""How a router chooses its experts, as data: from logits to scores to a choice.

Shapes: T tokens, E experts, K top-k.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

ScoreFunction: TypeAlias = Literal["identity", "softmax", "sigmoid", "sqrt_softplus"]
GroupScore: TypeAlias = Literal["top2", "max"]

_SCORE_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
}


@dataclass(frozen=True)
class SelectionRule:
    """A map from raw logits to the scores whose top K are chosen.

    z' = c tanh(s z / c) (z' = s z without a cap), p = f(z') + b; with groups, experts
    outside the best groups get `masked_score` instead (DeepSeek-V2, arXiv:2405.04434,
    and V3, arXiv:2412.19437).

    Attributes:
        score_function: f. Where neither a bias nor groups take part, every increasing
            function chooses the same, and it is "identity".
        biased: Whether a correction bias b, (E,), is added for the choice.
        num_groups: Groups that the experts are divided into, in order.
        topk_groups: Groups that a token may choose from.
        group_score: A group's score: the sum of its two best p, or its best.
        masked_score: What experts of other groups score.
        logit_scale: s.
        logit_softcap: c, or None.
    """

    score_function: ScoreFunction = "identity"
    biased: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "top2"
    masked_score: float = -math.inf
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def scores(self, logits: Tensor, correction_bias: Tensor | None = None) -> Tensor:
        """Compute the scores by which the router chooses.

        Args:
            logits: Raw logits, (..., E).
            correction_bias: E values, required if the rule is biased.

        Returns:
            (..., E), float32.

        Raises:
            ValueError: The correction bias is missing.
        """
        scores, refused = self._scores(logits, correction_bias)
        return scores.masked_fill(refused, self.masked_score)

    def ranking(self, logits: Tensor, correction_bias: Tensor | None = None) -> Tensor:
        """Return the experts in the order in which the router would choose them.

        The first K are those that it chooses. Experts of groups that were not chosen
        come where `masked_score` puts them, in the order of their own scores.

        Args:
            logits: Raw logits, (..., E).
            correction_bias: E values, required if the rule is biased.

        Returns:
            Expert indices, int64, (..., E).

        Raises:
            ValueError: The correction bias is missing.
        """
        scores, refused = self._scores(logits, correction_bias)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        if self.num_groups == 1:
            return order
        masked = scores.masked_fill(refused, self.masked_score).gather(-1, order)
        return order.gather(-1, masked.argsort(dim=-1, descending=True, stable=True))

    def _scores(
        self, logits: Tensor, correction_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute scores, and which experts the groups exclude, (..., E) each."""
        logits = logits.float() * self.logit_scale
        if self.logit_softcap is not None:
            logits = (logits / self.logit_softcap).tanh() * self.logit_softcap
        scores = _SCORE_FUNCTIONS[self.score_function](logits)
        if self.biased:
            if correction_bias is None:
                raise ValueError(
                    "correction_bias=None: the router selects by a correction bias; "
                    "pass that tensor"
                )
            scores = scores + correction_bias.flatten().to(scores)
        if self.num_groups == 1:
            return scores, torch.zeros_like(scores, dtype=torch.bool)
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        best = grouped.topk(2 if self.group_score == "top2" else 1, dim=-1).values
        chosen = best.sum(-1).topk(self.topk_groups, dim=-1).indices
        refused = torch.ones_like(best[..., 0], dtype=torch.bool)
        refused.scatter_(-1, chosen, False)
        return scores, refused.unsqueeze(-1).expand_as(grouped).flatten(-2)

    @property
    def by_logits(self) -> bool:
        """Whether it chooses the highest logits."""
        return not self.biased and self.num_groups == 1

    def __str__(self) -> str:
        parts: list[str] = [self.score_function]
        if self.logit_scale != 1:
            parts.append(f"of {self.logit_scale:g} z")
        if self.logit_softcap is not None:
            parts.append(f"of capped z ({self.logit_softcap:g})")
        if self.biased:
            parts.append("+ bias")
        if self.num_groups > 1:
            score = "two best" if self.group_score == "top2" else "best"
            parts.append(
                f"in {self.topk_groups} of {self.num_groups} groups (by {score})"
            )
        return " ".join(parts)


HIGHEST_LOGITS = SelectionRule()
