# SPDX-License-Identifier: Apache-2.0
"""An export's folder must hold no other weights: loaders would mix or mistake them."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vsraq.resume.disk_errors import DiskError

logger = logging.getLogger("autoround.vsraq")

_EARLIER = "earlier-weights"

_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "*.gguf",
)


def export_folders(saved: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the folders of an export, which AutoRound gives for `return_folders`.

    Args:
        saved: A list for several formats; a folder comes back as it was given.
    """
    folders = [saved] if isinstance(saved, str | Path) else saved
    return [Path(folder) for folder in folders]


def weight_files(folder: Path) -> list[Path]:
    """List the weight files in a folder, and their indices."""
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})


def refuse_leftovers(folder: Path) -> None:
    """Refuse a folder that holds weights already.

    Raises:
        ValueError: It holds those of an earlier export, or of an unfinished run.
    """
    found = [path.name for path in weight_files(folder)]
    if found:
        named = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(
            f"output folder {str(folder)!r}: it holds weights that are not of this "
            f"run ({named}); allowed is a folder without weights, so that two exports "
            "do not mix; use another one, or delete these files"
        )


def check_writable(folder: Path) -> None:
    """Create the folder, and write into it.

    Raises:
        DiskError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise DiskError(
            error.errno,
            f"output folder {str(folder)!r} cannot be written ({error.strerror}), so "
            "nothing was tuned; use another one, or make room and allow writing in it",
        ) from error


def set_leftovers_aside(folder: Path) -> None:
    """Move the weights in a folder into a folder below it.

    `save_quantized` after `quantize` names the folder only when the tuning is done, so
    a refusal would lose hours of work.
    """
    found = weight_files(folder)
    if not found:
        return
    aside = folder / _EARLIER
    aside.mkdir(exist_ok=True)
    for path in found:
        path.replace(aside / path.name)
    logger.warning(
        "vsraq: output folder %r held weights of an earlier export; they are in %r "
        "now, so that two exports do not mix: %s",
        str(folder),
        str(aside),
        ", ".join(path.name for path in found),
    )
