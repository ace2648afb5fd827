# SPDX-License-Identifier: Apache-2.0
"""What the full-precision pass leaves on disk for the quantized models.

One file per batch of T tokens: the rank of every expert of every router, and the hidden
states after the last block (or the logits, where the model cannot be split there). The
full-precision logits follow from these, a few tokens at a time.

Shapes: T tokens of a batch, E experts, H hidden width, V vocabulary.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_ROWS, _RANKS = "rows", "ranks/"


@dataclass(frozen=True)
class StoredBatch:
    """The full-precision pass of a batch.

    Attributes:
        ranks: By router name, the rank of every expert, (T, E); see `expert_ranks`.
        rows: Hidden states, (T, H), or logits, (T, V).
    """

    ranks: dict[str, Tensor]
    rows: Tensor

    @property
    def bytes_per_token(self) -> int:
        """Size on disk; headers add about 0.1 KB per router and batch."""
        tensors = (self.rows, *self.ranks.values())
        return sum(t.element_size() * t.shape[-1] for t in tensors)


class FullPrecisionPass:
    """The batches of a pass, in a folder.

    Args:
        folder: Where they go; made if it is not there.
        tokens: All tokens of the pass.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder = folder
        self._tokens = tokens

    def check_room(self, batch: StoredBatch) -> str:
        """Compute how much will be written, from the first batch.

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

    def read(self, index: int) -> StoredBatch:
        """Read a batch."""
        tensors = load_file(self._path(index))
        rows = tensors.pop(_ROWS)
        return StoredBatch(
            {name.removeprefix(_RANKS): ranks for name, ranks in tensors.items()}, rows
        )

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:06}.safetensors"
