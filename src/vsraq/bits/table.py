# SPDX-License-Identifier: Apache-2.0
"""A bit plan as text."""

from vsraq.bits.plan import BitPlan, Cost, PlannedUnit

_MIB = 2**20


def format_plan(plan: BitPlan) -> str:
    """Format a plan: a line per unit, and what the plan does as a whole."""
    schemes = list(dict.fromkeys(s for u in plan.units for s in u.candidates))
    header = ["unit", "scheme", "MiB", "active MiB"]
    header += [f"KL {s}" for s in schemes] + [f"1-J {s}" for s in schemes]
    lines = [header, *(_line(unit, schemes) for unit in plan.units)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", *_summary(plan)])


def _line(unit: PlannedUnit, schemes: list[str]) -> list[str]:
    chosen = unit.candidates[unit.chosen]
    kls = [_number(unit.candidates.get(s), "kl") for s in schemes]
    routing = [_number(unit.candidates.get(s), "routing") for s in schemes]
    mebibytes = [f"{chosen.bytes / _MIB:.2f}", f"{chosen.active_bytes / _MIB:.2f}"]
    return [unit.name, unit.chosen, *mebibytes, *kls, *routing]


def _number(cost: Cost | None, name: str) -> str:
    return "" if cost is None else f"{getattr(cost, name):.5f}"


def _summary(plan: BitPlan) -> list[str]:
    uniform, planned = plan.uniform, plan.planned
    return [
        f"{plan.model}, {plan.scheme}, engine {plan.engine}, budget {plan.budget}, "
        f"active budget {plan.active_budget}, metric {plan.metric}, "
        f"{plan.tokens:,} tokens; rounded to nearest, nothing tuned:",
        f"  uniform: {_cost(uniform)}",
        f"  plan:    {_cost(planned)} ({_change(planned.bytes, uniform.bytes)} bytes, "
        f"{_change(planned.active_bytes, uniform.active_bytes)} active, "
        f"{_change(planned.kl, uniform.kl)} KL, "
        f"{_change(planned.routing, uniform.routing)} 1-J)",
        f"  KL predicted {plan.predicted_kl:.5f}: the sum of the units' own is "
        f"{plan.sum_kl:.5f}; damages add with p = {plan.exponent:.2f}",
    ]


def _cost(cost: Cost) -> str:
    return (
        f"{cost.bytes / _MIB:.2f} MiB, {cost.active_bytes / _MIB:.2f} active, "
        f"KL {cost.kl:.5f}, 1-J {cost.routing:.5f}"
    )


def _change(value: float, before: float) -> str:
    return f"{100 * (value / before - 1):+.1f} %" if before else "+0.0 %"
