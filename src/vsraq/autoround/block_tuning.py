# SPDX-License-Identifier: Apache-2.0
"""One block while AutoRound tunes it: its router terms, and what they did."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vsraq.autoround.aligned_block import AlignedBlock
from vsraq.autoround.balance import balance_terms
from vsraq.full_precision import eager
from vsraq.processes import mean_over_processes, with_common_value
from vsraq.router_terms import RouterTerm
from vsraq.run_record.loss_curves import RECONSTRUCTION, Curves, LossCurves
from vsraq.tokens.counted import CountedTokens

logger = logging.getLogger("autoround.vsraq")

# (output of the block, its reference, samples) -> AutoRound's loss of a micro-batch
Reconstruction: TypeAlias = Callable[[Tensor, Tensor, list[int]], Tensor]


class BlockTuning:
    """The router terms of the block that is being tuned.

    The block's loss is reconstruction + sum of weight * term (VSRAQ Eq. 3).

    Args:
        block: The block.
        terms: Its router losses.
        curves: Gets the losses of every iteration.

    Attributes:
        name: Its name in the model.
        terms: Its router losses.
        curves: The losses of every iteration.
    """

    def __init__(
        self, block: AlignedBlock, terms: Sequence[RouterTerm], curves: LossCurves
    ) -> None:
        self.name = block.name
        self.terms = terms
        self.curves = curves
        self._tensors = block.tensors
        self._tokens = block.tokens
        self._per_sample = block.tokens.per_sample(block.tensors.tokens)
        self._runner = block.runner
        self._quantized = 0

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
            self.curves.add(term.label, loss)
            # A term that the tuning cannot change still differs between micro-batches;
            # that must not decide which iteration is the best.
            if term.reaches_something:
                total = total + term.weight * scale * share * loss  # type: ignore[operator]
        self.curves.add(RECONSTRUCTION, reconstruction / scale)
        total = with_common_value(total)
        self._check_finite(total)
        self.curves.end_batch(total, valid_tokens(self._tokens, samples, device))
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
        sums = ", ".join(f"{k} {v}" for k, v in self.curves.running.items())
        raise RuntimeError(
            f"block {self.name}, iteration {self.curves.iteration}: loss is "
            f"{total.item()} (sums of this iteration: {sums}); allowed are finite "
            "values; look for inf or NaN in the block's weights and calibration "
            "inputs, or lower lr"
        )

    # ── After the last iteration ─────────────────────────────────────────────

    @property
    def weights(self) -> dict[str, float]:
        """The final weights of the terms by label."""
        # "auto" where no layer was wrapped, so that nothing was balanced
        return {t.label: t.weight for t in self.terms if t.weight != "auto"}

    def log(self, curves: Curves) -> None:
        """Log what the tuning did, and which terms had no effect."""
        if curves.iterations == 0:
            logger.warning(
                "vsraq: %s: no layer was tuned, so no router was aligned", self.name
            )
            return
        logger.info("vsraq: %s", self._summary(curves))
        for term in self.terms:
            # an automatic weight is 0 there, so no warning is needed
            if term.weight != 0 and not term.reaches_something:
                logger.warning(
                    "vsraq: %s: the %s loss reaches no quantized layer of this block, "
                    "because none stands before its router; it had no effect there",
                    self.name,
                    term.label,
                )

    def _summary(self, curves: Curves) -> str:
        best = curves.best_iteration

        def change(label: str) -> str:
            losses = curves.losses[label]
            return f"{label} {losses[0]:.3e} -> {losses[best]:.3e}"

        parts = [change(RECONSTRUCTION)]
        parts += [
            f"{change(term.label)} (weight {term.weight:.4g}, reaches {term.reached} "
            f"of {self._quantized} quantized layers)"
            for term in self.terms
        ]
        return f"{self.name}: iter 0 -> {best}: {', '.join(parts)}"


def valid_tokens(
    tokens: CountedTokens, samples: list[int], device: torch.device
) -> Tensor | None:
    """Count the tokens of samples that AutoRound does not mask; None without a mask.

    Several processes have the mean of their counts.
    """
    valid = tokens.valid(samples)
    return None if valid is None else mean_over_processes(valid.to(device).sum())
