# SPDX-License-Identifier: Apache-2.0
"""Which files of a checkpoint folder transformers loads weights from."""

import json
from pathlib import Path

from vsraq.checkpoint.faults import CheckpointError

# in the order in which transformers looks for them
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_files(folder: Path) -> list[Path]:
    """List the files of a checkpoint's weights.

    Other files count for nothing: consolidated copies of the weights, adapters, or
    tensors that are no weights.

    Args:
        folder: Of the checkpoint.

    Returns:
        Files that are there; none for other kinds of checkpoints.

    Raises:
        CheckpointError: The index cannot be read.
    """
    found = next((name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        return []
    if not found.endswith(".json"):
        return [folder / found]
    try:
        named = json.loads((folder / found).read_text(encoding="utf-8"))
        names = sorted(set(named["weight_map"].values()))
        paths = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(folder, [f"{found}: cannot be read ({error})"]) from error
    return [path for path in paths if path.is_file()]
