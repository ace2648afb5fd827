# SPDX-License-Identifier: Apache-2.0
"""Samples as a file that a run reads by name: JSON with `input_ids`, one per line."""

import json
from collections.abc import Sequence
from pathlib import Path

from vsraq.whole_file import write_whole

FIELD = "input_ids"


def write_samples(path: str | Path, samples: Sequence[Sequence[int]]) -> str:
    """Write samples, whole or not at all.

    Args:
        path: The file.
        samples: Token ids, N lists.

    Returns:
        The name of that data set, for AutoRound and for recipes.

    Raises:
        ValueError: The path cannot stand in a data set's name.
    """
    name = str(path)
    if not name.endswith(".jsonl") or set(name) & set(" ,:"):
        raise ValueError(
            f"path={name!r}: allowed is a .jsonl file without spaces, commas and "
            "colons in its path, because AutoRound's names of data sets hold none"
        )
    lines = (json.dumps({FIELD: list(ids)}) for ids in samples)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), "".join(f"{line}\n" for line in lines))
    return f"{name}:{FIELD}"
