# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch counts in its step.

With gradient accumulation a step has several micro-batches, and AutoRound adds them up
by their valid tokens. A mean over other tokens, those that are selected or those of the
samples that a term looks at, has to count by those, so that the step is the loss of the
undivided batch (of SRA's Eq. 8, say).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsraq.processes import process_count, sum_over_processes


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


def count_tokens(
    tokens: Sequence[int], masks: Callable[[int], tuple[Tensor | None, Tensor | None]]
) -> SampleTokens:
    """Count the tokens of each calibration sample.

    Args:
        tokens: All tokens of each sample.
        masks: Sample -> its valid tokens and those that count, (T,), None for all.
    """
    valid, counted = [], []
    for sample, total in enumerate(tokens):
        own_valid, own_counted = masks(sample)
        valid.append(total if own_valid is None else int(own_valid.sum()))
        counted.append(total if own_counted is None else int(own_counted.sum()))
    return SampleTokens(valid, counted)
