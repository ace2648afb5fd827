# SPDX-License-Identifier: Apache-2.0
"""The choice of one scheme per unit: the least damage within a budget of bytes."""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp


class Offer(NamedTuple):
    """One scheme for one unit.

    Attributes:
        size: What it takes of the budget, in the budget's unit.
        active: What one token reads of that.
        damage: What it costs, in any unit; damages add.
    """

    size: float
    active: float
    damage: float


def choose(
    units: Sequence[Mapping[str, Offer]],
    limit: float,
    active_limit: float | None = None,
    gap: float = 0.0,
) -> list[str]:
    """Choose the schemes with the least sum of damages, exactly.

    With x_uc in {0, 1}: minimize sum x_uc d_uc, so that every unit u has one scheme c,
    and sum x_uc size_uc <= limit; a mixed-integer programme, solved by HiGHS.

    Args:
        units: For each unit, its offers by the scheme's name.
        limit: The most that all sizes may add up to.
        active_limit: The same for what a token reads; None for any.
        gap: How far above the least the sum may be, as a share of it; faster.

    Returns:
        The name of each unit's scheme.

    Raises:
        ValueError: No choice is within the limits.
    """
    smallest = sum(min(offer.size for offer in unit.values()) for unit in units)
    if smallest > limit:
        raise ValueError(
            f"budget: {limit:,.0f} is less than the smallest schemes take, "
            f"{smallest:,.0f}; allowed is that or more, or add a smaller scheme to "
            "options"
        )
    offers = [offer for unit in units for offer in unit.values()]
    sizes = [[offer.size for offer in offers]]
    limits = [limit]
    if active_limit is not None:
        sizes.append([offer.active for offer in offers])
        limits.append(active_limit)
    arrays = numpy.array(sizes), numpy.array(limits)
    with _silent():
        chosen = _solve(_one_each(units), *arrays, offers, gap)
    taken = iter(chosen)
    return [next(n for n, x in [(n, next(taken)) for n in u] if x) for u in units]


def _one_each(units: Sequence[Mapping[str, Offer]]) -> numpy.ndarray:
    """Return the matrix of which offer belongs to which unit, (units, offers)."""
    counts = [len(unit) for unit in units]
    return numpy.repeat(numpy.eye(len(units)), counts, axis=1)


def _solve(
    one_each: numpy.ndarray,
    sizes: numpy.ndarray,
    limits: numpy.ndarray,
    offers: Sequence[Offer],
    gap: float,
) -> numpy.ndarray:
    """Return which offers are taken.

    HiGHS works with numbers around 1, and what is less than a millionth of them may be
    missed. So what every choice takes is left out; a choice that exceeds a limit lowers
    the limit by what was too much; and offers that alone do more than a whole choice
    that was found are dropped, and the rest is solved again in its own unit.
    """
    slack = 1e-13 * numpy.abs(limits)  # of sums of fractions; far below a byte
    sizes, limits = _beyond_least(one_each, sizes, limits)
    damages = numpy.array([[offer.damage for offer in offers]])
    damages = _beyond_least(one_each, damages, numpy.zeros(1))[0][0]
    scales = sizes.max(axis=1, initial=1.0)
    allowed = limits.astype(float)
    rows = sizes / scales[:, None]
    most = numpy.inf  # what the best choice does at most
    while True:
        kept = damages <= most
        unit = damages[kept].max() or 1.0
        result = milp(
            numpy.where(kept, damages, 0.0) / unit,
            integrality=numpy.ones(len(offers)),
            bounds=Bounds(0, kept.astype(float)),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(rows, -numpy.inf, allowed / scales),
            ],
            options={"mip_rel_gap": gap},
        )
        if not result.success:
            raise ValueError(
                f"no choice of schemes is within the budgets ({result.message}), which "
                "leave "
                + " and ".join(f"{left:,.0f}" for left in limits)
                + " beyond the smallest schemes; allow more bytes, or add a smaller "
                "scheme to options"
            )
        taken: numpy.ndarray = result.x > 0.5
        excess = sizes @ taken - limits
        if (excess > slack).any():
            allowed = allowed - excess.clip(min=0)
            continue
        most = damages @ taken
        if unit <= most or not most:
            return taken


def _beyond_least(
    one_each: numpy.ndarray, sizes: numpy.ndarray, limits: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return sizes and limits without the least that each unit takes."""
    unit_of = one_each.argmax(axis=0)
    least = numpy.full((len(sizes), len(one_each)), numpy.inf)
    for row, values in zip(least, sizes, strict=True):
        numpy.minimum.at(row, unit_of, values)
    return sizes - least[:, unit_of], limits - least.sum(axis=1)


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what HiGHS writes to the standard output of the process.

    It has lines for debugging that no option switches off.
    """
    try:
        kept = os.dup(1)
    except OSError:  # the process has none
        yield
        return
    _flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write what Python and C still hold for the standard output."""
    sys.stdout.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
