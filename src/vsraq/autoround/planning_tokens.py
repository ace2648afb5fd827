# SPDX-License-Identifier: Apache-2.0
"""The tokens that a plan is measured with."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from auto_round.calib_dataset import get_dataloader
from torch import Tensor

_BATCH_TOKENS = 4096
SAMPLE_TOKENS = 512  # of a sample that is measured with, where there are many


def token_batches(
    dataset: Any,
    tokenizer: Any,
    tokens: int,
    seqlen: int,
    seed: int,
    nsamples: int | None = None,
) -> list[Tensor]:
    """Return token ids to measure with: batches of samples of one length.

    Args:
        dataset: AutoRound's name of a data set or a file, or samples: token ids (S,)
            or (B, S), mappings with `input_ids`, or texts. What an `attention_mask`
            leaves out is left out.
        tokenizer: The model's.
        tokens: How many tokens at most; one sample at least.
        seqlen: Tokens of a sample, where `dataset` is a name.
        seed: Draws the samples, where `dataset` is a name.
        nsamples: How many samples a run draws, where `dataset` is a name. As many are
            drawn here; they are cut to 512 tokens, or more if they are few, so that
            several texts are measured with. None draws as many as `tokens` are, and
            cuts none.

    Raises:
        ValueError: There is no sample, or one that is no token ids.
    """
    if tokens < 1 or seqlen < 2:
        raise ValueError(
            f"tokens={tokens}, seqlen={seqlen}: allowed are tokens >= 1, seqlen >= 2"
        )
    if isinstance(dataset, str):
        count = -(-tokens // seqlen) if nsamples is None else nsamples
        dataset = get_dataloader(tokenizer, seqlen, dataset, seed, 1, count)
        if nsamples is not None:
            rows = list(_rows(dataset, tokenizer))
            length = max(SAMPLE_TOKENS, tokens // max(len(rows), 1))
            dataset = [row[:, :length] for row in rows]
    by_length: dict[int, list[Tensor]] = {}
    left = tokens
    for sample in _rows(dataset, tokenizer):
        if by_length and sample.numel() > left:
            break
        left -= sample.numel()
        by_length.setdefault(sample.shape[1], []).append(sample)
    if not by_length:
        raise ValueError("dataset: it has no sample; allowed is one or more")
    return [
        torch.cat(rows[start : start + step])
        for length, rows in by_length.items()
        for step in [max(1, _BATCH_TOKENS // length)]
        for start in range(0, len(rows), step)
    ]


def _rows(dataset: Iterable[Any], tokenizer: Any) -> Iterator[Tensor]:
    """Yield samples as (1, S), without padding."""
    for sample in dataset:
        if sample is None:  # AutoRound's loader drops samples that repeat a token
            continue
        mask = None
        if isinstance(sample, Mapping) and "input_ids" not in sample:
            if "text" not in sample:
                raise ValueError(
                    f"dataset: a sample has the keys {sorted(map(str, sample))}; "
                    "allowed are input_ids, or text"
                )
            sample = sample["text"]
        if isinstance(sample, str):
            sample = tokenizer(sample)
        if isinstance(sample, Mapping):
            mask, sample = sample.get("attention_mask"), sample["input_ids"]
        ids = torch.as_tensor(sample)
        if ids.ndim not in (1, 2) or (ids.numel() and ids.is_floating_point()):
            raise ValueError(
                f"dataset: a sample has the shape {tuple(ids.shape)} and the type "
                f"{ids.dtype}; allowed are token ids of the shape (S,) or (B, S)"
            )
        kept = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        kept = kept.bool().view_as(ids)
        for row, in_row in zip(
            torch.atleast_2d(ids), torch.atleast_2d(kept), strict=True
        ):
            if in_row.any():
                yield row[in_row].long().unsqueeze(0)
