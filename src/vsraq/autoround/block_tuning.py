# SPDX-License-Identifier: Apache-2.0
"""One block while AutoRound tunes it: its router terms, and what they did."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vsraq.autoround.aligned_block import AlignedBlock
from vsraq.autoround.balance import balance_terms
from vsraq.full_precision import eager
from vsraq.processes import mean_over_processes, with_common_value
from vsraq.router_terms import RouterTerm

logger = logging.getLogger("autoround.vsraq")

# (output of the block, its reference, samples) -> AutoRound's loss of a micro-batch
Reconstruction: TypeAlias = Callable[[Tensor, Tensor, list[int]], Tensor]


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
        """Return the means over the micro-batches."""
        count = max(self.batches, 1)
        return {name: float(loss) / count for name, loss in self.parts.items()}

    def iteration_value(self) -> float:
        """Return the value whose minimum is the best iteration."""
        return float(self.total) / max(float(self.valid_tokens), 1.0)


class BlockTuning:
    """The router terms of the block that is being tuned.

    The block's loss is reconstruction + sum of weight * term (VSRAQ Eq. 3).

    Args:
        block: The block.
        terms: Its router losses.
        keep_best: Whether AutoRound keeps the best iteration, not the last.

    Attributes:
        name: Its name in the model.
        terms: Its router losses.
        current: Sums of the iteration that is running.
        iteration: Its index.
    """

    def __init__(
        self,
        block: AlignedBlock,
        terms: Sequence[RouterTerm],
        *,
        keep_best: bool,
    ) -> None:
        self.name = block.name
        self.terms = terms
        self.current = Losses()
        self.iteration = 0
        self._tensors = block.tensors
        self._tokens = block.tokens
        self._per_sample = block.tokens.per_sample(block.tensors.tokens)
        self._runner = block.runner
        self._keep_best = keep_best
        self._quantized = 0
        self._first: dict[str, float] | None = None
        self._best: dict[str, float] = {}
        self._best_value = math.inf
        self._best_iteration = 0

    # ── Before the first iteration ───────────────────────────────────────────

    def probe(
        self,
        block: nn.Module,
        micro_batches: int,
        reconstruction: Reconstruction,
        auto_ratio: float,
    ) -> None:
        """Find which layers each term reaches, and balance automatic weights.

        Args:
            block: The block, its layers wrapped by AutoRound.
            micro_batches: Of a step (`gradient_accumulate_steps`).
            reconstruction: AutoRound's mean loss of a micro-batch.
            auto_ratio: Strength of automatic weights.
        """
        size = self._runner.batch_size
        # A whole step, because in one sample many experts get no token; the one with
        # the most selected tokens, because without any, no layer is reached.
        steps = self._tensors.batches(size * micro_batches)
        step = max(steps, key=lambda samples: self._per_sample.share(samples, samples))
        with torch.enable_grad(), eager():
            self._quantized = balance_terms(
                block,
                self.terms,
                [
                    partial(
                        self._probed, block, step[i : i + size], step, reconstruction
                    )
                    for i in range(0, len(step), size)
                ],
                auto_ratio,
                self.name,
            )

    def _probed(
        self,
        block: nn.Module,
        samples: list[int],
        step: list[int],
        reconstruction: Reconstruction,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Compute a micro-batch's share of a step's reconstruction loss and terms."""
        tensors = self._tensors
        output = self._runner.forward(
            block, tensors.inputs, tensors.others, torch.tensor(samples)
        )
        of_step = len(samples) / len(step)  # AutoRound's average
        share = float(self._valid_share(samples))
        losses = [
            None if loss is None else of_step * share * weight * loss
            for weight, loss in self._losses(output, samples, step)
        ]
        if not any(term.weight == "auto" for term in self.terms):
            return None, losses
        reference = tensors.reference(samples).to(output.device)
        return of_step * reconstruction(output, reference, samples), losses

    # ── In every iteration ───────────────────────────────────────────────────

    def total_loss(
        self,
        reconstruction: Tensor,
        output: Tensor,
        samples: list[int],
        step: list[int],
        scale: int,
    ) -> Tensor:
        """Add the weighted router losses to AutoRound's loss of a micro-batch.

        Args:
            reconstruction: AutoRound's loss, a scalar.
            output: The block's output, (B, S, H).
            samples: Which B calibration samples.
            step: All samples of the step, over its micro-batches.
            scale: AutoRound's loss divided by the mean error: 1, or the number of
                elements where the loss is a sum.

        Raises:
            RuntimeError: The loss is not finite.
        """
        total = reconstruction
        device = reconstruction.device
        share = self._valid_share(samples, device)
        losses = self._losses(output, samples, step, over_processes=True)
        for term, (weight, loss) in zip(self.terms, losses, strict=True):
            if loss is None:
                continue
            loss = weight * loss.to(device)
            self.current.add(term.label, loss)
            # A term that the tuning cannot change still differs between micro-batches;
            # that must not decide which iteration is the best.
            if term.reaches_something:
                total = total + term.weight * scale * share * loss  # type: ignore[operator]
        self.current.add("reconstruction", reconstruction / scale)
        total = with_common_value(total)
        self._check_finite(total)
        self.current.total += total.detach()
        # Without a mask AutoRound divides by a constant: the same iteration is best.
        valid = self._tokens.valid(samples)
        if valid is not None:
            count = valid.to(device).sum()
            self.current.valid_tokens += mean_over_processes(count)
        self.current.batches += 1
        return total

    def _losses(
        self,
        output: Tensor,
        samples: list[int],
        step: list[int],
        *,
        over_processes: bool = False,
    ) -> list[tuple[float, Tensor | None]]:
        """Compute a micro-batch's weight in its step and its mean loss, for each term.

        The loss is None where a term uses none of the samples.
        """
        counted = self._tokens.counted(samples)
        found: list[tuple[float, Tensor | None]] = []
        for term in self.terms:
            looked_at = term.looked_at(step)
            loss = term.loss(output, samples, counted, looked_at)
            weight = 0.0
            if loss is not None:
                weight = self._per_sample.weight(
                    samples, step, looked_at, over_processes=over_processes
                )
            found.append((weight, loss))
        return found

    def _valid_share(
        self, samples: list[int], device: torch.device | str = "cpu"
    ) -> Tensor | float:
        """Return the share of the tokens that AutoRound does not mask.

        AutoRound's average divides by masked elements too. The router terms are scaled
        alike, so that the ratio of the losses stays the same.
        """
        valid = self._tokens.valid(samples)
        if valid is None:
            return 1.0
        return valid.to(device).sum() / valid.numel()

    def _check_finite(self, total: Tensor) -> None:
        if torch.isfinite(total):
            return
        sums = ", ".join(f"{k} {float(v)}" for k, v in self.current.parts.items())
        raise RuntimeError(
            f"block {self.name}, iteration {self.iteration}: loss is {total.item()} "
            f"(sums of this iteration: {sums}); allowed are finite values; look for "
            "inf or NaN in the block's weights and calibration inputs, or lower lr"
        )

    def finish_iteration(self) -> None:
        """Close the running iteration; without sums, do nothing."""
        if self.current.batches == 0:
            return
        means, value = self.current.means(), self.current.iteration_value()
        if self._first is None:
            self._first = means
        if value < self._best_value or not self._keep_best:
            self._best, self._best_value = means, value
            self._best_iteration = self.iteration
        self.current = Losses()
        self.iteration += 1

    # ── After the last iteration ─────────────────────────────────────────────

    def log(self) -> None:
        """Log what the tuning did, and which terms had no effect."""
        if self._first is None:
            logger.warning(
                "vsraq: %s: no layer was tuned, so no router was aligned", self.name
            )
            return
        logger.info("vsraq: %s", self._summary(self._first))
        for term in self.terms:
            # an automatic weight is 0 there, so no warning is needed
            if term.weight != 0 and not term.reaches_something:
                logger.warning(
                    "vsraq: %s: the %s loss reaches no quantized layer of this block, "
                    "because none stands before its router; it had no effect there",
                    self.name,
                    term.label,
                )

    def _summary(self, first: dict[str, float]) -> str:
        def change(name: str) -> str:
            return f"{name} {first[name]:.3e} -> {self._best[name]:.3e}"

        parts = [change("reconstruction")]
        parts += [
            f"{change(term.label)} (weight {term.weight:.4g}, reaches {term.reached} "
            f"of {self._quantized} quantized layers)"
            for term in self.terms
        ]
        return f"{self.name}: iter 0 -> {self._best_iteration}: {', '.join(parts)}"
