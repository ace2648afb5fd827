# SPDX-License-Identifier: Apache-2.0
"""Which tokens count, and what a micro-batch counts in its step.

AutoRound masks some tokens; of the valid ones only those count for the routers that are
selected. With gradient accumulation a step has several micro-batches, and AutoRound
adds them up by their valid tokens. A mean over other tokens, those that are selected or
those of the samples that a term looks at, has to count by those, so that the step is
the loss of the undivided batch (of SRA's Eq. 8, say).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsraq.processes import process_count, sum_over_processes
from vsraq.tokens import TokenMask


@dataclass(frozen=True)
class CountedTokens:
    """Which tokens of the calibration samples count.

    Attributes:
        valid_masks: AutoRound's masks of each sample; None or empty for all tokens.
        selected: The selected tokens; None for all.
    """

    valid_masks: Sequence[Tensor] | None
    selected: TokenMask | None

    def valid(self, samples: Sequence[int]) -> Tensor | None:
        """Valid tokens of some samples, (T,); None for all."""
        if not self.valid_masks:
            return None
        return torch.cat([self.valid_masks[i].flatten() for i in samples])

    def counted(self, samples: Sequence[int]) -> Tensor | None:
        """Tokens that count for the routers, (T,): valid ones that are selected.

        None is all of them: a mean over all tokens may round otherwise than one over
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
        """How many count.

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
    """Tokens of each calibration sample.

    Attributes:
        valid: How many AutoRound does not mask.
        counted: How many of those count for the routers.
    """

    valid: Sequence[int]
    counted: Sequence[int]

    def share(self, samples: Sequence[int], looked_at: Sequence[int]) -> float:
        """Counted tokens of the samples looked at, per valid token of all of them.

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
        """What a micro-batch's mean over the tokens of a term counts in its step.

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
            own = torch.tensor([counted, valid], dtype=torch.float64)
            total = sum_over_processes(own)
            in_step = float(total[0] / total[1].clamp(min=1))
        if in_step == 0:
            return 0.0
        return self.share(samples, [i for i in samples if i in looked_at]) / in_step
