# SPDX-License-Identifier: Apache-2.0
"""What a block's routers do in full precision, taken from AutoRound's own forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vsraq.capture import RouterCapture
from vsraq.objectives import Objective
from vsraq.options import Alignment, RankBy
from vsraq.ranks import FpTarget, split_samples
from vsraq.realignment.logits import RefitLogits
from vsraq.router_terms import BlockTensors
from vsraq.routers import BoundRouter, Compared, Router


def eager() -> AbstractContextManager[None]:
    """Run compiled code as it was written."""
    return torch.compiler.set_stance("force_eager")


def ranking_of(rank_by: RankBy, router: BoundRouter, logits: Tensor) -> Tensor | None:
    """Return the ranking of a router's experts, (T, E); None ranks by logits."""
    return None if rank_by == "logits" else router.ranking(logits)


@dataclass(frozen=True)
class _Call:
    """A record of one call of a router."""

    target: FpTarget | None  # of the own routers' loss
    selected: Tensor | None  # (T, K), int16; None if the router's rule is unknown


@dataclass(frozen=True)
class FpRouters:
    """A block's routers in full precision.

    Attributes:
        targets: By router name, what the own routers' loss compares each calibration
            sample with; empty if there is no such loss.
        logits: By router name, the logits of each sample, (T, E), or of as many samples
            as `REFIT_BYTES` hold; empty if no router is re-fitted.
        selected: By router name, the experts that each token chose, (T, K); routers of
            unknown rules are missing.
    """

    targets: dict[str, list[FpTarget]]
    logits: dict[str, list[Tensor]]
    selected: dict[str, Tensor]


class FullPrecisionCapture:
    """A capture of a block's routers during AutoRound's reference forward.

    Args:
        block: The block.
        routers: Its routers, named relative to it.
        alignment: The parts that are on: they decide what is kept.
        objective: Of the own routers' loss.
        cache_device: Where the captured tensors are kept.

    Attributes:
        is_awaiting: Whether the next forward pass of the block is to be captured.
    """

    def __init__(
        self,
        block: nn.Module,
        routers: Sequence[Router],
        alignment: Alignment,
        objective: Objective,
        cache_device: torch.device | str,
    ) -> None:
        self._block = block
        self._alignment = alignment
        self._objective = objective
        self._cache_device = cache_device
        self._own_term = alignment.router_weight != 0
        self._compared: Compared = objective.compares if self._own_term else "logits"
        self._capture = RouterCapture(block, routers, self._keep, self._compared)
        self._refit: dict[str, RefitLogits] = {}
        self.is_awaiting = True

    def _empty_refit(self) -> dict[str, RefitLogits]:
        if not self._alignment.realign_routers:
            return {}
        routers = self._capture.routers
        return {router.name: RefitLogits(self._cache_device) for router in routers}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Capture the forward pass that runs inside.

        Compiled code runs in eager mode there, because it would call the hooks of the
        block that it was compiled for. This is one pass of many, so
        it costs little.
        """
        self.is_awaiting = False
        self._refit = self._empty_refit()
        with eager(), closing(self._capture.open()):
            yield

    def remove(self) -> None:
        """Stop awaiting a forward pass; AutoRound calls this as it does for hooks."""
        self.is_awaiting = False

    def _keep(self, router: BoundRouter, values: Tensor) -> _Call:
        logits = values if self._compared == "logits" else router.logits(values)
        selected = None
        if router.description.rule is not None:
            selected = router.select(logits).to(torch.int16)
            selected = selected.to(self._cache_device)
        if self._refit:
            self._refit[router.name].add(logits)
        return _Call(self._target(router, values), selected)

    def _target(self, router: BoundRouter, values: Tensor) -> FpTarget | None:
        if not self._own_term:
            return None
        ranking = None
        if self._compared == "logits":
            ranking = ranking_of(self._alignment.rank_by, router, values)
        target = self._objective.target(values, top_k=router.top_k, ranking=ranking)
        return target.to(self._cache_device)

    def take(
        self, name: str, tensors: BlockTensors, forward: Callable[[], object] | None
    ) -> FpRouters:
        """Return what was kept, split by sample.

        Args:
            name: The block's name.
            tensors: What it is tuned with.
            forward: Runs the block over all samples, for callers that skipped
                AutoRound's reference forward; None if its inputs are not those of full
                precision.

        Raises:
            RuntimeError: Nothing was captured and cannot be derived, or the routers saw
                other tokens than the block.
        """
        try:
            captured = self._capture.take()
        except RuntimeError as error:
            if not self._alignment.reads_full_precision:
                return FpRouters({}, {}, {})  # tokens are not counted then
            if forward is None:
                raise RuntimeError(
                    f"block {name}: no full-precision router logits were captured, and "
                    "its inputs are the quantized stream, so they cannot be derived; "
                    "allowed are callers that let AutoRound run the reference forward "
                    f"(reference_output=None); the cause: {error}"
                ) from error
            with self.running(), torch.no_grad():
                forward()
            captured = self._capture.take()
        targets, logits, selected = {}, {}, {}
        for router, calls in captured.items():
            call_targets = [call.target for call in calls if call.target is not None]
            if call_targets:
                targets[router] = split_samples(
                    name, router, call_targets, tensors.tokens
                )
            if router in self._refit:
                refit_logits = self._refit.pop(router)
                logits[router] = refit_logits.samples(name, router, tensors.tokens)
            chosen = [call.selected for call in calls if call.selected is not None]
            if chosen:
                selected[router] = torch.cat(chosen)
        return FpRouters(targets, logits, selected)
