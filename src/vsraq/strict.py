# SPDX-License-Identifier: Apache-2.0
"""Check what a user writes with pydantic, and refuse it in one line.

A subclass of `StrictModel` is a table of keys: each has a type and a description of
what is allowed. Nothing is converted: "0.9" is no number, True no int, NaN no value.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

_LONGEST = 200


class StrictModel(BaseModel):
    """A table of keys; every field's description says what is allowed."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )


def check_values(
    table: type[StrictModel], values: Mapping[str, Any], section: str = ""
) -> None:
    """Check values against a table.

    Args:
        table: The keys, their types and what is allowed.
        values: What the user gave; keys that are left out are not checked.
        section: What stands before the keys in messages, such as "calibration".

    Raises:
        ValueError: A key is unknown or missing, or a value is not allowed; one line.
    """
    refuse_unknown(values, table.model_fields, section)
    try:
        table.model_validate(dict(values))
    except ValidationError as error:
        prefix = f"{section}." if section else ""
        faults = error.errors(include_url=False, include_context=False)
        missing = [str(f["loc"][0]) for f in faults if f["type"] == "missing"]
        if missing:
            names = ", ".join(prefix + name for name in missing)
            raise ValueError(f"{names}: missing; the recipe needs a value") from None
        key = str(faults[0]["loc"][0])
        allowed = table.model_fields[key].description
        raise ValueError(
            f"{prefix}{key}={shown(values[key])}: allowed is {allowed}"
        ) from None


def refuse_unknown(
    values: Mapping[str, Any], known: Iterable[str], section: str = ""
) -> None:
    """Refuse a key that is not known.

    Raises:
        ValueError: A key is unknown; the message has the nearest known one.
    """
    known = sorted(known)
    prefix = f"{section}." if section else ""
    for key in values:
        if key not in known:
            raise ValueError(
                f"{prefix}{shown(key).strip(chr(39))}: unknown key"
                f"{did_you_mean(key, known, prefix)} Allowed are "
                f"{', '.join(prefix + name for name in known)}"
            )


def did_you_mean(value: object, known: Iterable[str], prefix: str = "") -> str:
    """Return the nearest known name as a question, or a full stop."""
    near = difflib.get_close_matches(str(value)[:_LONGEST], known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else "."


def shown(value: object) -> str:
    """Format a value for a message: on one line, and shortened."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = f"a {type(value).__name__} of more than 4300 digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
