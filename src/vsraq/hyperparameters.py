# SPDX-License-Identifier: Apache-2.0
"""Which values the hyper-parameters of the losses may have.

A name means the same in every loss, so each name has one row here.
"""

import sys
from collections.abc import Callable
from typing import Any


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool | str)
        and abs(value) <= sys.float_info.max  # which an int may exceed
    )


_POSITIVE_INT = (lambda v: _is_int(v) and v >= 1, "a positive int")
_FINITE = (_is_finite, "a finite number")
_NOT_NEGATIVE = (lambda v: _is_finite(v) and v >= 0, "a finite number >= 0")
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "top_k": _POSITIVE_INT,
    "boundary": _POSITIVE_INT,
    "multiplier": (
        lambda v: v == "all" or _POSITIVE_INT[0](v),
        'a positive int or "all"',
    ),
    "top_m": (lambda v: v is None or _POSITIVE_INT[0](v), "a positive int or None"),
    "alpha": (lambda v: _is_finite(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "gamma": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "kl_weight": _NOT_NEGATIVE,
    "margin": _FINITE,
    "rank_margin": _FINITE,
    "rank_weight": _NOT_NEGATIVE,
    "margin_weight": _NOT_NEGATIVE,
}


def check_hyperparameters(**hyperparameters: Any) -> None:
    """Check values that do not depend on a tensor; unknown names pass.

    Raises:
        ValueError: One is not allowed; the message has its name, its value and what
            is allowed.
    """
    for name, value in hyperparameters.items():
        is_allowed, allowed = ALLOWED.get(name, (lambda _: True, ""))
        if not is_allowed(value):
            raise ValueError(f"{name}={value!r}: allowed is {allowed}")
