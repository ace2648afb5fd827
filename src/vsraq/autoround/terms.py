# SPDX-License-Identifier: Apache-2.0
"""The router losses of the block that is being tuned, and what they did.

A block has up to two terms: its own routers, and the next router. Both compare the
micro-batch with what the same samples have in full precision.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vsraq.autoround.step import SampleTokens
from vsraq.losses import FpLogits, reduce_tokens
from vsraq.objectives import Objective
from vsraq.options import Weight
from vsraq.ranks import RankedLogits
from vsraq.routers import Router

OWN_ROUTER, NEXT_ROUTER = "router", "next router"
# (output of the block, samples of the micro-batch) -> logits (T, E), or inputs (T, H),
# by router name
QValues: TypeAlias = Callable[[Tensor, list[int]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class BlockTensors:
    """What AutoRound tunes a block with.

    Attributes:
        inputs: Hidden states on the path that is tuned, per sample (or AutoRound's
            mapping of several).
        others: The other arguments that it has cached for the block.
        fp_outputs: Outputs of the block in full precision, per sample, (1, S, H).
    """

    inputs: Any
    others: dict[str, Any]
    fp_outputs: Sequence[Tensor]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each sample."""
        # some families have several streams of hidden states behind these two
        return [output.shape[0] * output.shape[1] for output in self.fp_outputs]

    def batches(self, batch_size: int, count: int | None = None) -> list[list[int]]:
        """The first `count` samples in order, or all, `batch_size` at a time."""
        samples = list(range(len(self.fp_outputs)))[:count]
        return [samples[i : i + batch_size] for i in samples[::batch_size]]

    def reference(self, samples: Sequence[int]) -> Tensor:
        """Full-precision outputs of some samples, (B, S, H)."""
        return torch.cat([self.fp_outputs[i] for i in samples])


@dataclass
class RouterTerm:
    """One weighted router loss of a block.

    Attributes:
        label: What the log calls it.
        objective: The loss per token.
        weight: Its weight beside the mean reconstruction error; "auto" until it has
            been balanced.
        routers: The routers it compares.
        fp_targets: By router name, what each sample has in full precision.
        q_values: How the logits, or inputs, of a micro-batch are got.
        every_second: Whether only every second sample of a step is looked at. They
            are drawn anew in each iteration, so that the mean stays what it is, and a
            look ahead costs half.
        reached: Quantized layers of the block that the term depends on.
        reaches_something: Whether any tuned parameter depends on it.
    """

    label: str
    objective: Objective
    weight: Weight
    routers: Sequence[Router]
    fp_targets: Mapping[str, list[FpLogits]]
    q_values: QValues
    every_second: bool = False
    reached: int = 0
    reaches_something: bool = False

    def looked_at(self, step: Sequence[int]) -> Sequence[int]:
        """The samples of a step that the term looks at.

        Args:
            step: All of its samples, over all micro-batches, in order.
        """
        return step[::2] if self.every_second else step

    def loss(
        self,
        output: Tensor,
        samples: list[int],
        mask: Tensor | None,
        looked_at: Sequence[int],
    ) -> Tensor | None:
        """Mean over routers and counted tokens of the samples that are looked at.

        Args:
            output: The block's output, (B, S, H).
            samples: Which B calibration samples.
            mask: Tokens that count, (T,), or None.
            looked_at: Samples of the step that count; others are left out.

        Returns:
            A scalar on the device of `output`; None if no sample is looked at, and
            then nothing was computed.
        """
        rows = [row for row, sample in enumerate(samples) if sample in looked_at]
        if not rows:
            return None
        if len(rows) < len(samples):
            if mask is not None:
                mask = mask.view(len(samples), -1)[rows].flatten()
            each = output.unbind()  # its gradient is one copy
            output = torch.stack([each[row] for row in rows])
            samples = [samples[row] for row in rows]
        q_values = self.q_values(output, samples)
        losses = []
        for router in self.routers:
            q = q_values[router.name]
            targets = self.fp_targets[router.name]
            fp = concatenate([targets[i] for i in samples]).to(q.device)
            loss = self.objective(q, fp, top_k=router.top_k)
            device_mask = None if mask is None else mask.to(loss.device)
            losses.append(reduce_tokens(loss, device_mask).to(output.device))
        return torch.stack(losses).mean()


@dataclass
class Losses:
    """Sums over the micro-batches of one iteration, by name."""

    parts: dict[str, Tensor | float] = field(default_factory=dict)
    total: Tensor | float = 0.0
    valid_tokens: Tensor | float = 0.0
    batches: int = 0

    def add(self, name: str, loss: Tensor) -> None:
        """Add one micro-batch's loss."""
        self.parts[name] = self.parts.get(name, 0.0) + loss.detach()

    def means(self) -> dict[str, float]:
        """Mean over the micro-batches."""
        count = max(self.batches, 1)
        return {name: float(loss) / count for name, loss in self.parts.items()}

    def selection_value(self) -> float:
        """What AutoRound compares to find the best iteration, up to a constant."""
        return float(self.total) / max(float(self.valid_tokens), 1.0)


@dataclass
class BlockRun:
    """The block that is being tuned.

    Attributes:
        name: Its name in the model.
        terms: Its router losses.
        keep_best: Whether AutoRound keeps the best iteration, not the last.
        tokens: Tokens of each calibration sample.
    """

    name: str
    terms: Sequence[RouterTerm]
    keep_best: bool
    tokens: SampleTokens
    quantized: int = 0
    iteration: int = 0
    current: Losses = field(default_factory=Losses)
    first: dict[str, float] | None = None
    best: dict[str, float] = field(default_factory=dict)
    best_value: float = math.inf
    best_iteration: int = 0

    def finish_iteration(self) -> None:
        """Take the sums of an iteration that is over; without sums, do nothing."""
        if self.current.batches == 0:
            return
        means, value = self.current.means(), self.current.selection_value()
        if self.first is None:
            self.first = means
        if value < self.best_value or not self.keep_best:
            self.best, self.best_value = means, value
            self.best_iteration = self.iteration
        self.current = Losses()
        self.iteration += 1

    def summary(self) -> str:
        """One line for the log.

        Raises:
            RuntimeError: No iteration was finished.
        """
        if self.first is None:
            raise RuntimeError(f"block {self.name}: no iteration was finished")

        def change(name: str) -> str:
            first: dict[str, float] = self.first or {}
            return f"{name} {first[name]:.3e} -> {self.best[name]:.3e}"

        parts = [change("reconstruction")]
        parts += [
            f"{change(term.label)} (weight {term.weight:.4g}, reaches {term.reached} "
            f"of {self.quantized} quantized layers)"
            for term in self.terms
        ]
        return f"{self.name}: iter 0 -> {self.best_iteration}: {', '.join(parts)}"


def split_samples(
    block: str, router: str, calls: Sequence[FpLogits], tokens: Sequence[int]
) -> list[FpLogits]:
    """The target of each calibration sample, from those of each router call.

    Raises:
        RuntimeError: The router saw other tokens than the block, or its values are not
            finite.
    """
    seen = sum(len(_values(call)) for call in calls)
    if seen != sum(tokens):
        raise RuntimeError(
            f"block {block}: router {router} saw {seen} tokens, the block "
            f"{sum(tokens)}; allowed is every token exactly once"
        )
    if not all(torch.isfinite(_values(call)).all() for call in calls):
        raise RuntimeError(
            f"block {block}: router {router} has non-finite full-precision values; "
            "look for inf or NaN in the model's weights or the calibration inputs"
        )
    # one call at a time: all of them concatenated would be the same memory once more
    samples: list[FpLogits] = []
    rest: FpLogits | None = None  # of a sample that ends in a later call
    for call in calls:
        left = call if rest is None else concatenate([rest, call])
        while len(samples) < len(tokens) and len(_values(left)) >= tokens[len(samples)]:
            count = tokens[len(samples)]
            samples.append(_rows(left, slice(None, count)))
            left = _rows(left, slice(count, None))
        rest = left if len(_values(left)) else None
    return samples


def _values(target: FpLogits) -> Tensor:
    return target if isinstance(target, Tensor) else target.values


def _rows(target: FpLogits, rows: slice) -> FpLogits:
    """Some tokens of a target."""
    if isinstance(target, Tensor):
        return target[rows]
    return RankedLogits(target.values[rows], target.indices[rows], target.num_experts)


def concatenate(parts: Sequence[FpLogits]) -> FpLogits:
    """The targets of several calls or samples, one behind the other."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    ranks = [part for part in parts if isinstance(part, RankedLogits)]
    return RankedLogits(
        torch.cat([part.values for part in ranks]),
        torch.cat([part.indices for part in ranks]),
        ranks[0].num_experts,
    )
