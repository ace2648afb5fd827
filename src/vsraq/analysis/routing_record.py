# SPDX-License-Identifier: Apache-2.0
"""What a model's routers decided for every token, kept to be replayed.

Shapes: T tokens, B sequences, S positions, E experts, K top-k.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

from torch import Tensor

from vsraq.routers import Router
from vsraq.tensor_file import read_tensor_file, write_tensor_file

_FORMAT = "vsraq routing 1"

# for each value that a module returned: its rows, (T, ...), on the CPU; None for a
# value that was left out
Rows: TypeAlias = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class RecordedRouter:
    """What one router decided.

    Attributes:
        router: The router.
        place: Name of the module that returned it: the router, or one around it.
        raw_logits: Which of the values are the router's raw logits, or None.
        calls: Of each call, the index of the batch, and the rows of every value.
    """

    router: Router
    place: str
    raw_logits: int | None
    calls: tuple[tuple[int, Rows], ...]


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """What all routers of a model decided; `record_routing` makes it.

    Attributes:
        batches: The token ids, (B, S) each, in order.
        routers: By router.
        complete: Whether these are all routers of the model.
    """

    batches: tuple[Tensor, ...]
    routers: tuple[RecordedRouter, ...]
    complete: bool

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return sum(ids.numel() for ids in self.batches)

    @property
    def nbytes(self) -> int:
        """Memory that the record takes, bytes."""
        rows = [
            value
            for recorded in self.routers
            for _, values in recorded.calls
            for value in values
            if value is not None
        ]
        return sum(tensor.nbytes for tensor in (*rows, *self.batches))

    def save(self, path: str | Path) -> None:
        """Write the record as one safetensors file, completely or not at all.

        Args:
            path: The file; its folder must exist.
        """
        tensors = {f"batch/{b}": ids for b, ids in enumerate(self.batches)}
        for r, recorded in enumerate(self.routers):
            for c, (_, values) in enumerate(recorded.calls):
                tensors |= {
                    f"router/{r}/{c}/{v}": value.contiguous()
                    for v, value in enumerate(values)
                    if value is not None
                }
        described = [
            {
                "name": r.router.name,
                "top_k": r.router.top_k,
                "num_experts": r.router.num_experts,
                "place": r.place,
                "raw_logits": r.raw_logits,
                "calls": [(batch, len(values)) for batch, values in r.calls],
            }
            for r in self.routers
        ]
        metadata = {
            "routers": json.dumps(described),
            "complete": json.dumps(self.complete),
        }
        write_tensor_file(path, _FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; of a router, not the rule of its choice.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a record.
        """
        refused = (
            f"routing {str(path)!r}: not a record of this version; allowed is a file "
            "that RoutingRecord.save has written, so record the routing again"
        )
        tensors, found = read_tensor_file(path, _FORMAT, refused)
        routers = [
            RecordedRouter(
                Router(
                    given["name"],
                    given["top_k"],
                    given["num_experts"],
                    rule=None,
                    unverified="it was read from a record of its routing",
                ),
                given["place"],
                given["raw_logits"],
                tuple(
                    (b, tuple(tensors.get(f"router/{r}/{c}/{v}") for v in range(count)))
                    for c, (b, count) in enumerate(given["calls"])
                ),
            )
            for r, given in enumerate(json.loads(found["routers"]))
        ]
        batches = sum(name.startswith("batch/") for name in tensors)
        return cls(
            tuple(tensors[f"batch/{b}"] for b in range(batches)),
            tuple(routers),
            json.loads(found["complete"]),
        )
