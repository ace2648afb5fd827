# SPDX-License-Identifier: Apache-2.0
"""What a run reports about the calibration tokens that its experts got."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vsraq.expert_coverage import ExpertCoverage
from vsraq.options import OnUnreached

logger = logging.getLogger("autoround.vsraq")


class RunCoverage:
    """Token counts of every tuned block, reported at the end of the run.

    Args:
        min_tokens: Experts with fewer tokens are named.
        on_unreached: Whether to name them at the end, or to end the run at once.
    """

    def __init__(
        self, min_tokens: int | None = None, on_unreached: OnUnreached | None = None
    ) -> None:
        self._counts = ExpertCoverage(min_tokens or 1)
        self._on_unreached = on_unreached

    def add(
        self,
        router: str,
        num_experts: int,
        q_selected: Tensor,
        fp_selected: Tensor,
        mask: Tensor | None,
    ) -> None:
        """Count the tokens of one router's experts; see `ExpertCoverage.add`.

        Raises:
            ValueError: An expert got too few, and `on_unreached` is "error".
        """
        self._counts.add(router, num_experts, q_selected, fp_selected, mask)
        starved = self._counts.starved(router)
        if starved and self._on_unreached == "error":
            raise ValueError(
                f"router {router}: experts {starved} got fewer than "
                f"min_tokens_per_expert={self._counts.min_tokens} calibration tokens; "
                'allowed with on_unreached="error" is none; calibrate on more or other '
                'text (nsamples, seqlen, dataset), or pass on_unreached="warn"'
            )

    def counts_of(self, router: str) -> dict[str, Tensor]:
        """Return what was counted of one router, by kind, each (E,); see `restore`."""
        if router not in self._counts.tokens:
            return {}
        return {
            "tokens": self._counts.tokens[router],
            "fp_tokens": self._counts.fp_tokens[router],
        }

    def restore(self, router: str, counts: Mapping[str, Tensor]) -> None:
        """Take over what `counts_of` gave in the run that is resumed."""
        if counts:
            self._counts.tokens[router] = counts["tokens"]
            self._counts.fp_tokens[router] = counts["fp_tokens"]

    @property
    def tokens(self) -> dict[str, list[int]]:
        """By router, calibration tokens of each expert; empty after `report`."""
        return {name: tokens.tolist() for name, tokens in self._counts.tokens.items()}

    def report(self, num_routers: int, folder: str | Path | None) -> None:
        """Log the counts, and write them to an export; once.

        Args:
            num_routers: Of the model, counted or not.
            folder: Of the export, or None.
        """
        counts = self._counts
        if not counts:
            return
        for line in counts.table():
            logger.info("vsraq: %s", line)
        if len(counts.tokens) < num_routers:
            logger.info(
                "vsraq: tokens of %d of %d routers were counted; the others are "
                "not to be quantized, or choose by an unknown rule",
                len(counts.tokens),
                num_routers,
            )
        starved = {n: e for n in counts.tokens if (e := counts.starved(n))}
        if starved:
            logger.warning(
                "vsraq: fewer than %d calibration tokens reached some experts, so "
                "their rounding is untuned, and with quantized activations their "
                "scale is a guess: %s; calibrate on more or other text",
                counts.min_tokens,
                "; ".join(f"{name} {experts}" for name, experts in starved.items()),
            )
        if folder is not None:
            path = counts.save(folder)
            logger.info("vsraq: tokens per expert are in %s", path)
        self._counts = ExpertCoverage(counts.min_tokens)
