# SPDX-License-Identifier: Apache-2.0
"""Files of our own that hold a result: JSON with a format, checked when it is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from vsraq.whole_file import write_whole

T = TypeVar("T")


def write_json_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file, completely or not at all.

    Args:
        path: The file; its folder must exist.
        values: What it holds, with its `format`.

    Raises:
        OSError: It cannot be written.
        ValueError: A number is not finite.
    """
    write_whole(path, f"{json.dumps(values, indent=1, allow_nan=False)}\n")


def read_json_file(path: Path, format: str, kind: type[T], refused: str) -> T:
    """Read what `write_json_file` has written.

    Args:
        path: The file.
        format: What it has to be.
        kind: The dataclass that it holds, besides its `format`.
        refused: What an error says: which file, what is allowed, and what to do.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text).pop("format", None)
        values = TypeAdapter(kind).validate_json(text, strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{refused} ({' '.join(str(error).split())})") from error
    if found != format:
        raise ValueError(f"{refused} (format={found!r})")
    return values
