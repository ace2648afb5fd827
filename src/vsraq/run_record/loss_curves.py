# SPDX-License-Identifier: Apache-2.0
"""The losses of every iteration of one block, on their devices until asked for."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vsraq.processes import mean_over_processes, process_count

RECONSTRUCTION = "reconstruction"  # beside the labels of `vsraq.router_terms`


@dataclass
class _Sums:
    """Sums over the micro-batches of one iteration."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | float = 0.0
    valid_tokens: Tensor | float = 0.0
    batches: int = 0


@dataclass(frozen=True)
class Curves:
    """What the tuning of a block did.

    Attributes:
        losses: By label, the mean over the micro-batches, for each iteration.
        best_iteration: Whose rounding AutoRound keeps.
    """

    losses: dict[str, list[float]]
    best_iteration: int

    @property
    def iterations(self) -> int:
        """How many iterations ran."""
        return max(map(len, self.losses.values()), default=0)


class LossCurves:
    """Sums of the running iteration, and those of the iterations before it.

    Nothing here waits for a device before `curves` or `latest` are called.

    Args:
        keep_best: Whether AutoRound keeps the best iteration, not the last.
    """

    def __init__(self, *, keep_best: bool) -> None:
        self._keep_best = keep_best
        self._running = _Sums()
        self._finished: list[_Sums] = []

    @property
    def iteration(self) -> int:
        """The index of the iteration that is running."""
        return len(self._finished)

    @property
    def running(self) -> dict[str, float]:
        """The sums of the iteration that is running, by label."""
        return {label: float(loss) for label, loss in self._running.losses.items()}

    def add(self, label: str, loss: Tensor) -> None:
        """Add one micro-batch's loss, a scalar."""
        sums = self._running.losses
        detached = loss.detach()
        sums[label] = sums[label] + detached if label in sums else detached

    def end_batch(self, total: Tensor, valid_tokens: Tensor | None = None) -> None:
        """End a micro-batch.

        Args:
            total: What AutoRound minimises, a scalar.
            valid_tokens: How many tokens it does not mask; None without a mask, where
                it divides by a constant and the same iteration is the best.
        """
        self._running.total = self._running.total + total.detach()
        if valid_tokens is not None:
            self._running.valid_tokens = self._running.valid_tokens + valid_tokens
        self._running.batches += 1

    def end_iteration(self) -> bool:
        """Close the running iteration; without micro-batches, do nothing.

        Returns:
            Whether there was one.
        """
        if self._running.batches == 0:
            return False
        self._finished.append(self._running)
        self._running = _Sums()
        return True

    def latest(self) -> dict[str, float]:
        """Return the losses of the last closed iteration, of this process."""
        sums = self._finished[-1]
        return {k: float(loss) / sums.batches for k, loss in sums.losses.items()}

    def curves(self) -> Curves:
        """Return all iterations; every process gets the means over the processes."""
        labels = sorted({label for sums in self._finished for label in sums.losses})
        losses = {label: self._curve(label) for label in labels}
        if process_count() > 1 and losses:
            values = torch.tensor(list(losses.values()), dtype=torch.float64)
            means = mean_over_processes(values).tolist()
            losses = dict(zip(losses, means, strict=True))
        return Curves(losses, self._best_iteration())

    def _curve(self, label: str) -> list[float]:
        batches = [sums.batches for sums in self._finished]
        values = _to_floats([s.losses.get(label, math.nan) for s in self._finished])
        return [value / n for value, n in zip(values, batches, strict=True)]

    def _best_iteration(self) -> int:
        totals = _to_floats([sums.total for sums in self._finished])
        valid = _to_floats([sums.valid_tokens for sums in self._finished])
        best, best_value = 0, math.inf
        for iteration, (total, count) in enumerate(zip(totals, valid, strict=True)):
            value = total / max(count, 1.0)
            if value < best_value or not self._keep_best:
                best, best_value = iteration, value
        return best


def _to_floats(values: list[Tensor | float]) -> list[float]:
    """Move scalars to the CPU, those of one device and dtype at once."""
    found = [value if isinstance(value, float) else 0.0 for value in values]
    alike: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            alike.setdefault((value.device, value.dtype), {})[index] = value
    for scalars in alike.values():
        moved = torch.stack(list(scalars.values())).tolist()
        for index, scalar in zip(scalars, moved, strict=True):
            found[index] = scalar
    return found
