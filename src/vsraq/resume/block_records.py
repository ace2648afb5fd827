# SPDX-License-Identifier: Apache-2.0
"""What a resumed run must know of the blocks that were tuned before it.

AutoRound keeps the tuned weights in the output folder and the next block's inputs in
its resume folder. Re-fitted routers and the experts' token counts are kept beside
those, one file per block.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vsraq.whole_file import write_whole

_FOLDER = "vsraq_blocks"
_ROUTER, _COUNT = "router", "count"


@dataclass(frozen=True)
class BlockRecord:
    """A record of one tuned block.

    Attributes:
        routers: Re-fitted weights by their names in the model, (E, H).
        counts: By router, named counts of tokens, each (E,) of integers.
        shards: Files of the output folder before the block's own were written.
        entry: What `vsraq_run.json` says of the block.
    """

    routers: Mapping[str, Tensor]
    counts: Mapping[str, Mapping[str, Tensor]]
    shards: Sequence[str]
    entry: Mapping[str, Any] = field(default_factory=dict)


class BlockRecords:
    """The records of a run, each written whole or not at all.

    Args:
        resume_dir: AutoRound's resume directory.
    """

    def __init__(self, resume_dir: str | Path) -> None:
        self._folder = Path(resume_dir) / _FOLDER

    def _path(self, block: str) -> Path:
        return self._folder / f"{block}.safetensors"

    def write(self, block: str, record: BlockRecord) -> None:
        """Keep the record of a block.

        Raises:
            OSError: It cannot be written.
        """
        tensors = {f"{_ROUTER}/{name}": w for name, w in record.routers.items()}
        for router, counts in record.counts.items():
            tensors |= {f"{_COUNT}/{kind}/{router}": n for kind, n in counts.items()}
        contiguous = {
            name: t.detach().cpu().contiguous() for name, t in tensors.items()
        }
        texts = {"shards": list(record.shards), "entry": dict(record.entry)}
        content = save(contiguous, {k: json.dumps(text) for k, text in texts.items()})
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(block), content)

    def read(self, block: str) -> BlockRecord | None:
        """Read the record of a block, None if it was not tuned to its end."""
        path = self._path(block)
        if not path.is_file():
            return None
        routers: dict[str, Tensor] = {}
        counts: dict[str, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as file:
            texts = {k: json.loads(text) for k, text in file.metadata().items()}
            for key in file.keys():
                section, _, name = key.partition("/")
                if section == _ROUTER:
                    routers[name] = file.get_tensor(key)
                else:
                    kind, _, router = name.partition("/")
                    counts.setdefault(router, {})[kind] = file.get_tensor(key)
        return BlockRecord(routers, counts, **texts)

    def clear(self) -> None:
        """Remove all records."""
        for path in self._folder.glob("*"):
            path.unlink()
        if self._folder.is_dir():
            self._folder.rmdir()
