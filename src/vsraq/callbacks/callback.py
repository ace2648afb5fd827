# SPDX-License-Identifier: Apache-2.0
"""What a run tells those who listen, and when.

Losses stay on their device while a block is tuned. When it ends, all of its curves are
moved at once. Only if a callback has an `on_step` of its own, the losses of each step
are moved after that step, which waits for the device once per term.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RunInfo:
    """A run that is about to tune its first block.

    Attributes:
        model: Where it came from, or its class.
        scheme: AutoRound's name of the scheme.
        blocks: Blocks that are tuned; with `nblocks`, groups of them.
        done: How many of them a killed run has tuned before.
        iterations: Of each block, at most.
    """

    model: str
    scheme: str
    blocks: int
    done: int
    iterations: int


@dataclass(frozen=True)
class BlockInfo:
    """A block that is about to be tuned.

    Attributes:
        name: Its name in the model; of several in one (`nblocks`), with + between them.
        index: Its place among the tuned blocks, from 0; a resumed run goes on counting.
        blocks: How many there are.
        iterations: It is tuned with, at most.
    """

    name: str
    index: int
    blocks: int
    iterations: int


@dataclass(frozen=True)
class Step:
    """One iteration of a block.

    Attributes:
        block: The block.
        iteration: From 0.
        losses: Means over the step's micro-batches by label: "reconstruction", and
            without their weights "router" and "next router", where the block has them.
            With several processes, those of the first one's samples.
    """

    block: BlockInfo
    iteration: int
    losses: Mapping[str, float]


@dataclass(frozen=True)
class RouterRefit:
    """What the re-fit of a router did, on calibration samples that it did not see.

    Attributes:
        name: The router's name in the model.
        refit: Whether the router holds the new weight; the old one stays without gain.
        logit_error: Mean squared error of its logits with the old and the new weight.
        jaccard: Overlap of the chosen experts with full precision, likewise; None if
            it is unknown how the router chooses.
    """

    name: str
    refit: bool
    logit_error: tuple[float, float]
    jaccard: tuple[float, float] | None


@dataclass(frozen=True)
class BlockResult:
    """A block that has been tuned.

    Attributes:
        block: The block.
        iterations: That ran; 0 if it has nothing to tune.
        best_iteration: Whose rounding is kept, from 0.
        losses: As in `Step`, a value for each iteration, but of all processes.
        weights: Of the router losses beside the reconstruction error, by label.
        routers: Its re-fitted routers.
        seconds: Wall time of the tuning and the re-fit.
    """

    block: BlockInfo
    iterations: int
    best_iteration: int
    losses: Mapping[str, Sequence[float]]
    weights: Mapping[str, float]
    routers: Sequence[RouterRefit]
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        seconds: Wall time of calibration and tuning in this process.
        error: What ended it; None after the last block.
    """

    seconds: float
    error: BaseException | None


@runtime_checkable
class Callback(Protocol):
    """What a run calls, from `VSRAQConfig(callbacks=[...])`.

    Subclass it, and override what you need: the methods here do nothing. Callbacks do
    not change the tuning, and a run may be resumed with others.

    - Of several processes, only the first one calls them.
    - A resumed run starts at the first block that was not tuned; `RunInfo.done` says
      how many were. The last block is tuned again if the run was killed while it
      exported.
    - A step is one iteration, whatever `gradient_accumulate_steps`.
    - `AutoRound(..., iters=0)` rounds without any plug-in, so nothing is called.
    - llm-compressor hands over blocks one by one, as runs of one block without a start
      or an end: `on_run_start` and `on_run_end` are not called there.

    An exception ends the run, as an error of the run itself would. That of an
    `on_run_end` is only logged, because everything is tuned then.
    """

    def on_run_start(self, run: RunInfo) -> None:
        """Hear that everything was checked and calibrated."""
        return

    def on_block_start(self, block: BlockInfo) -> None:
        """Hear that a block is about to be tuned."""
        return

    def on_step(self, step: Step) -> None:
        """Hear of an iteration; overriding this moves its losses off the device."""
        return

    def on_block_end(self, block: BlockResult) -> None:
        """Hear what the tuning of a block did."""
        return

    def on_run_end(self, run: RunResult) -> None:
        """Hear that the last block is tuned, or that an error has ended the run."""
        return


_METHODS = ("on_run_start", "on_block_start", "on_step", "on_block_end", "on_run_end")


def listens_to_steps(callback: Callback) -> bool:
    """Whether a callback has an `on_step` of its own."""
    return getattr(type(callback), "on_step", None) is not Callback.on_step


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Check what a user has given as callbacks.

    Raises:
        ValueError: It is no list of callbacks.
    """
    if not isinstance(callbacks, list | tuple):
        raise ValueError(
            f"callbacks={callbacks!r}: allowed is a list of vsraq.callbacks.Callback"
        )
    for index, callback in enumerate(callbacks):
        missing = [m for m in _METHODS if not callable(getattr(callback, m, None))]
        if isinstance(callback, type) or missing:
            what = f"it has no {', '.join(missing)}" if missing else "it is a class"
            raise ValueError(
                f"callbacks[{index}]={callback!r}: {what}; allowed is an object of a "
                "subclass of vsraq.callbacks.Callback"
            )
    return tuple(callbacks)
