# SPDX-License-Identifier: Apache-2.0
"""What a plan has measured, read again: damage per MiB, and other budgets."""

import re
from collections import defaultdict
from typing import NamedTuple

from vsraq.bits.allocation import Metric, Priced, allocate
from vsraq.bits.budget import budget_bytes
from vsraq.bits.damage import Damaged, DamageModel
from vsraq.bits.plan import BitPlan

MIB = 2**20
_BLOCK = re.compile(r"^.*?\.(\d+)\.(.+)$")
_METRICS = {"kl": Metric(1.0, 0.0), "routing": Metric(0.0, 1.0)}
_BUDGETS = 16  # steps of the curve
_MOST = 0.10  # more bytes than the uniform export, at most


class Slope(NamedTuple):
    """What more or fewer bits do to a unit.

    Attributes:
        block: The unit's decoder block.
        per_mib: Damage that a MiB takes away, or that a MiB less adds; of all schemes
            that are larger (smaller), the best.
        chosen: Whether the plan gives the unit more (fewer) bits.
    """

    block: int
    per_mib: float
    chosen: bool


def slopes(
    plan: BitPlan, metric: str
) -> tuple[dict[str, list[Slope]], dict[str, list[Slope]]]:
    """Return what more bits save and what fewer bits cost, by the kind of unit.

    Args:
        plan: The plan.
        metric: "kl" or "routing".

    Returns:
        Those of all units that may have more bits, and of all that may have fewer.
    """
    more: dict[str, list[Slope]] = defaultdict(list)
    fewer: dict[str, list[Slope]] = defaultdict(list)
    blocks = [int(m[1]) for u in plan.units if (m := _BLOCK.match(u.name))]
    behind = max(blocks, default=-1) + 1
    for unit in plan.units:
        match = _BLOCK.match(unit.name)
        kind = match[2] if match else unit.name
        block = int(match[1]) if match else behind
        base = unit.candidates[unit.base]
        found = [
            (cost.bytes, (getattr(base, metric) - getattr(cost, metric)) / size)
            for cost in unit.candidates.values()
            if (size := (cost.bytes - base.bytes) / MIB)
        ]
        larger = [slope for size, slope in found if size > base.bytes]
        smaller = [slope for size, slope in found if size < base.bytes]
        if larger:
            chosen = unit.cost.bytes > base.bytes
            more[kind].append(Slope(block, max(larger), chosen))
        if smaller:
            chosen = unit.cost.bytes < base.bytes
            fewer[kind].append(Slope(block, min(smaller), chosen))
    return dict(more), dict(fewer)


def budget_curve(plan: BitPlan, metric: str) -> tuple[list[int], list[float]]:
    """Choose anew from what a plan has measured, for other budgets.

    Args:
        plan: The plan; its budget of active bytes holds.
        metric: "kl" or "routing".

    Returns:
        Sizes of exports, from the smallest to a tenth more than the uniform one, and
        the damage that is predicted for each: the least there is, or a little more.
    """
    adding, weights = DamageModel(plan.flip_kl), _METRICS[metric]
    units = [
        {n: Priced(c.bytes, c.active_bytes, c) for n, c in unit.candidates.items()}
        for unit in plan.units
    ]
    base = [unit.base for unit in plan.units]
    costs = [[c.bytes for c in unit.candidates.values()] for unit in plan.units]
    smallest, largest = sum(map(min, costs)), sum(map(max, costs))
    own = sum(unit.candidates[unit.base].bytes for unit in plan.units)
    plain = plan.uniform.bytes - own
    top = min(largest, own + _MOST * plan.uniform.bytes)
    active = _active_limit(plan)
    sizes: list[int] = []
    found: list[float] = []
    for step in range(_BUDGETS + 1):
        limit = smallest + (top - smallest) * step / _BUDGETS
        try:
            chosen = allocate(units, base, adding, weights, limit, active, rough=True)
        except ValueError:  # nothing within the active budget
            continue
        taken = [u.candidates[n] for u, n in zip(plan.units, chosen, strict=True)]
        size = plain + sum(cost.bytes for cost in taken)
        damage = weights.of(adding.together(taken))
        if found and damage > found[-1]:  # what fits into less fits here
            size, damage = sizes[-1], found[-1]
        sizes.append(size)
        found.append(damage)
    return sizes, found


def _active_limit(plan: BitPlan) -> float | None:
    """Return what a token may read of the units, or None."""
    if plan.active_budget is None:
        return None
    uniform = plan.uniform.active_bytes
    said = plan.active_budget
    budget = said if "%" in said else int(said)
    allowed = budget_bytes("active_budget", budget, uniform)
    own = sum(unit.candidates[unit.base].active_bytes for unit in plan.units)
    return own + allowed - uniform


def plan_damage(plan: BitPlan, metric: str) -> float:
    """Return the damage that is predicted for a plan."""
    return damage_of(plan.predicted, metric)


def damage_of(cost: Damaged, metric: str) -> float:
    """Return one of the damages of a cost: "kl" or "routing"."""
    return float(getattr(cost, metric))
