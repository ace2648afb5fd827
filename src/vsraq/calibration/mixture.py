# SPDX-License-Identifier: Apache-2.0
"""Calibration samples of equal length, drawn from several sources.

Shapes: N samples, S tokens each.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from vsraq.calibration.documents import document_ids
from vsraq.calibration.hub import rows
from vsraq.calibration.names import Part, count_samples

logger = logging.getLogger("autoround.vsraq")

# (text of AutoRound's name, samples) -> token ids of each
OtherSets: TypeAlias = Callable[[str, int], Iterable[Sequence[int]]]


@dataclass
class SourceReport:
    """What became of the documents of one source.

    Attributes:
        name: The source's name.
        samples: Samples that it gave.
        documents: Documents that were read for them.
        too_short: Documents with fewer tokens than a sample, which are not used; with
            `concat`, none is too short.
        repeated: Samples that repeat one token, which AutoRound drops.
        empty: Rows without text.
    """

    name: str
    samples: int = 0
    documents: int = 0
    too_short: int = 0
    repeated: int = 0
    empty: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.samples} samples of {self.documents} documents; "
            f"dropped: {self.too_short} too short, {self.repeated} repeating one "
            f"token, {self.empty} empty"
        )


def draw(
    parts: Sequence[Part],
    tokenizer: Any,
    nsamples: int,
    seqlen: int,
    seed: int,
    others: OtherSets | None = None,
) -> tuple[list[list[int]], list[SourceReport]]:
    """Draw samples from the parts of a mixture, and shuffle them.

    What AutoRound alone reads keeps its order.

    Args:
        parts: The parts.
        tokenizer: The model's.
        nsamples: N.
        seqlen: S.
        seed: Draws the documents and the order.
        others: Reads a data set that is not ours.

    Returns:
        Token ids, N lists of S, and what became of each source's documents.

    Raises:
        ValueError: A source has too few samples, or another layout.
        ConnectionError: The hub could not be reached.
        PermissionError: A data set is gated.
        FileNotFoundError: There is no such file or data set.
    """
    if nsamples < 1 or seqlen < 2:
        raise ValueError(
            f"nsamples={nsamples}, seqlen={seqlen}: allowed are nsamples >= 1, "
            "seqlen >= 2"
        )
    samples: list[list[int]] = []
    reports = []
    counts = zip(parts, count_samples(parts, nsamples), strict=True)
    # AutoRound forks a process, which is best done before the threads of our streams
    for part, count in sorted(counts, key=lambda pair: pair[0].source is not None):
        if not count:
            continue
        report = SourceReport(part.name)
        if part.source is None:
            given = others(part.text, count) if others is not None else ()
            found = [[int(i) for i in ids[:seqlen]] for ids in given]
            report.documents = len(found)
        else:
            stream = _samples(part, tokenizer, seqlen, seed, report)
            found = list(islice(stream, count))
        report.samples = len(found)
        logger.info("vsraq: calibration data: %s", report)
        if len(found) < count:
            raise ValueError(_too_few(part, report, count, seqlen))
        samples += found
        reports.append(report)
    if any(part.source is not None for part in parts):
        random.Random(seed).shuffle(samples)
    return samples, reports


def _samples(
    part: Part, tokenizer: Any, seqlen: int, seed: int, report: SourceReport
) -> Iterator[list[int]]:
    """Yield the samples of one source as far as they are asked for."""
    for window in _windows(part, tokenizer, seqlen, seed, report):
        # AutoRound's rule: such samples are broken text, or padding
        if window.count(window[-1]) > seqlen // 2 and seqlen > 2:
            report.repeated += 1
        else:
            yield window


def _windows(
    part: Part, tokenizer: Any, seqlen: int, seed: int, report: SourceReport
) -> Iterator[list[int]]:
    assert part.source is not None
    joined: list[int] = []
    for row in rows(part.source, seed):
        limit = None if part.concat else seqlen
        ids = document_ids(row, part.source, tokenizer, limit)
        report.documents += 1
        if not ids:
            report.empty += 1
        elif part.concat:
            joined += ids
            while len(joined) >= seqlen:
                yield joined[:seqlen]
                joined = joined[seqlen:]
        elif len(ids) < seqlen:
            report.too_short += 1
        else:
            yield ids


def _too_few(part: Part, report: SourceReport, count: int, seqlen: int) -> str:
    if part.concat:
        remedy = "take more text, or lower nsamples or seqlen"
    else:
        remedy = "lower nsamples or seqlen, take more or longer texts" + (
            "" if part.source is None else ", or join documents with :concat=true"
        )
    return (
        f"dataset={part.name!r}: it has {report.samples} samples of seqlen={seqlen} "
        f"tokens, {count} are wanted; of {report.documents} documents "
        f"{report.too_short} are shorter, {report.empty} are empty and "
        f"{report.repeated} samples repeat one token; {remedy}"
    )
