# SPDX-License-Identifier: Apache-2.0
"""The schemes that predict the least damage within a budget."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vsraq.bits.choice import Offer, choose
from vsraq.bits.damage import Damaged, DamageModel


class Priced(NamedTuple):
    """One scheme for one unit.

    Attributes:
        size: What it takes of the budget, in the budget's unit.
        active: What one token reads of that.
        damage: What it does, alone.
    """

    size: float
    active: float
    damage: Damaged


class Metric(NamedTuple):
    """What is made small: kl * KL + routing * (1 - Jaccard).

    Attributes:
        kl: Weight of the KL, 1 / nats.
        routing: Weight of 1 - Jaccard.
    """

    kl: float
    routing: float

    def of(self, damage: Damaged) -> float:
        """The metric of a damage."""
        return self.kl * damage.kl + self.routing * damage.routing


# Weights of routing beside a metric, as shares of the uniform scheme's. Each leads to a
# choice; the one that measures best as a whole is kept.
MORE_ROUTING = (0.0, 0.5, 1.0)
_SLOPES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
_STEPS = 10
_ROUGH = 1e-2  # share of the least damage


def allocate(
    units: Sequence[Mapping[str, Priced]],
    base: Sequence[str],
    model: DamageModel,
    metric: Metric,
    limit: float,
    active_limit: float | None = None,
    *,
    rough: bool = False,
) -> list[str]:
    """Choose a scheme for every unit.

    R = sqrt(S), S = sum of r_u^2, is concave in S, so the best choice is the best for
    some straight line R0 + (S - R0^2) / (2 R0) in its place: an integer programme for
    each line. Several lines are tried, each moved to the R that it leads to until the
    choice stays.

    Args:
        units: For each unit, its schemes by name.
        base: Each unit's scheme in the uniform export.
        model: How damages add.
        metric: What is made small.
        limit: The most that all sizes may add up to.
        active_limit: The same for what a token reads; None for any.
        rough: Whether one line is enough, and a choice that is a little worse than its
            best: for curves, where the exact choice of many units takes minutes.

    Returns:
        The name of each unit's scheme.

    Raises:
        ValueError: No choice is within the limits.
    """

    def predicted(choice: Sequence[str]) -> float:
        damages = [unit[name].damage for unit, name in zip(units, choice, strict=True)]
        return metric.of(model.together(damages))

    uniform = model.together([u[n].damage for u, n in zip(units, base, strict=True)])
    found: list[list[str]] = []
    for slope in (1.0,) if rough else _SLOPES:
        routing = max(uniform.routing * slope, 1e-12)
        for _ in range(_STEPS):
            offers = _offers(units, model, metric, routing)
            choice = choose(offers, limit, active_limit, _ROUGH if rough else 0.0)
            taken = [u[n].damage for u, n in zip(units, choice, strict=True)]
            routing = max(model.together(taken).routing, 1e-12)
            if choice in found:
                break
            found.append(choice)
    return min(found, key=predicted)


def check_limits(
    units: Sequence[Mapping[str, Priced]],
    limit: float,
    active_limit: float | None = None,
) -> None:
    """Refuse limits that no choice keeps; arguments are those of `allocate`.

    Raises:
        ValueError: No choice is within the limits.
    """
    offers = [
        {name: Offer(p.size, p.active, 0.0) for name, p in unit.items()}
        for unit in units
    ]
    choose(offers, limit, active_limit)


def _offers(
    units: Sequence[Mapping[str, Priced]],
    model: DamageModel,
    metric: Metric,
    routing: float,
) -> list[dict[str, Offer]]:
    """Return offers whose damages add, on a straight line at some R."""
    per_square = (metric.kl * model.flip_kl + metric.routing) / (2 * routing)
    return [
        {
            name: Offer(
                priced.size,
                priced.active,
                per_square * priced.damage.routing**2
                + metric.kl * model.direct(priced.damage),
            )
            for name, priced in unit.items()
        }
        for unit in units
    ]
