# SPDX-License-Identifier: Apache-2.0
"""What a folder holds: a comparison, a replay, a run, a bit plan, an export."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsraq.bits.plan import BitPlan
from vsraq.checkpoint.planned import PLAN_FILE
from vsraq.report.bits import Bits, read_bits
from vsraq.report.schema import (
    REPLAY_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TOKENS_FILE,
    Replay,
    Results,
    Run,
    read_table,
)

_FILES = (RESULTS_FILE, REPLAY_FILE, RUN_FILE, PLAN_FILE)


@dataclass(frozen=True)
class Folder:
    """What was read from one folder; what it does not have is None or empty.

    Attributes:
        path: The folder.
        results: A comparison.
        tokens: Of its sampled tokens: arrays (n,) by method and metric.
        replay: A replay of full precision's routing.
        run: A run's record.
        plan: A bit plan.
        bits: Bits of the export's layers.
        unread: What could not be read, and why; sentences.
    """

    path: Path
    results: Results | None = None
    tokens: Mapping[str, Mapping[str, Any]] | None = None
    replay: Replay | None = None
    run: Run | None = None
    plan: BitPlan | None = None
    bits: Bits | None = None
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name


def read_folder(path: str | Path) -> Folder:
    """Read a folder of `vsraq compare`, or an export.

    An export whose layers cannot be read shows the rest of what is there, and says so.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: It has nothing to show.
        ValueError: A file of it cannot be read.
        CheckpointError: The same of an export with nothing else to show.
    """
    path = Path(path)
    if path.is_file() and path.name in _FILES:
        path = path.parent
    have = {file.name for file in path.iterdir()} if path.is_dir() else set()
    bits: Bits | None = None
    unread: tuple[str, ...] = ()
    if "config.json" in have:
        bits, unread = _read_bits(path, alone=not have.intersection(_FILES))
    if not have.intersection(_FILES) and bits is None:
        said = "no such folder" if not path.is_dir() else "nothing to show there"
        raise FileNotFoundError(
            f"path={str(path)!r}: {said}; allowed is a folder with {RESULTS_FILE} "
            f"(of `vsraq compare`) or {REPLAY_FILE} (of `vsraq replay`), or an export "
            f"with {RUN_FILE} (of `vsraq quantize`) or {PLAN_FILE}"
        )

    def table(kind: Any, name: str) -> Any:
        return read_table(kind, path / name) if name in have else None

    results = table(Results, RESULTS_FILE)
    if results is not None:
        _check_layers(results, path / RESULTS_FILE)
    sampled = results is not None and TOKENS_FILE in have
    return Folder(
        path=path,
        results=results,
        tokens=_read_tokens(path / TOKENS_FILE, results) if sampled else None,
        replay=table(Replay, REPLAY_FILE),
        run=table(Run, RUN_FILE),
        plan=BitPlan.load(path / PLAN_FILE) if PLAN_FILE in have else None,
        bits=bits,
        unread=unread,
    )


def _read_bits(path: Path, *, alone: bool) -> tuple[Bits | None, tuple[str, ...]]:
    """Read the bits, or say why not; raise it if there is nothing else to show."""
    try:
        return read_bits(path), ()
    except (ValueError, OSError) as error:
        if alone:
            raise
        reason = " ".join(str(error).split())
        return None, (f"The bits of the layers could not be read: {reason}",)


def _check_layers(results: Results, path: Path) -> None:
    """Refuse methods whose layers are not those of full precision."""
    names = [layer.name for layer in results.layers]
    for method, result in results.methods.items():
        if [layer.name for layer in result.layers] != names:
            raise ValueError(
                f"path={str(path)!r}: the layers of {json.dumps(method)} are not those "
                "of full precision; run `vsraq compare` again"
            )


def _read_tokens(path: Path, results: Results) -> dict[str, dict[str, Any]]:
    """The sampled tokens: metric -> (n,) float32, by method."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
        return {
            method: {
                metric: stored[f"{method}/{metric}"]
                for metric in ("sampled_jsd", "jsd", "kl", "routing_shift")
            }
            for method in results.methods
        }
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"path={str(path)!r}: {error}; allowed is the file that `vsraq compare` "
            f"wrote beside {RESULTS_FILE}; run it again"
        ) from error
