# SPDX-License-Identifier: Apache-2.0
"""Whether a run of AutoRound can be resumed, and what must be the same for that."""

import hashlib
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import envs
from auto_round.compressors.utils import _get_save_folder_name
from auto_round.utils import get_block_names
from torch import Tensor

from vsraq.realignment.record import tensor_bytes
from vsraq.resume.guard import ResumableRun
from vsraq.resume.output_folder import check_writable, refuse_leftovers


def export_folders(orchestrator: Any) -> list[Path]:
    """List the folders of `quantize_and_save`'s exports; none for `quantize` alone."""
    formats = getattr(orchestrator, "formats", None)
    if not isinstance(formats, list) or orchestrator.output_dir is None:
        return []
    return [Path(_get_save_folder_name(f)).resolve() for f in formats]


def open_run(
    orchestrator: Any, settings: Mapping[str, str]
) -> tuple[ResumableRun | None, int]:
    """Take the output folders of a run, and its resume directory, if it has one.

    Args:
        orchestrator: AutoRound's, with its block inputs collected.
        settings: Of the algorithm, as text.

    Returns:
        The run, None without `AR_RESUME_DIR`, and how many of its blocks are done.

    Raises:
        ValueError: An output folder holds other weights, the run cannot be resumed,
            or `AR_RESUME_DIR` holds another run.
        OSError: A folder cannot be written.
    """
    folders = export_folders(orchestrator)
    for folder in folders:
        check_writable(folder)
    if not envs.AR_RESUME_DIR:
        for folder in folders:
            refuse_leftovers(folder)
        return None, 0
    groups = orchestrator.quant_block_list or get_block_names(orchestrator.model)
    _check_resumable(orchestrator, folders, groups)
    run = ResumableRun(
        envs.AR_RESUME_DIR,
        folders[0],
        groups[0],
        {**settings, **_settings_of(orchestrator, folders[0], groups[0])},
    )
    return run, run.open()


def _check_resumable(
    orchestrator: Any, folders: list[Path], groups: list[list[str]]
) -> None:
    reason = None
    if not orchestrator.compress_context.is_immediate_saving or len(folders) != 1:
        reason = (
            "this run does not write its blocks as it goes; that needs "
            "quantize_and_save with one format, low_cpu_mem_usage=True, and no "
            "quantized layer outside the blocks"
        )
    elif orchestrator.nblocks != 1:
        reason = f"AutoRound resumes runs with nblocks=1, not {orchestrator.nblocks}"
    elif len(groups) != 1:
        reason = (
            f"AutoRound resumes one stack of blocks, and this model has {len(groups)}"
        )
    if reason is not None:
        raise ValueError(
            f"AR_RESUME_DIR={envs.AR_RESUME_DIR!r}: a killed run could not be resumed: "
            f"{reason}; change that, or unset AR_RESUME_DIR"
        )
    # AutoRound would read a block of an earlier run from there, whatever its model
    offloader = orchestrator._offloader
    offloaded = Path(envs.AR_WORK_SPACE) / "offload" / f"{offloader._prefix}_resume"
    if offloader.mode == "offload" and any(offloaded.glob("*.safetensors")):
        raise ValueError(
            f"AR_RESUME_DIR={envs.AR_RESUME_DIR!r}: {str(offloaded)!r} holds blocks of "
            "an earlier run, which AutoRound would take for this model's; delete that "
            "folder, or set AR_WORK_SPACE to another one"
        )


def _settings_of(orchestrator: Any, output: Path, blocks: list[str]) -> dict[str, str]:
    """Collect what decides the tuned weights and files besides the algorithm."""
    source = source_of(orchestrator)
    return {
        "model": source or type(orchestrator.model).__name__,
        "model_files": _stamp(source),
        "blocks": " ".join(blocks),
        "calibration": _digest((orchestrator.inputs or {}).get(blocks[0])),
        "scheme": str(orchestrator.scheme_context),
        "output": str(output),
        "format": ",".join(f.get_backend_name() for f in orchestrator.formats),
        "max_shard_size": str(getattr(orchestrator, "max_shard_size", None)),
        "device": torch.device(orchestrator.device).type,
        **{name: version(name) for name in ("auto-round", "torch", "transformers")},
    }


def source_of(orchestrator: Any) -> str | None:
    """Return where the model of a run came from, None if that is unknown."""
    context = orchestrator.model_context
    streamed = getattr(context, "disk_stream_model_dir", None)
    config = getattr(context.model, "config", None)
    return streamed or getattr(config, "_name_or_path", None) or None


def model_and_scheme(orchestrator: Any) -> tuple[str, str]:
    """Return where a run's model came from, or its class, and its scheme's name.

    Of a model of the hub, AutoRound knows the folder in the cache: its id is in there.
    """
    source = source_of(orchestrator) or type(orchestrator.model).__name__
    for part in Path(source).parts:
        if part.startswith("models--"):
            source = part.removeprefix("models--").replace("--", "/")
    return source, str(orchestrator.orig_scheme)


def block_count(orchestrator: Any) -> int:
    """Count the blocks that a run tunes; with `nblocks`, groups of them."""
    groups = orchestrator.quant_block_list or get_block_names(orchestrator.model)
    return sum(math.ceil(len(group) / orchestrator.nblocks) for group in groups)


def _stamp(source: str | None) -> str:
    """List sizes and times of a model's files; empty if it is not a folder."""
    if source is None or not Path(source).is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in {".safetensors", ".bin", ".json", ".py"}:
            status = path.stat()
            digest.update(
                f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode()
            )
    return digest.hexdigest()[:16]


def _digest(inputs: Any) -> str:
    """Hash the first block's inputs: they show the text, its length and its tokens."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        elif isinstance(value, dict):
            for key in sorted(value):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)

    add(inputs)
    return digest.hexdigest()[:16]
