# SPDX-License-Identifier: Apache-2.0
"""Resume a run of AutoRound so that it ends with the same bits, or refuse.

AutoRound's resume directory (`AR_RESUME_DIR`) is keyed by model, scheme, data set and
blocks. It knows neither the algorithm nor the output folder, and takes any unfinished
shard in the output as its own. After block n it writes, in this order, the shards of
the block, the quantized and the full-precision inputs of block n + 1 in place of those
of block n, and the manifest. So

- the run has an id, in the resume directory and in the output folder, and settings;
- the inputs of block n are set aside before AutoRound replaces them, and put back if
  the manifest does not say that block n is done;
- shards of blocks that are not done are removed: the blocks are tuned again;
- a run that was tuned but not exported tunes its last block again, because AutoRound
  cannot start after it.
"""

import json
import logging
import re
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vsraq.resume.block_records import BlockRecord, BlockRecords
from vsraq.resume.output_folder import refuse_leftovers, weight_files
from vsraq.whole_file import write_whole

logger = logging.getLogger("autoround.vsraq")

_RUN = "vsraq_resume.json"
_MARKER = ".vsraq_unfinished.json"
_GROUP = "group_0"  # AutoRound's name for the first stack of blocks
_MANIFEST = "resume_manifest.json"
_CHAIN = ("resume_q_input.pt", "resume_input_ids.pt")  # as AutoRound writes them
_ASIDE = ".before-block-"


class ResumableRun:
    """The files of one run that can be resumed.

    Args:
        resume_dir: AutoRound's resume directory.
        output: The folder of the export.
        blocks: The blocks that are tuned, in order.
        settings: Everything that decides the tuned weights and their format, as text.
    """

    def __init__(
        self,
        resume_dir: str | Path,
        output: str | Path,
        blocks: Sequence[str],
        settings: Mapping[str, str],
    ) -> None:
        self._directory = Path(resume_dir)
        self._group = self._directory / _GROUP
        self._output = Path(output)
        self._blocks = list(blocks)
        self._settings = dict(settings)
        self._records = BlockRecords(resume_dir)

    @property
    def _where(self) -> str:
        return f"AR_RESUME_DIR={str(self._directory)!r}"

    def open(self) -> int:
        """Find where the run goes on, and bring its files into that state.

        Returns:
            How many blocks are done.

        Raises:
            ValueError: The directory or the output folder holds another run, or not
                all of this one.
            OSError: A folder cannot be written.
        """
        done, run_id = self._identify()
        self._claim_output(run_id, done)
        if 0 < done == len(self._blocks):
            logger.info(
                "vsraq: all %d blocks are tuned but not exported; the last one is "
                "tuned again, because AutoRound cannot start after it",
                done,
            )
            done = self._forget_last_block()
        self._restore_inputs(done)
        self._keep_shards_of(done)
        return done

    def tuned(self, done: int) -> list[BlockRecord]:
        """Read the records of the blocks that are done."""
        records = [self._records.read(block) for block in self._blocks[:done]]
        missing = [
            block
            for block, record in zip(self._blocks, records, strict=False)
            if record is None
        ]
        if missing:
            raise ValueError(
                f"{self._where}: the records of {', '.join(missing)} are missing; "
                "allowed is the whole unfinished run; use an empty folder and an "
                "empty output folder"
            )
        return [record for record in records if record is not None]

    def start_block(self, index: int) -> None:
        """Drop the inputs of blocks that will not be tuned again."""
        for path in self._group.glob(f"*{_ASIDE}*"):
            if int(path.name.rpartition(_ASIDE)[2]) < index:
                path.unlink()

    def end_block(self, index: int, record: BlockRecord) -> None:
        """Keep what tuning a block again would need, before AutoRound goes on.

        Args:
            index: Of the block in the stack.
            record: What to keep of it; its shards are filled in.
        """
        shards = [path.name for path in _unfinished_shards(self._output)]
        self._records.write(self._blocks[index], replace(record, shards=shards))
        for name in _CHAIN:
            path = self._group / name
            if path.exists():
                path.rename(f"{path}{_ASIDE}{index}")

    def finish(self) -> None:
        """Drop the marker of a complete export first, then what a resume needs."""
        (self._output / _MARKER).unlink(missing_ok=True)
        for path in self._group.glob(f"*{_ASIDE}*"):
            path.unlink()
        self._records.clear()

    # ── Whose files they are ─────────────────────────────────────────────────

    def _identify(self) -> tuple[int, str]:
        """Return how many blocks the manifest calls done, and the id of this run."""
        run, manifest = self._directory / _RUN, self._group / _MANIFEST
        stored = _read(run) if run.is_file() else None
        if manifest.is_file():
            if stored is None or "run" not in stored:
                raise ValueError(
                    f"{self._where}: it holds an unfinished run of another algorithm; "
                    "allowed is an unfinished run with the same settings, or an "
                    "empty folder"
                )
            self._compare(stored["settings"])
            return len(_read(manifest)["completed_blocks"]), stored["run"]
        if stored is not None and stored.get("settings") == self._settings:
            return 0, stored["run"]
        refuse_leftovers(self._output)  # a run that starts now has none
        self._directory.mkdir(parents=True, exist_ok=True)
        self._records.clear()
        run_id = secrets.token_hex(8)
        content = {"run": run_id, "settings": self._settings}
        write_whole(run, json.dumps(content, indent=2, sort_keys=True))
        return 0, run_id

    def _compare(self, stored: Mapping[str, str]) -> None:
        now = self._settings
        different = [
            f"{name} was {stored.get(name)}, now {now.get(name)}"
            for name in sorted(stored.keys() | now.keys())
            if stored.get(name) != now.get(name)
        ]
        if different:
            raise ValueError(
                f"{self._where}: its unfinished run has other settings "
                f"({'; '.join(different)}); allowed are the same ones; restore them, "
                "or use an empty folder and another output folder"
            )

    def _claim_output(self, run_id: str, done: int) -> None:
        marker = self._output / _MARKER
        owner = _read(marker).get("run") if marker.is_file() else None
        if owner != run_id:
            refuse_leftovers(self._output)
            if done:
                raise ValueError(
                    f"{self._where}: its unfinished run has {done} tuned blocks, and "
                    f"their shards are not in output folder {str(self._output)!r}; "
                    "put them back, or use an empty AR_RESUME_DIR"
                )
        self._output.mkdir(parents=True, exist_ok=True)
        content = {"run": run_id, "resume_dir": str(self._directory)}
        write_whole(marker, json.dumps(content))

    # ── Where it goes on ─────────────────────────────────────────────────────

    def _forget_last_block(self) -> int:
        manifest = self._group / _MANIFEST
        content = _read(manifest)
        content["completed_blocks"] = content["completed_blocks"][:-1]
        done = len(content["completed_blocks"])
        if done:
            write_whole(manifest, json.dumps(content))
        else:
            manifest.unlink()
        return done

    def _restore_inputs(self, done: int) -> None:
        """Let AutoRound's files hold the inputs of the first block that is not done."""
        aside = [self._group / f"{name}{_ASIDE}{done}" for name in _CHAIN]
        if not done:
            for path in self._group.glob(f"*{_ASIDE}*"):
                path.unlink()
            return
        # Both are set aside in this order and nothing else is written in between.
        if aside[1].exists() and not aside[0].exists():
            (self._group / _CHAIN[0]).unlink(missing_ok=True)
        # The other way round, so that a second kill here finds the same state.
        for name, path in zip(reversed(_CHAIN), reversed(aside), strict=True):
            if path.exists():
                path.replace(self._group / name)
        chain = [self._group / name for name in _CHAIN]
        broken = [p for p in chain if p.exists() and not zipfile.is_zipfile(p)]
        broken += [] if chain[1].exists() else [chain[1]]
        if broken:
            raise ValueError(
                f"{self._where}: {', '.join(map(str, broken))} is missing or "
                f"incomplete, so block {self._blocks[done]} has no inputs; use an "
                "empty folder and an empty output folder"
            )

    def _keep_shards_of(self, done: int) -> None:
        """Keep only the shards of blocks that are done, as the run had named them."""
        for path in weight_files(self._output):
            found = re.fullmatch(r"model-(\d{5})-of-\d{5}\.safetensors", path.name)
            if found:
                path.rename(path.with_name(f"model-shard-{found[1]}.safetensors"))
        present = [path.name for path in _unfinished_shards(self._output)]
        shards = self._shards_of(done, present)
        for path in weight_files(self._output):
            if path.name not in shards:
                path.unlink()
        for name in shards:
            try:
                with safe_open(self._output / name, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"output folder {str(self._output)!r}: {name} holds tuned blocks "
                    f"of the unfinished run and cannot be read ({error}); use an empty "
                    "AR_RESUME_DIR and an empty output folder"
                ) from error

    def _shards_of(self, done: int, present: Sequence[str]) -> list[str]:
        if not done:
            return []
        self.tuned(done)
        record = None
        if done < len(self._blocks):
            record = self._records.read(self._blocks[done])
        # A block's record is written before its shards are.
        return list(present if record is None else record.shards)


def _unfinished_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-shard-*.safetensors"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: it is not readable as JSON ({error}); allowed is the file of an "
            "unfinished run; use an empty AR_RESUME_DIR and an empty output folder"
        ) from error
    return content
