# SPDX-License-Identifier: Apache-2.0
"""The router losses of the block that is being tuned, and what they did.

A block has up to two terms: its own routers, and the next router. Both compare the
micro-batch with what the same samples have in full precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vsraq.capture import RouterCapture
from vsraq.losses import reduce_tokens
from vsraq.objectives import Objective
from vsraq.options import Weight
from vsraq.ranks import FpTarget, concatenate
from vsraq.routers import Router

OWN_ROUTER, NEXT_ROUTER = "router", "next router"
# (output of the block, samples of the micro-batch) -> logits (T, E), or inputs (T, H),
# by router name
QCompared: TypeAlias = Callable[[Tensor, list[int]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class BlockTensors:
    """The tensors that AutoRound tunes a block with.

    Attributes:
        inputs: Hidden states on the path that is tuned, per sample (or AutoRound's
            mapping of several).
        others: The other arguments that AutoRound has cached for the block.
        fp_outputs: Outputs of the block in full precision, per sample, (1, S, H).
    """

    inputs: Any
    others: dict[str, Any]
    fp_outputs: Sequence[Tensor]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each sample."""
        # some families have several streams of hidden states after these two dimensions
        return [output.shape[0] * output.shape[1] for output in self.fp_outputs]

    def batches(self, batch_size: int, count: int | None = None) -> list[list[int]]:
        """Split the first `count` samples, or all, into batches in order."""
        samples = list(range(len(self.fp_outputs)))[:count]
        return [samples[i : i + batch_size] for i in samples[::batch_size]]

    def reference(self, samples: Sequence[int]) -> Tensor:
        """Return the full-precision outputs of some samples, (B, S, H)."""
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
        q_compared: Computes what is compared, logits or inputs, of a micro-batch.
        every_second: Whether the term uses only every second sample of a step. Steps
            are drawn anew in each iteration, so the expected loss stays the same, and
            the look-ahead costs half.
        reached: Quantized layers of the block that the term depends on.
        reaches_something: Whether the term depends on any tuned parameter.
    """

    label: str
    objective: Objective
    weight: Weight
    routers: Sequence[Router]
    fp_targets: Mapping[str, list[FpTarget]]
    q_compared: QCompared
    every_second: bool = False
    reached: int = 0
    reaches_something: bool = False

    def looked_at(self, step: Sequence[int]) -> Sequence[int]:
        """Return the samples of a step that the term uses.

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
        """Average over routers and counted tokens of the samples that are looked at.

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
        q_compared = self.q_compared(output, samples)
        losses = []
        for router in self.routers:
            q = q_compared[router.name]
            targets = self.fp_targets[router.name]
            fp = concatenate([targets[i] for i in samples]).to(q.device)
            loss = self.objective(q, fp, top_k=router.top_k)
            device_mask = None if mask is None else mask.to(loss.device)
            losses.append(reduce_tokens(loss, device_mask).to(output.device))
        return torch.stack(losses).mean()


def own_term(
    objective: Objective,
    weight: Weight,
    routers: Sequence[Router],
    fp_targets: Mapping[str, list[FpTarget]],
    capture: RouterCapture[Tensor],
) -> RouterTerm:
    """Build the term of a block's own routers, from what a capture records.

    Args:
        objective: The loss per token.
        weight: Its weight.
        routers: The block's routers.
        fp_targets: By router name, what each sample has in full precision.
        capture: Open while the block is tuned.
    """

    def q_compared(_output: Tensor, _samples: list[int]) -> dict[str, Tensor]:
        return {name: torch.cat(calls) for name, calls in capture.take().items()}

    return RouterTerm(OWN_ROUTER, objective, weight, routers, fp_targets, q_compared)
