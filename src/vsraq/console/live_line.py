# SPDX-License-Identifier: Apache-2.0
"""One line of a run: which block, which iteration, its losses, the time left."""

import time
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TextIO
from weakref import WeakSet

from tqdm import tqdm

from vsraq.callbacks import BlockInfo, BlockResult, Callback, RunInfo, RunResult, Step
from vsraq.run_record.loss_curves import RECONSTRUCTION

_REFRESH = 0.1  # seconds between two states of the line on a terminal
_PLAIN_REFRESH = 10.0  # seconds between two lines elsewhere


class Line(Callback, Protocol):
    """What shows a run."""

    def phase(self, text: str) -> None:
        """Say what is going on, such as "W4A16: exporting"."""

    def bar(self, text: str) -> None:
        """Take the state of a progress bar."""

    def say(self, text: str, stream: TextIO) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Remove what does not stay."""


def open_line(stream: TextIO) -> Line:
    """Return a line for a terminal, or plain lines now and then for another stream."""
    return LiveLine(stream) if stream.isatty() else PlainLines(stream)


class _Progress:
    """How far a run is, and how long the rest takes at the pace so far."""

    def __init__(self, run: RunInfo) -> None:
        self._started = time.monotonic()
        self._first = run.done
        self._blocks = run.blocks

    def left(self, blocks: float) -> str:
        """Return the time left after this many blocks, earlier processes included."""
        done = blocks - self._first
        if done <= 0:
            return ""
        pace = (time.monotonic() - self._started) / done
        return f", {_clock(pace * (self._blocks - blocks))} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def _losses(losses: Mapping[str, float]) -> str:
    order = sorted(losses, key=lambda label: (label != RECONSTRUCTION, len(label)))
    return "".join(f", {label} {losses[label]:.2e}" for label in order)


class _Line(tqdm):
    """A bar that others do not count, so theirs stay in the first place."""

    _instances: ClassVar["WeakSet[tqdm[Any]]"] = WeakSet()


class LiveLine(Line):
    """The line on a terminal, which is written over and over.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._line = _Line(bar_format="{desc}", file=stream, dynamic_ncols=True)
        self._phase = ""
        self._progress: _Progress | None = None
        self._shown = 0.0

    def on_run_start(self, run: RunInfo) -> None:
        """Start to measure the time."""
        self._progress = _Progress(run)

    def on_block_start(self, block: BlockInfo) -> None:
        """Show the block."""
        self._show(self._of(block, block.index, ""))

    def on_step(self, step: Step) -> None:
        """Show the losses."""
        if time.monotonic() - self._shown < _REFRESH:
            return
        block, ran = step.block, step.iteration + 1
        text = f", iteration {ran}/{block.iterations}{_losses(step.losses)}"
        self._show(self._of(block, block.index + ran / block.iterations, text))

    def on_run_end(self, run: RunResult) -> None:
        """Leave the line to what comes next."""
        self._progress = None

    def _of(self, block: BlockInfo, blocks: float, text: str) -> str:
        left = "" if self._progress is None else self._progress.left(blocks)
        return f"block {block.index + 1}/{block.blocks}{text}{left}"

    def _show(self, text: str) -> None:
        self._shown = time.monotonic()
        self._line.set_description_str(
            f"{self._phase}: {text}" if text else self._phase
        )

    def phase(self, text: str) -> None:
        """Show what is going on."""
        self._phase = text
        self._show("")

    def bar(self, text: str) -> None:
        """Show a bar, except while blocks are tuned."""
        if self._progress is None and time.monotonic() - self._shown >= _REFRESH:
            self._show(text)

    def say(self, text: str, stream: TextIO) -> None:
        """Print a line that stays, above this one."""
        self._line.clear()
        print(text, file=stream, flush=True)
        self._line.refresh()

    def close(self) -> None:
        """Remove the line."""
        self._line.leave = False
        self._line.close()


class PlainLines(Line):
    """Lines in a file: one for each block, but not more than one in ten seconds.

    Nothing is read off the device for it while a block is tuned.

    Args:
        stream: Gets the lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase = ""
        self._progress: _Progress | None = None
        self._shown = 0.0

    def on_run_start(self, run: RunInfo) -> None:
        """Start to measure the time."""
        self._progress = _Progress(run)

    def on_block_end(self, block: BlockResult) -> None:
        """Print the losses of the iteration that is kept."""
        info, best = block.block, block.best_iteration
        ended = info.index + 1
        if ended < info.blocks and time.monotonic() - self._shown < _PLAIN_REFRESH:
            return
        self._shown = time.monotonic()
        losses = {label: curve[best] for label, curve in block.losses.items() if curve}
        left = "" if self._progress is None else self._progress.left(ended)
        self.say(
            f"{self._phase}: block {ended}/{info.blocks}, iteration {best + 1}/"
            f"{info.iterations} is kept{_losses(losses)}{left}",
            self._stream,
        )

    def phase(self, text: str) -> None:
        """Print what is going on."""
        self._phase = text
        self.say(text, self._stream)

    def bar(self, text: str) -> None:
        """Bars are in the log only."""

    def say(self, text: str, stream: TextIO) -> None:
        """Print a line."""
        print(text, file=stream, flush=True)

    def close(self) -> None:
        """There is nothing to remove."""
