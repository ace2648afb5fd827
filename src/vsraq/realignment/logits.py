# SPDX-License-Identifier: Apache-2.0
"""The full-precision logits that a re-fit reads, and how many of them are kept.

A re-fit needs the sums X^T X and X^T Z over tokens. Z, (T, E), is known before the
block is tuned and X, (T, H), only after, so one of the two has to be kept for every
token that takes part. Z is smaller. A linear map with H unknowns per expert does not
need more than a few hundred tokens for each of them, so the number of tokens is
limited and not their precision.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from vsraq.ranks import split_samples

REFIT_BYTES = 160_000_000
"""Size of the logits of one router: 625,000 tokens of 128 experts."""


def in_half(logits: Tensor) -> Tensor:
    """Convert logits to float16, unless one of them is too large for it.

    The rounding error, 2^-12 of a logit, is an eighth of that of bfloat16 inputs, from
    which logits are computed.
    """
    half = logits.to(torch.float16)
    return half if half.isfinite().all() else logits


class RefitLogits:
    """The logits of one router's calls, up to `REFIT_BYTES`.

    Args:
        cache_device: Where they are kept.
    """

    def __init__(self, cache_device: torch.device | str) -> None:
        self._cache_device = cache_device
        self._calls: list[Tensor] = []
        self._left = REFIT_BYTES
        self._full = False

    def add(self, logits: Tensor) -> None:
        """Keep the logits of one call, (T, E), or of its first tokens."""
        half = in_half(logits)
        rows = self._left // (half.shape[1] * half.element_size())
        if rows < len(half):
            self._full = True
            half = half[:rows].clone()  # not a view that keeps the rest alive
        if self._full and not len(half):
            return
        self._left -= half.nbytes
        self._calls.append(half.to(self._cache_device))

    def samples(self, block: str, router: str, tokens: Sequence[int]) -> list[Tensor]:
        """Return the logits of each sample, (T, E), or of the first samples only.

        Args:
            block: The block's name.
            router: The router's name.
            tokens: Tokens of each sample.

        Raises:
            RuntimeError: See `split_samples`.
        """
        seen = sum(len(call) for call in self._calls)
        if self._full:
            count = sum(end <= seen for end in accumulate(tokens))
            tokens = tokens[:count]
            self._drop_rows(seen - sum(tokens))
        return cast(list[Tensor], split_samples(block, router, self._calls, tokens))

    def _drop_rows(self, count: int) -> None:
        """Drop the last tokens: a part of a sample."""
        while count:
            last = self._calls.pop()
            if len(last) > count:
                self._calls.append(last[:-count])
            count = max(count - len(last), 0)
