# SPDX-License-Identifier: Apache-2.0
"""A run in Weights & Biases."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vsraq.callbacks.callback import (
    BlockInfo,
    BlockResult,
    Callback,
    RunInfo,
    RunResult,
)
from vsraq.callbacks.means import block_means


class WandB(Callback):
    """Log a run to Weights & Biases, online or in files for `wandb sync`.

    When a block ends, its curves are logged as `<block>/<loss>` over `iteration`, and
    the values of `vsraq.callbacks.TensorBoard` that stand for a block over `block`. A
    resumed run is a new run there, unless `WANDB_RUN_ID` and `WANDB_RESUME` are set.

    Args:
        project: The project's name.
        name: The run's name; None lets wandb choose one.
        offline: Whether to write files only. False leaves that to `WANDB_MODE`.
        folder: Where the files go; None is wandb's default.

    Raises:
        ImportError: The package wandb is not installed.
    """

    def __init__(
        self,
        project: str = "vsraq",
        *,
        name: str | None = None,
        offline: bool = False,
        folder: str | Path | None = None,
    ) -> None:
        if find_spec("wandb") is None:
            raise ImportError(
                "vsraq.callbacks.WandB: the package wandb is not installed; pip "
                "install wandb, or the extra vsraq[wandb]"
            )
        self.project = project
        self.name = name
        self.offline = offline
        self.folder = folder
        self._run: Any = None

    def on_run_start(self, run: RunInfo) -> None:
        """Start a run there."""
        self._start(vars(run))

    def on_block_start(self, block: BlockInfo) -> None:
        """Let the block's losses be shown over its iterations."""
        if self._run is None:  # a block without a run
            self._start({})
        self._run.define_metric(f"{block.name}/*", step_metric="iteration")

    def on_block_end(self, block: BlockResult) -> None:
        """Log the curves of a block."""
        name = block.block.name
        for iteration in range(block.iterations):
            values = {
                f"{name}/{k}": curve[iteration] for k, curve in block.losses.items()
            }
            self._run.log({"iteration": iteration, **values})
        self._run.log({"block": block.block.index, **block_means(block)})

    def on_run_end(self, run: RunResult) -> None:
        """Finish the run there; as failed, if an error ended it."""
        if self._run is not None:
            self._run.finish(exit_code=0 if run.error is None else 1)
            self._run = None

    def _start(self, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=self.name,
            mode="offline" if self.offline else None,
            dir=self.folder,
            config=config,
        )
        for names in ("kept/*", "weight/*", "re-fit/*", "seconds"):
            self._run.define_metric(names, step_metric="block")
