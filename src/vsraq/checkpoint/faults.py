# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint."""

from pathlib import Path

_MAX_SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint is faulty.

    Attributes:
        faults: One line per fault, each naming its file, tensor or layer.
    """

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.faults = tuple(faults)
        shown = "\n".join(f"  - {fault}" for fault in faults[:_MAX_SHOWN])
        more = len(faults) - _MAX_SHOWN
        tail = f"\n  ... and {more} more" if more > 0 else ""
        super().__init__(
            f"checkpoint {path} has {len(faults)} fault(s):\n{shown}{tail}\n"
            "Do not serve it. Export again, and report faults that come back."
        )
