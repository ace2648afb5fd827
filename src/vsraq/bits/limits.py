# SPDX-License-Identifier: Apache-2.0
"""What the units of a model take, and what they may take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vsraq.bits.units import Unit


@dataclass(frozen=True)
class Sizes:
    """What each unit takes with each scheme, in the unit of a budget.

    Attributes:
        of: By the unit's name and the scheme's.
        limit: What all units may take.
        active_limit: What a token may read of them; None for any.
    """

    of: Mapping[tuple[str, str], float]
    limit: float
    active_limit: float | None = None

    @property
    def limits(self) -> tuple[float, float | None]:
        """Both limits."""
        return self.limit, self.active_limit


def smallest(
    sizes: Mapping[tuple[str, str], float], units: Sequence[Unit]
) -> tuple[float, float]:
    """Compute what all units take at least, and what a token reads of them at least.

    Args:
        sizes: Of a unit with a scheme, by their names.
        units: The units.
    """
    least: dict[str, float] = {}
    for (name, _), size in sizes.items():
        least[name] = min(size, least.get(name, size))
    return sum(least.values()), sum(least[u.name] * u.read for u in units)
