# SPDX-License-Identifier: Apache-2.0
"""What rounding does to a model, and how the damages of several units add up."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self


class Damaged(Protocol):
    """Anything with a damage.

    Attributes:
        kl: KL(full precision || rounded) of the output, nats.
        routing: 1 - Jaccard of the selected experts, mean over the routers.
    """

    @property
    def kl(self) -> float:
        """KL of the output, nats."""

    @property
    def routing(self) -> float:
        """1 - Jaccard."""


@dataclass(frozen=True)
class Damage:
    """What rounding does to a model, on the mean over the tokens.

    Attributes:
        kl: KL(full precision || rounded) of the output, nats.
        routing: 1 - Jaccard of the selected experts, on the mean over the model's
            routers.
    """

    kl: float
    routing: float


@dataclass(frozen=True)
class DamageModel:
    """How damages of units that are rounded together add up.

    Errors of different layers are independent, so their squares add. A router changes
    its choice where the error exceeds a margin, so the share of changed choices grows
    with the error itself: routing r adds as R = sqrt(sum of r^2). KL has two parts. One
    comes with changed choices: a R. The other is along an unchanged path, where it
    grows with the square of the error, so it just adds: KL = a R + sum of
    (KL_u - a r_u).

    Attributes:
        flip_kl: a, nats: KL that comes with each changed choice.
    """

    flip_kl: float

    @classmethod
    def fit(cls, alone: Iterable[Damaged], together: Damaged) -> Self:
        """Find a from units that were measured alone, and all together.

        With the sums over all units, KL = a R + sum KL_u - a sum r_u. A unit with less
        KL than a r_u counts as negative here, and as 0 in predictions.

        Args:
            alone: Each unit's damage.
            together: The damage of all of them.
        """
        units = list(alone)
        routing = sum(unit.routing for unit in units) - _quadrature(units)
        kl = sum(unit.kl for unit in units) - together.kl
        return cls(max(kl / routing, 0.0) if routing > 0 else 0.0)

    def direct(self, damage: Damaged) -> float:
        """The KL of a unit that does not come with changed choices, nats."""
        return max(damage.kl - self.flip_kl * damage.routing, 0.0)

    def together(self, damages: Iterable[Damaged]) -> Damage:
        """Predict the damage of units that are rounded together."""
        units = list(damages)
        routing = _quadrature(units)
        kl = self.flip_kl * routing + sum(map(self.direct, units))
        return Damage(kl, routing)


def _quadrature(units: Iterable[Damaged]) -> float:
    return math.sqrt(sum(unit.routing**2 for unit in units))
