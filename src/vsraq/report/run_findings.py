# SPDX-License-Identifier: Apache-2.0
"""What to look at first in an export: sentences from its run's record and its plan."""

from collections.abc import Iterator

from vsraq.bits.plan import BitPlan
from vsraq.report.figures.tuning_curves import kept
from vsraq.report.findings import Finding
from vsraq.report.schema import Run
from vsraq.report.wording import counted, fixed, listed, mean, number, percent

MIB = 2**20


def exported(run: Run | None, plan: BitPlan | None) -> list[Finding]:
    """Return what to look at first in an export.

    Args:
        run: Its run's record, or None.
        plan: Its bit plan, or None.
    """
    found: list[Finding] = []
    if run is not None:
        found += [*_coverage(run), *_tuning(run), *_refits(run), *_time(run)]
    if plan is not None:
        found.append(_plan(plan))
    return found


def _coverage(run: Run) -> Iterator[Finding]:
    if not run.coverage:
        return
    idle = [
        f"{expert} of {router}"
        for router, counts in run.coverage.items()
        for expert, count in enumerate(counts)
        if not count
    ]
    if idle:
        yield Finding(
            f"{counted(len(idle), 'expert')} saw no calibration token",
            f"Expert {listed(idle)}. Their rounding is untuned.",
            "Use more calibration samples, or other text.",
        )
        return
    router, counts = min(run.coverage.items(), key=lambda item: min(item[1]))
    fewest = min(counts)
    yield Finding(
        "Every expert saw calibration tokens",
        f"The fewest are {fewest:,}, for expert {counts.index(fewest)} of {router}.",
    )


def _tuning(run: Run) -> Iterator[Finding]:
    losses = {b.name: b.losses.get("reconstruction", ()) for b in run.blocks}
    changes = {
        block.name: change
        for block in run.blocks
        if (change := kept(block, losses[block.name] or (0.0,))) is not None
    }
    if not changes:
        return
    least = max(changes, key=changes.__getitem__)
    still = [block.name for block in run.blocks if block.best_iteration == 0]
    largest = max(changes, key=lambda name: losses[name][0] * changes[name])
    yield Finding(
        f"{counted(len(still), 'block')} of {len(changes)} gained nothing from tuning"
        if still
        else f"{least} gained least from tuning",
        f"The reconstruction loss of {least} changed by {percent(changes[least] - 1)}, "
        f"the mean block's by {percent(mean(list(changes.values())) - 1)}. The largest "
        f"loss that is left is that of {largest}: "
        f"{number(losses[largest][0] * changes[largest])}.",
        f"{listed(still)} kept the first iteration: try more of them, or a smaller "
        "learning rate."
        if still
        else "",
    )


def _refits(run: Run) -> Iterator[Finding]:
    pairs = [
        (router.name, *router.jaccard)
        for block in run.blocks
        for router in block.routers
        if router.refit and router.jaccard is not None
    ]
    left = sum(
        router.jaccard is not None and not router.refit
        for block in run.blocks
        for router in block.routers
    )
    gains = {
        name: after - before
        for name, before, after in pairs
        if before is not None and after is not None
    }
    if not gains:
        return
    better = sum(gain > 0 for gain in gains.values())
    worst = min(gains, key=gains.__getitem__)
    yield Finding(
        f"The re-fit helped {better} of {counted(len(gains), 'router')}",
        f"Jaccard changed by {fixed(mean(list(gains.values())), 4)} in the mean, least "
        f"in {worst}: {fixed(gains[worst], 4)}."
        + (f" {counted(left, 'router')} stayed as before." if left else ""),
    )


def _time(run: Run) -> Iterator[Finding]:
    tuning = run.seconds.get("tuning")
    if tuning is None:
        return
    slowest = max(run.blocks, key=lambda block: block.seconds or 0.0, default=None)
    text = ""
    if slowest is not None and slowest.seconds:
        text = (
            f"The slowest block was {slowest.name}, with {_duration(slowest.seconds)}."
        )
    host = run.peak_mebibytes.get("host")
    if isinstance(host, int | float):
        text += f" The host's memory peaked at {number(float(host))} MiB."
    yield Finding(f"Tuning took {_duration(tuning)}", text.strip())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _plan(plan: BitPlan) -> Finding:
    changed = [unit for unit in plan.units if unit.chosen != unit.base]
    size = plan.planned.bytes / plan.uniform.bytes - 1
    before, after = plan.uniform, plan.planned
    costliest = max(changed or plan.units, key=lambda u: u.candidates[u.base].kl)
    return Finding(
        f"The bit plan gives {counted(len(changed), 'unit')} of {len(plan.units)} "
        "another scheme",
        f"Rounded to nearest, KL goes from {number(before.kl)} to {number(after.kl)} "
        f"nats and 1 - Jaccard from {percent(before.routing, 1)} to "
        f"{percent(after.routing, 1)}, with {percent(size, 1)} more bytes "
        f"({number(after.bytes / MIB)} MiB). Of the changed units, {costliest.name} "
        "damages most.",
    )
