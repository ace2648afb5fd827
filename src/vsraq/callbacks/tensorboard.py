# SPDX-License-Identifier: Apache-2.0
"""A run in TensorBoard."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vsraq.callbacks.callback import BlockResult, Callback, RunResult
from vsraq.callbacks.means import block_means

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Callback):
    """Write a run's values to a folder that `tensorboard --logdir` shows.

    The curves of a block are written when it ends, so nothing waits for the device:
    `<block>/reconstruction`, `<block>/router` and `<block>/next router` by iteration.
    By block: `kept/<loss>` of the iteration that is kept, `weight/<loss>`,
    `re-fit/...` (means over the block's routers) and `seconds`.

    A resumed run may write to the same folder, and goes on there.

    Args:
        folder: Where the event files go; it is made when the first block ends.

    Raises:
        ImportError: The package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        if find_spec("tensorboard") is None:
            raise ImportError(
                "vsraq.callbacks.TensorBoard: the package tensorboard is not "
                "installed; pip install tensorboard, or the extra vsraq[tensorboard]"
            )
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def on_block_end(self, block: BlockResult) -> None:
        """Write the curves of a block."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        writer, info = self._writer, block.block
        for label, losses in block.losses.items():
            for iteration, loss in enumerate(losses):
                writer.add_scalar(f"{info.name}/{label}", loss, iteration)
        for name, value in block_means(block).items():
            writer.add_scalar(name, value, info.index)
        writer.flush()

    def on_run_end(self, run: RunResult) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
