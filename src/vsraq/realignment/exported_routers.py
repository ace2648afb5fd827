# SPDX-License-Identifier: Apache-2.0
"""Re-fitted routers as an export must hold them.

At the end of every export AutoRound replaces tensors that are F32 in the source and
16-bit in the export by the source's values (`utils/missing_tensors.py`). So a router
whose source is F32 loses its re-fit. It is written again, in the dtype that the file
then has: an F32 tensor holds the tuned 16-bit weight exactly.
"""

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vsraq.realignment.record import (
    digest,
    stored_name,
    tensor_bytes,
    write_record,
)
from vsraq.resume.output_folder import export_folders

logger = logging.getLogger("autoround.vsraq")

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def around_saving(
    orchestrator: Any,
    start: Callable[[Path], None],
    finish: Callable[[list[Path]], None],
) -> None:
    """Call functions before and after every export of this AutoRound run.

    No seam of AutoRound comes after its last change of an export, so
    `save_quantized` of this one object is wrapped.

    Args:
        orchestrator: AutoRound's.
        start: Called with the folder that the export is to be written to.
        finish: Called with the folders that were written, one per format.
    """
    save: Callable[..., Any] = orchestrator.save_quantized
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_quantized(*args: Any, **kwargs: Any) -> Any:
        # by name: models with images have another order, and pass the rest on
        named = signature.bind(*args, **kwargs).arguments
        named |= named.pop("kwargs", {})
        wanted = named.pop("return_folders", False)
        if named.get("output_dir") is not None:
            start(Path(named["output_dir"]))
        saved = save(**named, return_folders=True)
        if saved is None:  # nothing was quantized yet
            return None
        model, folders = saved
        finish(export_folders(folders))
        return (model, folders) if wanted else model

    orchestrator.save_quantized = save_quantized


def restore_refitted_routers(
    folder: str | Path, model: nn.Module, weights: Mapping[str, Tensor]
) -> None:
    """Make an export hold the re-fitted routers, and record their digests.

    Files that are not safetensors (GGUF) are left alone: AutoRound does not touch the
    routers in them.

    Args:
        folder: Of the export.
        model: The model that was exported; it knows how its tensors are stored.
        weights: The re-fitted weights by their names in the model, (E, H).

    Raises:
        RuntimeError: The export does not hold a router, or holds one of another shape
            or of a dtype that is not floating point.
        OSError: A file cannot be read or written.
    """
    folder = Path(folder)
    files = _tensor_files(folder)
    if not files or not (folder / "config.json").is_file():
        return
    digests, restored = {}, []
    for parameter_name, weight in weights.items():
        name = stored_name(model, parameter_name)
        if name not in files:
            raise RuntimeError(
                f"{folder}: it holds no tensor {name}, the weight of a re-fitted "
                "router; allowed are exports that keep routers under the names of the "
                "source; export to another format, or pass realign_routers=False"
            )
        changed, digests[name] = _write_tensor(files[name], name, weight)
        restored += [name] * changed
    write_record(folder, digests)
    if restored:
        logger.info(
            "vsraq: %d re-fitted routers were written again, because AutoRound had put "
            "the source's float32 ones back: %s",
            len(restored),
            ", ".join(restored),
        )


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Find the file of each tensor of an export."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in named.items()}
    files: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), path)
    return files


def _write_tensor(path: Path, name: str, weight: Tensor) -> tuple[bool, str]:
    """Write a weight into a file; return whether that changed it, and its digest."""
    with path.open("r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_size))[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None or tuple(entry["shape"]) != tuple(weight.shape):
            raise RuntimeError(
                f"{path}: router weight {name} is stored as {entry['dtype']} "
                f"{tuple(entry['shape'])}; allowed is {', '.join(_DTYPES)} "
                f"{tuple(weight.shape)}; export to another format"
            )
        expected = tensor_bytes(weight.to(dtype))
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        file.seek(start)
        if file.read(end - start) == expected:
            return False, digest(expected)
        file.seek(start)
        file.write(expected)
        file.flush()
        os.fsync(file.fileno())
        file.seek(start)
        stored = file.read(end - start)
    if stored != expected:
        raise OSError(f"{path}: {name} reads back differently; check the disk")
    return True, digest(expected)
