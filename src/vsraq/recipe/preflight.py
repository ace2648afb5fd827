# SPDX-License-Identifier: Apache-2.0
"""What can be known before hours of work: model, output, room on disk, samples."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.calib_dataset import CALIB_DATASETS
from transformers import AutoTokenizer

from vsraq.autoround.calibration_data import refuse_parts_of_names
from vsraq.autoround.config import VSRAQConfig
from vsraq.calibration import Part, draw, parse_names
from vsraq.recipe.callbacks import make_callbacks
from vsraq.recipe.inspect import Inspected, inspect
from vsraq.recipe.recipe import Recipe
from vsraq.strict import did_you_mean
from vsraq.tokens import TokenMask

_ENOUGH = 0.9  # of the estimate must be free; it is wrong by less than the rest


@dataclass(frozen=True)
class Estimate:
    """A summary of a run before it starts.

    Attributes:
        model_type: Of the model's config.
        routers: MoE routers in it.
        parameters: Weights of the model.
        export_bytes: Estimate of the exports, all formats together.
        resume_bytes: Estimate of AutoRound's resume files; 0 without `AR_RESUME_DIR`.
        free_bytes: Free where the exports go.
    """

    model_type: str
    routers: int
    parameters: int
    export_bytes: int
    resume_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        resume = f", resume files about {_gb(self.resume_bytes)}" * bool(
            self.resume_bytes
        )
        return (
            f"{self.model_type} with {self.parameters / 1e9:.3g} G parameters and "
            f"{self.routers} routers; export about {_gb(self.export_bytes)}{resume}, "
            f"{_gb(self.free_bytes)} free"
        )


def check(recipe: Recipe, found: Inspected | None = None) -> Estimate:
    """Check everything that a recipe needs, without loading a weight.

    Args:
        recipe: A valid recipe.
        found: What `inspect` returned for it, if it was called before.

    Returns:
        What the run would do.

    Raises:
        FileNotFoundError: The model, a data set's file, the token mask or the bit plan
            is missing.
        ValueError: The output cannot be written, the package of a callback is missing,
            the model is unknown or not a mixture of experts, or there is too little
            room or calibration text.
    """
    config = recipe.algorithm_config()
    make_callbacks(recipe.callbacks)  # their packages are installed
    folder = _writable(recipe.output, "output")
    if isinstance(config, VSRAQConfig) and isinstance(config.token_mask, str | Path):
        TokenMask.load(config.token_mask)
    found = inspect(recipe) if found is None else found
    resume_dir = os.environ.get("AR_RESUME_DIR")
    estimate = Estimate(
        model_type=found.config.model_type,
        routers=len(found.routers),
        parameters=found.parameters,
        export_bytes=found.export_bytes,
        resume_bytes=resume_bytes(found) if resume_dir else 0,
        free_bytes=shutil.disk_usage(folder).free,
    )
    _check_room(estimate, folder, resume_dir)
    _check_samples(recipe)
    return estimate


def resume_bytes(found: Inspected) -> int:
    """Estimate what AutoRound keeps to resume: both streams of hidden states.

    Args:
        found: The recipe and its model.
    """
    calibration = found.recipe.calibration
    return 2 * 2 * calibration.nsamples * calibration.seqlen * found.hidden


def check_file(path: Path, name: str) -> None:
    """Check that a file can be written.

    Args:
        path: The file; its folder need not exist.
        name: What the message calls it.

    Raises:
        ValueError: It is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{name}={str(path)!r}: a folder; allowed is a file")
    _writable(str(path.parent), name)


def _writable(path: str, name: str) -> Path:
    """Return the nearest existing folder above a path, which must be writable."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{name}={path!r}: {folder} is a file; allowed is a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"{name}={path!r}: {folder} cannot be written ({error.strerror}); allowed "
            "is a writable folder"
        ) from error


def _check_room(estimate: Estimate, output: Path, resume_dir: str | None) -> None:
    needed = estimate.export_bytes
    if resume_dir:
        folder = _writable(resume_dir, "AR_RESUME_DIR")
        if folder.stat().st_dev == output.stat().st_dev:
            needed += estimate.resume_bytes
        elif shutil.disk_usage(folder).free < _ENOUGH * estimate.resume_bytes:
            raise ValueError(
                f"AR_RESUME_DIR={resume_dir!r}: {_gb(shutil.disk_usage(folder).free)} "
                f"free, the run needs about {_gb(estimate.resume_bytes)} there"
            )
    if estimate.free_bytes < _ENOUGH * needed:
        raise ValueError(
            f"output: {_gb(estimate.free_bytes)} free at {output}, the run needs about "
            f"{_gb(needed)}; free some, or write to another disk"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _check_samples(recipe: Recipe) -> None:
    """Check that all data sets are known, and that a single local one is enough."""
    dataset = recipe.calibration.dataset
    try:
        refuse_parts_of_names(dataset)
    except ValueError as error:
        raise ValueError(f"calibration.{error}") from error
    ours = parse_names(dataset)
    parts = [part.name for part in ours if part.source is None]
    files = [part for part in ours if part.source is not None and part.source.is_file]
    for file in files:
        _refuse_spaces(dataset)
        if not Path(file.name).is_file():
            raise FileNotFoundError(_no_such_file(file.name))
    if not ours:
        parts = dataset.split(",")
    elif len(files) == len(ours):  # nothing has to be downloaded
        _draw(recipe, ours)
    for part in parts:
        name = part.partition(":")[0]
        if Path(name).is_file():
            _check_local(name)
        elif name.endswith((".json", ".jsonl", ".txt")) or name.startswith(("/", ".")):
            raise FileNotFoundError(_no_such_file(name))
        elif not any(name.split("/")[-1] in known for known in CALIB_DATASETS):
            known = sorted(CALIB_DATASETS)
            raise ValueError(
                f"calibration.dataset={name!r}: unknown{did_you_mean(name, known)} "
                f"Allowed are a .jsonl file, or {', '.join(known)}"
            )
    if len(parts) == 1 and Path(parts[0]).is_file():  # without AutoRound's options
        _count_samples(recipe, Path(parts[0]))


def _check_local(name: str) -> None:
    if not name.endswith((".json", ".jsonl")):
        raise ValueError(
            f"calibration.dataset={name!r}: AutoRound reads .json and .jsonl files; "
            "convert it to a .jsonl file with a text per line"
        )
    _refuse_spaces(name)


def _no_such_file(name: str) -> str:
    return (
        f"calibration.dataset={name!r}: no such file; allowed is a .json or .jsonl "
        "file, or one of AutoRound's data sets"
    )


def _refuse_spaces(name: str) -> None:
    if " " in name:
        raise ValueError(
            f"calibration.dataset={name!r}: AutoRound drops spaces from the name; "
            "allowed is a path without spaces"
        )


def _tokenizer(recipe: Recipe) -> Any:
    return AutoTokenizer.from_pretrained(
        recipe.model,
        trust_remote_code=bool(recipe.runtime.get("trust_remote_code", False)),
    )


def _draw(recipe: Recipe, parts: Sequence[Part]) -> None:
    calibration = recipe.calibration
    try:
        draw(
            parts,
            _tokenizer(recipe),
            calibration.nsamples,
            calibration.seqlen,
            calibration.seed,
        )
    except ValueError as error:
        raise ValueError(f"calibration.{error}") from error


def _count_samples(recipe: Recipe, path: Path) -> None:
    tokenizer = _tokenizer(recipe)
    seqlen, wanted = recipe.calibration.seqlen, recipe.calibration.nsamples
    texts = enough = longest = 0
    for text in _texts(path):
        texts += 1
        encoded = tokenizer(text, truncation=True, max_length=seqlen)["input_ids"]
        longest = max(longest, len(encoded))
        enough += len(encoded) >= seqlen
        if enough == wanted:
            return
    raise ValueError(
        f"calibration.dataset={str(path)!r}: {enough} of {texts} texts have "
        f"calibration.seqlen={seqlen} tokens or more (the longest has {longest}), "
        f"calibration.nsamples={wanted} are wanted; AutoRound drops shorter ones, so "
        "use more or longer texts, or lower one of the two"
    )


def _texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file as AutoRound reads them."""
    with path.open(encoding="utf-8") as file:
        try:
            if path.suffix == ".json":
                data = json.load(file)
                samples: Any = data.values() if isinstance(data, dict) else data
            else:
                samples = map(json.loads, file)
            for number, sample in enumerate(samples, 1):
                yield _text(sample, path, number)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"calibration.dataset={str(path)!r}: no JSON in UTF-8 ({error})"
            ) from error


def _text(sample: Any, path: Path, number: int) -> str:
    text = sample
    if isinstance(sample, dict):
        text = next(iter(sample.values())) if len(sample) == 1 else sample.get("text")
    if not isinstance(text, str):
        raise ValueError(
            f"calibration.dataset={str(path)!r}: sample {number} has no text; allowed "
            'is a string, or a mapping with a "text"'
        )
    return text.rstrip()
