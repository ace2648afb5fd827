# SPDX-License-Identifier: Apache-2.0
"""How many calibration tokens each expert got.

The rounding of an expert that no token reached is untuned, and the scale of its
activations (NVFP4, INT8) is a guess.

Shapes: T tokens, K top-k, E experts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsraq.processes import sum_over_processes
from vsraq.whole_file import write_whole

FILE_NAME = "expert_coverage.json"


class ExpertCoverage:
    """Counts of tokens by router and expert.

    Args:
        min_tokens: Experts with fewer tokens are named.

    Experts are tuned on the tokens of the quantized stream, so these decide which have
    too few. The counts in full precision are kept for comparison.

    Attributes:
        tokens: By router name, tokens of each expert on the quantized stream, (E,)
            int64.
        fp_tokens: The same in full precision.
    """

    def __init__(self, min_tokens: int = 1) -> None:
        self.min_tokens = min_tokens
        self.tokens: dict[str, Tensor] = {}
        self.fp_tokens: dict[str, Tensor] = {}

    def add(
        self,
        router: str,
        num_experts: int,
        q_selected: Tensor,
        fp_selected: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Count tokens, summed over all processes that tune the model.

        Args:
            router: The router's name.
            num_experts: Experts with weights; higher indices do not count.
            q_selected: The experts that it chose on the quantized stream, (T, K).
            fp_selected: Those that it chose in full precision, (T, K).
            mask: Tokens that count, (T,), or None for all.
        """
        for counts, selected in (
            (self.tokens, q_selected),
            (self.fp_tokens, fp_selected),
        ):
            if mask is not None:
                selected = selected[mask.to(selected.device).bool()]
            found = torch.bincount(selected.flatten().long(), minlength=num_experts)
            found = sum_over_processes(found[:num_experts])
            counts[router] = counts.get(router, 0) + found.cpu()

    def starved(self, router: str) -> list[int]:
        """List the experts with fewer than `min_tokens` tokens."""
        return (self.tokens[router] < self.min_tokens).nonzero().flatten().tolist()

    def __bool__(self) -> bool:
        """Whether anything was counted."""
        return bool(self.tokens)

    def table(self) -> Iterator[str]:
        """Yield lines for a log: tokens per expert of each router."""
        width = max(map(len, self.tokens), default=0)
        yield (
            f"{'tokens per expert':{width}}  {'min':>8} {'median':>8} {'max':>8}  "
            f"below {self.min_tokens}"
        )
        for name, tokens in self.tokens.items():
            starved = self.starved(name)
            experts = f"{len(starved)} of {len(tokens)}"
            yield (
                f"{name:{width}}  {int(tokens.min()):8d} {int(tokens.median()):8d} "
                f"{int(tokens.max()):8d}  {experts}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return what `save` writes."""
        return {
            "min_tokens_per_expert": self.min_tokens,
            "routers": {
                name: {
                    "tokens": tokens.tolist(),
                    "full_precision_tokens": self.fp_tokens[name].tolist(),
                    "below_minimum": self.starved(name),
                }
                for name, tokens in self.tokens.items()
            },
        }

    def save(self, folder: str | Path) -> Path:
        """Write `expert_coverage.json` into a folder, whole or not at all.

        Returns:
            The file's path.
        """
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.as_dict(), indent=1))
        return path
