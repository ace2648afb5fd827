# SPDX-License-Identifier: Apache-2.0
"""Which tokens count, and the weight of a micro-batch in its step.

AutoRound masks some tokens. Of the valid ones, only selected tokens count for the
routers. With gradient accumulation a step has several micro-batches, and AutoRound
weighs them by their valid tokens. A mean over other tokens (the selected ones, or those
of the samples that a term looks at) has to be weighed by these, so that the step has
the loss of the undivided batch (SRA Eq. 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsraq.processes import process_count, sum_over_processes
from vsraq.tokens import TokenMask


@dataclass(frozen=True)
class CountedTokens:
    """The tokens of the calibration samples that count.

    Attributes:
        valid_masks: AutoRound's masks of each sample; None or empty for all tokens.
        selected: The selected tokens; None for all.
    """

    valid_masks: Sequence[Tensor] | None
    selected: TokenMask | None

    def valid(self, samples: Sequence[int]) -> Tensor | None:
        """Return the valid tokens of some samples, (T,); None for all."""
        if not self.valid_masks:
            return None
        return torch.cat([self.valid_masks[i].flatten() for i in samples])

    def counted(self, samples: Sequence[int]) -> Tensor | None:
        """Return the tokens that count for the routers, (T,): valid and selected.

        None is all of them: a mean over all tokens may round differently from one over
        a mask of ones.
        """
        valid = self.valid(samples)
        if self.selected is None:
            return valid
        selected = self.selected.of_samples(samples)
        if selected.all():
            return valid
        return selected if valid is None else valid * selected.to(valid)

    def per_sample(self, tokens: Sequence[int]) -> "SampleTokens":
        """Count the valid tokens and those that count for the routers.

        Args:
            tokens: All tokens of each sample.
        """
        valid, counted = [], []
        for sample, total in enumerate(tokens):
            masks = self.valid([sample]), self.counted([sample])
            numbers = [total if mask is None else int(mask.sum()) for mask in masks]
            valid.append(numbers[0])
            counted.append(numbers[1])
        return SampleTokens(valid, counted)


@dataclass(frozen=True)
class SampleTokens:
    """Numbers of tokens of each calibration sample.

    Attributes:
        valid: How many AutoRound does not mask.
        counted: How many of those count for the routers.
    """

    valid: Sequence[int]
    counted: Sequence[int]

    def share(self, samples: Sequence[int], looked_at: Sequence[int]) -> float:
        """Divide the counted tokens of the samples looked at by all valid tokens.

        Args:
            samples: Some samples.
            looked_at: Those of them that a term looks at.
        """
        valid = sum(self.valid[i] for i in samples)
        return sum(self.counted[i] for i in looked_at) / max(valid, 1)

    def weight(
        self,
        samples: Sequence[int],
        step: Sequence[int],
        looked_at: Sequence[int],
        *,
        over_processes: bool = False,
    ) -> float:
        """Compute the weight of a micro-batch's mean over a term's tokens.

        (term's tokens here / term's in the step) * (valid in the step / valid here), 1
        where the micro-batch is the step. AutoRound averages processes by their valid
        tokens too, so that the step is that of all of them.

        Args:
            samples: Of the micro-batch.
            step: Of the step, over all micro-batches.
            looked_at: Those of the step that the term looks at.
            over_processes: Whether the step is that of all processes; then each of
                them has to call this.
        """
        several = over_processes and process_count() > 1
        if len(samples) == len(step) and not several:
            return 1.0
        in_step = self.share(step, looked_at)
        if several:
            counted = sum(self.counted[i] for i in looked_at)
            valid = sum(self.valid[i] for i in step)
            sums = torch.tensor([counted, valid], dtype=torch.float64)
            total = sum_over_processes(sums)
            in_step = float(total[0] / total[1].clamp(min=1))
        if in_step == 0:
            return 0.0
        return self.share(samples, [i for i in samples if i in looked_at]) / in_step
