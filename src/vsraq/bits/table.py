# SPDX-License-Identifier: Apache-2.0
"""A bit plan as text: a row per unit, and what the plan does as a whole."""

import re
from collections import Counter
from collections.abc import Sequence

from vsraq.bits.plan import BitPlan, Cost, PlannedUnit

_MIB = 2**20
_BLOCK = re.compile(r"^(.*?\.)\d+\.")
_GAP = "  "


def format_plan(plan: BitPlan) -> str:
    """Format a plan.

    Each unit has the bytes of its scheme, and what each scheme would do to the output
    and to the routing if only this unit had it. The chosen one has a star.

    Args:
        plan: The plan.
    """
    schemes = by_size(plan)
    prefix = common_prefix(plan)
    size = _decimals([unit.cost.bytes / _MIB for unit in plan.units])
    rows = [
        [
            unit.name.removeprefix(prefix),
            unit.chosen,
            f"{unit.cost.bytes / _MIB:.{size}f}",
            f"{unit.cost.active_bytes / _MIB:.{size}f}",
            *_costs(unit, schemes, "kl", 1e3),
            *_costs(unit, schemes, "routing", 1e2),
        ]
        for unit in plan.units
    ]
    marked = [f"{scheme} " for scheme in schemes]
    header = ["unit", "scheme", "MiB", "active", *marked, *marked]
    names = f"; names without {prefix}" if prefix else ""
    return "\n".join(
        [
            *_aligned(header, rows, len(schemes)),
            "",
            "* chosen; MiB of the unit, and what a token reads of it; KL and 1 - J "
            f"(Jaccard) with only this unit rounded{names}",
            *_summary(plan),
        ]
    )


def by_size(plan: BitPlan) -> list[str]:
    """Return the names of all schemes of a plan, the smallest first."""
    sizes = {plan.scheme: 1.0}
    for unit in plan.units:
        known = next((n for n in unit.candidates if n in sizes), unit.base)
        scale = sizes.get(known, 1.0) / unit.candidates[known].bytes
        for name, cost in unit.candidates.items():
            sizes.setdefault(name, scale * cost.bytes)
    return sorted(sizes, key=lambda name: sizes[name])


def common_prefix(plan: BitPlan) -> str:
    """Return what stands before the block's number in most names of units."""
    found = [match[1] for u in plan.units if (match := _BLOCK.match(u.name))]
    return Counter(found).most_common(1)[0][0] if found else ""


def _costs(
    unit: PlannedUnit, schemes: Sequence[str], name: str, factor: float
) -> list[str]:
    cells = []
    for scheme in schemes:
        cost = unit.candidates.get(scheme)
        mark = "*" if scheme == unit.chosen else " "
        cells.append(
            "" if cost is None else f"{factor * getattr(cost, name):.2f}{mark}"
        )
    return cells


def _decimals(values: Sequence[float]) -> int:
    """Return how many decimals show most of these numbers."""
    middle = sorted(values)[len(values) // 2] if values else 1.0
    return 4 if middle < 0.1 else 2 if middle < 100 else 0


def _aligned(header: list[str], rows: list[list[str]], schemes: int) -> list[str]:
    """Return lines: titles over groups of columns, the header, a rule, and the rows."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        _GAP.join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    starts = [sum(widths[:i]) + len(_GAP) * i for i in (4, 4 + schemes)]
    titles = (" " * starts[0] + "KL, 1e-3 nats").ljust(starts[1]) + "1 - Jaccard, %"
    rule = _GAP.join("-" * width for width in widths)
    return [titles, text[0], rule, *text[1:]]


def _summary(plan: BitPlan) -> list[str]:
    uniform, planned = plan.uniform, plan.planned
    active = f", active budget {plan.active_budget}" if plan.active_budget else ""
    engine = plan.engine or "any engine"
    change = {
        "bytes": _change(planned.bytes, uniform.bytes),
        "active": _change(planned.active_bytes, uniform.active_bytes),
        "KL": _change(planned.kl, uniform.kl),
        "1 - J": _change(planned.routing, uniform.routing),
    }
    return [
        "",
        f"{plan.model}",
        f"{plan.scheme} in {plan.export_format} for {engine}, budget {plan.budget}"
        f"{active}, metric {plan.metric}, {plan.tokens:,} tokens",
        "measured, all units rounded to nearest, nothing tuned:",
        f"  uniform  {_cost(uniform)}",
        f"  plan     {_cost(planned)}",
        f"           {', '.join(f'{value} {n}' for n, value in change.items())}",
        f"  KL predicted for the plan {plan.predicted_kl:.5f} ({plan.flip_kl:.3f} of "
        f"each changed choice); sum of the units' own {plan.sum_kl:.5f}",
    ]


def _cost(cost: Cost) -> str:
    return (
        f"{cost.bytes / _MIB:,.2f} MiB, {cost.active_bytes / _MIB:,.2f} MiB active, "
        f"KL {cost.kl:.5f}, 1 - J {cost.routing:.5f}"
    )


def _change(value: float, before: float) -> str:
    return f"{100 * (value / before - 1):+.1f} %" if before else "+0.0 %"
