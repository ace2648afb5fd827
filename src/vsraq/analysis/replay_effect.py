# SPDX-License-Identifier: Apache-2.0
"""What a replay of the full-precision routing changed, and the file that holds it.

docs/replay.md describes `replay.json`.

Shapes: N sequences, T tokens of one batch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from vsraq.analysis.intervals import Interval, ratio_intervals
from vsraq.analysis.results import DataUsed, HistogramCounts, SamplingUsed
from vsraq.analysis.tally import Histogram, Thresholds
from vsraq.json_file import write_json_file

FORMAT = "vsraq-replay/1"
REPLAY_FILE = "replay.json"
# the regions of SRA Fig. 3, or every token
Region: TypeAlias = Literal["A", "B", "C", "D", "all"]
# Sampled-JSD is at most ln 2, so that its change is between -0.7 and 0.7. The bin in
# the middle has what did not change.
_EDGES = [(2 * i - 1) / 200 for i in range(-70, 72)]


@dataclass(frozen=True)
class ReplayEffect:
    """What a quantized model's output gains from the full-precision routing.

    All figures are over the chosen tokens, their intervals 95 %, over sequences.

    Attributes:
        created: When, UTC.
        versions: Of vsraq, torch and transformers.
        method: Name of the quantized model.
        source: Its path, or its class where it was in memory.
        data: The text.
        sampling: How outputs are sampled.
        thresholds: What counts as high in the regions.
        tokens: All tokens.
        chosen: How many of them got the full-precision routing.
        region: Which: a region of SRA Fig. 3, "all", or "mask" for a mask of one's own.
        before: "sampled_jsd", the mean, nats.
        after: The same with the full-precision routing.
        mean_change: After - before, nats; negative is better.
        improved: Share of the chosen tokens whose Sampled-JSD became smaller.
        change: Histogram of after - before, nats.
    """

    created: str
    versions: dict[str, str]
    method: str
    source: str
    data: DataUsed
    sampling: SamplingUsed
    thresholds: Thresholds
    tokens: int
    chosen: int
    region: str
    before: dict[str, Interval]
    after: dict[str, Interval]
    mean_change: Interval
    improved: Interval
    change: HistogramCounts

    def as_dict(self) -> dict[str, Any]:
        """Return what `replay.json` holds."""
        return {"format": FORMAT} | asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `replay.json`, whole or not at all.

        Args:
            folder: It is made if it is not there.

        Returns:
            The file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_file(folder / REPLAY_FILE, self.as_dict())
        return folder / REPLAY_FILE

    def __str__(self) -> str:
        where = f"region {self.region}" if self.region in "ABCD" else self.region
        share = self.chosen / max(self.tokens, 1)
        return (
            f"{self.method}: {self.chosen} of {self.tokens} tokens ({share:.1%}, "
            f"{where}) with the full-precision routing\n"
            f"  Sampled-JSD  {self.before['sampled_jsd']} -> "
            f"{self.after['sampled_jsd']} nats\n"
            f"  change       {self.mean_change} nats\n"
            f"  improved     {self.improved} of these tokens"
        )


class ReplaySums:
    """Sums over the chosen tokens while a model runs: a row per sequence."""

    def __init__(self) -> None:
        self.change = Histogram(_EDGES)
        self._rows: list[Tensor] = []

    def add(self, chosen: Tensor, before: Tensor, after: Tensor) -> None:
        """Add a batch.

        Args:
            chosen: bool, (B, S).
            before: Sampled-JSD, nats, (T,).
            after: The same under the replay, (T,).
        """
        before, after = (v.double().view(chosen.shape) for v in (before, after))
        change = after - before
        self.change.add(change[chosen])
        columns = (
            torch.ones_like(change),
            before,
            after,
            change,
            (change < 0).double(),
        )
        table = torch.stack(columns, dim=-1) * chosen.unsqueeze(-1)
        self._rows.append(table.sum(1))

    @property
    def chosen(self) -> int:
        """How many tokens were chosen."""
        return int(torch.cat(self._rows)[:, 0].sum())

    def histogram(self) -> HistogramCounts:
        """Return how the Sampled-JSD of each of them changed, nats."""
        found = self.change
        return HistogramCounts(found.edges, found.counts, found.below, found.above)

    def intervals(self, seed: int) -> list[Interval]:
        """Return the means before and after, the change, and the share improved."""
        table = torch.cat(self._rows).numpy()
        counts = np.repeat(table[:, :1], 4, axis=1)
        return ratio_intervals(table[:, 1:], counts, seed=seed)


def check_choice(tokens: Region | Tensor, shapes: list[tuple[int, int]]) -> None:
    """Check which tokens are to be chosen.

    Args:
        tokens: A region, or a mask.
        shapes: The text: sequences and positions, for each length of sequences.

    Raises:
        ValueError: It is neither, or the mask is not one of these tokens.
    """
    regions = get_args(Region)
    if isinstance(tokens, Tensor):
        fits = len(shapes) == 1 and tuple(tokens.shape) == shapes[0]
        if not fits or tokens.dtype != torch.bool:
            raise ValueError(
                f"tokens: a mask of {tokens.dtype} and shape {tuple(tokens.shape)}; "
                f"the text has shape {', '.join(map(str, shapes))}: allowed is "
                "torch.bool of one such shape, or sequences of equal length"
            )
    elif tokens not in regions:
        raise ValueError(
            f"tokens={tokens!r}: allowed are {', '.join(regions)}, or a mask"
        )
