# SPDX-License-Identifier: Apache-2.0
"""What a run keeps of its blocks, and whom it tells."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vsraq.callbacks import (
    BlockInfo,
    BlockResult,
    Callback,
    RouterRefit,
    RunInfo,
    RunResult,
    Step,
    listens_to_steps,
)
from vsraq.processes import is_first_process
from vsraq.run_record.file import block_entry
from vsraq.run_record.loss_curves import LossCurves

logger = logging.getLogger("autoround.vsraq")


class RunRecorder:
    """Blocks of a run, one after the other, and the callbacks that hear of them.

    Args:
        callbacks: Called in the first process only.

    Attributes:
        blocks: What `vsraq_run.json` says of the blocks that are done.
        curves: Losses of the block that is being tuned; None between blocks.
        seconds: Of all processes that took turns in this run.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.curves: LossCurves | None = None
        self.seconds = 0.0
        self._given = callbacks
        self._callbacks: Sequence[Callback] = ()
        self._to_steps: list[Callback] = []
        self._total: int | None = None
        self._info = BlockInfo("", 0, 0, 0)
        self._result: BlockResult | None = None
        self._started = 0.0  # the block

    # ── Run ──────────────────────────────────────────────────────────────────

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the run inside, and say how it ended."""
        started = time.monotonic()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            seconds = time.monotonic() - started
            self.seconds += seconds
            self.curves = self._result = None
            callbacks, self._callbacks, self._to_steps = self._callbacks, (), []
            for callback in callbacks:
                _tell_end(callback, RunResult(seconds, error))
            self._total = error = None  # a traceback keeps this frame, and it the model

    def start(
        self,
        model: str,
        scheme: str,
        blocks: int,
        iterations: int,
        done: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start a run.

        Args:
            model: Where the model came from, or its class.
            scheme: AutoRound's name of the scheme.
            blocks: How many are tuned.
            iterations: Of each block, at most.
            done: What an earlier process has kept of the blocks that it had tuned.
        """
        self.blocks = [dict(block) for block in done]
        self.seconds = sum(block["seconds"] for block in done)
        self._total = blocks
        self._listen()
        info = RunInfo(model, scheme, blocks, len(self.blocks), iterations)
        for callback in self._callbacks:
            callback.on_run_start(info)

    def _listen(self) -> None:
        self._callbacks = self._given if is_first_process() else ()
        self._to_steps = [c for c in self._callbacks if listens_to_steps(c)]

    # ── Block ────────────────────────────────────────────────────────────────

    def start_block(self, name: str, iterations: int, *, keep_best: bool) -> None:
        """Start a block.

        Args:
            name: In the model.
            iterations: At most.
            keep_best: Whether AutoRound keeps the best iteration, not the last.
        """
        if self._total is None:  # a block without a run
            self.blocks = []
            self._listen()
        index, total = len(self.blocks), self._total or 1
        self._info = BlockInfo(name, index, total, iterations)
        for callback in self._callbacks:
            callback.on_block_start(self._info)
        self.curves = LossCurves(keep_best=keep_best)
        self._started = time.monotonic()

    def end_iteration(self) -> None:
        """Close the running iteration, if there is one."""
        curves = self.curves
        if curves is None or not curves.end_iteration() or not self._to_steps:
            return
        step = Step(self._info, curves.iteration - 1, curves.latest())
        for callback in self._to_steps:
            callback.on_step(step)

    def end_block(
        self, weights: Mapping[str, float], routers: Sequence[RouterRefit]
    ) -> dict[str, Any]:
        """End a block; `announce` then tells the callbacks.

        Args:
            weights: Of its router losses, by label.
            routers: What was re-fitted in it.

        Returns:
            What `vsraq_run.json` says of it.
        """
        assert self.curves is not None, "a block ends that was not started"
        curves = self.curves.curves()
        self._result = BlockResult(
            block=self._info,
            iterations=curves.iterations,
            best_iteration=curves.best_iteration,
            losses=curves.losses,
            weights=dict(weights),
            routers=tuple(routers),
            seconds=time.monotonic() - self._started,
        )
        self.curves = None
        entry = block_entry(self._result)
        self.blocks.append(entry)
        return entry

    def announce(self) -> None:
        """Tell the callbacks of the block that has ended."""
        result, self._result = self._result, None
        assert result is not None, "no block has ended"
        for callback in self._callbacks:
            callback.on_block_end(result)


def _tell_end(callback: Callback, result: RunResult) -> None:
    try:
        callback.on_run_end(result)
    except Exception:  # everything is tuned, or another error says more
        logger.warning("vsraq: on_run_end of %r failed", callback, exc_info=True)
