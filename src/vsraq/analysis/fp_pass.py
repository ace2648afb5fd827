# SPDX-License-Identifier: Apache-2.0
"""What the full-precision pass leaves on disk for the quantized models.

One file per batch of T tokens: the rank of every expert of every router, and the hidden
states after the last block (or the logits, where the model cannot be split there). The
full-precision logits follow from these, a few tokens at a time. For a replay there is
another file per batch: what the routers decided. A last file says that the pass is
whole, and of what model and text it is.

Shapes: T tokens of a batch, E experts, H hidden width, V vocabulary.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vsraq import stamp
from vsraq.analysis.routing_record import RoutingRecord
from vsraq.whole_file import write_whole

FORMAT = "vsraq-fp-pass/1"
_WHOLE = "pass.json"
_ROWS, _RANKS = "rows", "ranks/"


@dataclass(frozen=True)
class StoredBatch:
    """The full-precision pass of a batch.

    Attributes:
        ranks: By router name, the rank of every expert, (T, E); see `expert_ranks`.
        rows: Hidden states, (T, H), or logits, (T, V).
        routing: What the routers decided, or None.
    """

    ranks: dict[str, Tensor]
    rows: Tensor
    routing: RoutingRecord | None = None

    @property
    def bytes_per_token(self) -> int:
        """Size on disk; headers add about 0.1 KB per router and batch."""
        tensors = (self.rows, *self.ranks.values())
        size = sum(t.element_size() * t.shape[-1] for t in tensors)
        if self.routing is not None:
            size += math.ceil(self.routing.nbytes / self.routing.tokens)
        return size


@dataclass(frozen=True)
class Finished:
    """What is known of a model after its pass.

    Attributes:
        returns_tuple: As in `vsraq.analysis.forward.Forward`.
        load: By router name, tokens of each expert, E numbers.
        seconds: Wall time of the pass.
        created: When it ended, UTC.
    """

    returns_tuple: bool | None
    load: dict[str, list[int]]
    seconds: float
    created: str

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Finished":
        """Read what was written.

        Raises:
            TypeError: A value has another type, or one is missing or too much.
            ValueError: One is no number.
            AttributeError: The numbers of tokens have no names.
        """
        found = cls(**content)
        load = {n: [int(count) for count in own] for n, own in found.load.items()}
        return replace(found, load=load, seconds=float(found.seconds))


class FullPrecisionPass:
    """The batches of a pass, in a folder.

    Args:
        folder: Where they go; made if it is not there.
        tokens: All tokens of the pass.
        identity: What decides its numbers, as JSON has it: a pass of an equal one is
            the same. None for one that is not used again.

    Attributes:
        folder: See above.
        identity: As JSON gives it back, with the format of the files; or None.
        reused: Whether the batches are those of an earlier comparison.

    Raises:
        TypeError: JSON cannot hold the identity.
    """

    def __init__(
        self, folder: Path, tokens: int, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.reused = False
        self._tokens = tokens
        # before the pass begins, so that what JSON cannot hold costs no pass
        self.identity: dict[str, Any] | None = None
        if identity is not None:
            self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))

    @property
    def is_whole(self) -> bool:
        """Whether a whole pass lies in the folder, of whatever model and text."""
        return (self.folder / _WHOLE).is_file()

    def reuse(self) -> tuple[Finished | None, str | None]:
        """Look for a whole pass of the same model and text in the folder.

        Returns:
            What is known of it, or None; and why one that is there cannot be used, or
            None.
        """
        path = self.folder / _WHOLE
        if not self.is_whole:
            return None, None
        if self.identity is None:
            return None, "the model of this comparison is in memory"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, files = content["identity"], content["files"]
            finished = Finished.of(content["finished"])
            names = {*self.identity, *found}
            other = sorted(n for n in names if found.get(n) != self.identity.get(n))
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            return None, f"{path.name} cannot be read ({type(error).__name__}: {error})"
        if other:
            return None, f"it is of another {', '.join(other)}"
        if self._sizes() != files:
            return None, "a file of it is gone, or has another size"
        self.reused = True
        return finished, None

    def clear(self) -> None:
        """Remove the batches of an earlier pass."""
        (self.folder / _WHOLE).unlink(missing_ok=True)
        for path in self._batches():
            path.unlink()

    def check_room(self, batch: StoredBatch) -> str:
        """Compute how much will be written.

        Args:
            batch: Some tokens of the pass, which say how large one is.

        Returns:
            A sentence for the user.

        Raises:
            ValueError: There is not enough room on the disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = batch.bytes_per_token * self._tokens
        free = shutil.disk_usage(self.folder).free
        size = (
            f"{self._tokens} tokens x {batch.bytes_per_token} bytes = "
            f"{needed / 2**20:.1f} MiB in {self.folder}"
        )
        if needed > free:
            raise ValueError(
                f"the full-precision pass would write {size}, but {free / 2**20:.1f} "
                "MiB are free there; allowed is a folder with more room (out, --out), "
                "or fewer sequences"
            )
        return f"the full-precision pass writes {size}"

    def write(self, index: int, batch: StoredBatch) -> None:
        """Write a batch."""
        ranks: Mapping[str, Tensor] = {
            f"{_RANKS}{name}": r for name, r in batch.ranks.items()
        }
        save_file({_ROWS: batch.rows.contiguous(), **ranks}, self._path(index))
        if batch.routing is not None:
            batch.routing.save(self._routing_path(index))

    def finish(self, returns_tuple: bool | None, load: Any, seconds: float) -> None:
        """Write that the pass is whole; see `Finished`."""
        if self.identity is None:
            return
        counts = {name: of_router.tolist() for name, of_router in load.items()}
        content = {
            "identity": self.identity,
            "finished": asdict(Finished(returns_tuple, counts, seconds, stamp.now())),
            "files": self._sizes(),
        }
        write_whole(self.folder / _WHOLE, f"{json.dumps(content, indent=1)}\n")

    def read(self, index: int) -> StoredBatch:
        """Read a batch; what the routers decided is there if it was written."""
        tensors = load_file(self._path(index))
        rows = tensors.pop(_ROWS)
        ranks = {name.removeprefix(_RANKS): ranks for name, ranks in tensors.items()}
        path = self._routing_path(index)
        routing = RoutingRecord.load(path) if path.is_file() else None
        return StoredBatch(ranks, rows, routing)

    def _sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self._batches()}

    def _batches(self) -> list[Path]:
        kinds = ("batch-*.safetensors", "routing-*.safetensors")
        return sorted(path for kind in kinds for path in self.folder.glob(kind))

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:06}.safetensors"

    def _routing_path(self, index: int) -> Path:
        return self.folder / f"routing-{index:06}.safetensors"
