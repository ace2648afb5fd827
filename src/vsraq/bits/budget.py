# SPDX-License-Identifier: Apache-2.0
"""Budgets of bytes, as users give them."""

import math

_MOST = 2**63  # bytes; far beyond any export


def budget_bytes(name: str, budget: str | int, uniform: float) -> float:
    """Compute how many bytes a budget allows.

    Args:
        name: The option's, for errors.
        budget: Bytes beyond the uniform export's: a share of it such as "3%" or "-1%",
            or a number.
        uniform: Bytes of the uniform export.

    Raises:
        ValueError: It is neither, or not finite.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        if abs(budget) < _MOST:
            return uniform + budget
    else:
        text = str(budget).strip()
        try:
            share = float(text.removesuffix("%")) if text.endswith("%") else math.nan
        except ValueError:
            share = math.nan
        if abs(share) < _MOST:
            return uniform * (1 + share / 100)
    raise ValueError(
        f"{name}={budget!r}: allowed is a share of the uniform export, such as "
        '"3%" or "-1%", or a number of bytes'
    )
