# SPDX-License-Identifier: Apache-2.0
"""`vsraq_run.json`: what a run did, beside each of its exports.

`docs/run_record.md` says what the keys mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vsraq import stamp
from vsraq.callbacks import BlockResult
from vsraq.strict import StrictModel
from vsraq.whole_file import write_whole

FILE_NAME = "vsraq_run.json"
FORMAT = "vsraq-run/1"
PACKAGES = ("vsraq", "auto-round", "torch", "transformers")


class RouterEntry(StrictModel):
    """A router whose re-fit was tried."""

    name: str
    refit: bool
    logit_error: tuple[float | None, float | None] = Field(strict=False)
    jaccard: tuple[float | None, float | None] | None = Field(strict=False)


class BlockEntry(StrictModel):
    """A block that was tuned."""

    name: str
    seconds: float
    iterations: int
    best_iteration: int
    losses: dict[str, list[float | None]]
    weights: dict[str, float | None]
    routers: list[RouterEntry]


class Seconds(StrictModel):
    """Wall time."""

    planning: float | None
    tuning: float


class Peak(StrictModel):
    """Memory in MiB."""

    host: float | None
    devices: dict[str, float]


class RunFile(StrictModel):
    """The whole file."""

    format: Literal["vsraq-run/1"]
    created: str
    versions: dict[str, str]
    model: str
    scheme: str
    recipe: dict[str, Any] | None
    seconds: Seconds
    peak_mebibytes: Peak
    blocks: list[BlockEntry]
    coverage: dict[str, list[int]] | None


def block_entry(result: BlockResult) -> dict[str, Any]:
    """Return what the file says of a block; what is not finite is null."""
    return {
        "name": result.block.name,
        "seconds": round(result.seconds, 3),
        "iterations": result.iterations,
        "best_iteration": result.best_iteration,
        "losses": {k: [_short(v) for v in loss] for k, loss in result.losses.items()},
        "weights": {label: _short(w) for label, w in result.weights.items()},
        "routers": [
            {
                "name": router.name,
                "refit": router.refit,
                "logit_error": [_short(value) for value in router.logit_error],
                "jaccard": router.jaccard and [_short(v) for v in router.jaccard],
            }
            for router in result.routers
        ],
    }


def _short(value: float) -> float | None:
    """Round to six digits; None for what JSON has no number for."""
    return float(f"{value:.6g}") if abs(value) < float("inf") else None


def run_file(
    *,
    model: str,
    scheme: str,
    seconds: float,
    peak_mebibytes: Mapping[str, Any],
    blocks: list[dict[str, Any]],
    coverage: Mapping[str, list[int]] | None,
) -> dict[str, Any]:
    """Return the content of the file of a run without a recipe.

    Args:
        model: Where the model came from, or its class.
        scheme: AutoRound's name of the scheme.
        seconds: Of calibration and tuning, in all processes that took turns.
        peak_mebibytes: See `vsraq.run_record.peak_memory`.
        blocks: See `block_entry`.
        coverage: By router, calibration tokens of each expert.
    """
    return {
        "format": FORMAT,
        "created": stamp.now(),
        "versions": stamp.versions(*PACKAGES),
        "model": model,
        "scheme": scheme,
        "recipe": None,
        "seconds": {"planning": None, "tuning": round(seconds, 3)},
        "peak_mebibytes": dict(peak_mebibytes),
        "blocks": blocks,
        "coverage": None if coverage is None else dict(coverage),
    }


def write_run(folder: str | Path, content: Mapping[str, Any]) -> Path:
    """Write `vsraq_run.json` into a folder, whole or not at all.

    Returns:
        The file's path.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(folder) / FILE_NAME
    write_whole(path, json.dumps(content, allow_nan=False) + "\n")
    return path


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read the `vsraq_run.json` of an export.

    Args:
        folder: Of the export, or the file itself.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not such a file, or one of another version.
    """
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        RunFile.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(
            f"{path}: {where}: {fault['msg']}; allowed is a {FILE_NAME} of format "
            f"{FORMAT}"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: it is not readable as JSON ({error}); allowed is a {FILE_NAME}"
        ) from error
    return content


def add_recipe(
    folder: Path,
    model: str,
    scheme: str,
    recipe: Mapping[str, Any],
    planning: float | None,
) -> None:
    """Add to an export's file what only its recipe knows.

    Args:
        folder: Of the export.
        model: As the recipe names it.
        scheme: As the recipe names it.
        recipe: Every setting with its final value.
        planning: Seconds that its bit plan took, None without one.

    Raises:
        ValueError: There is no such file, or it is another one.
    """
    content = read_run(folder) | {"model": model, "scheme": scheme}
    content["recipe"] = dict(recipe)
    content["seconds"]["planning"] = None if planning is None else round(planning, 3)
    write_run(folder, content)
