# SPDX-License-Identifier: Apache-2.0
"""A block that AutoRound is about to tune: its routers, its tokens, its terms."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from torch import Tensor, nn

from vsraq.autoround.alignment_run import AlignmentRun
from vsraq.autoround.next_router import load_next_router, next_term
from vsraq.autoround.refit import refit_in_block
from vsraq.autoround.routing_pass import selected_experts
from vsraq.callbacks import RouterRefit
from vsraq.capture import RouterCapture
from vsraq.full_precision import FpRouters, FullPrecisionCapture
from vsraq.router_terms import BlockTensors, RouterTerm, own_term
from vsraq.routers import Router, count_experts
from vsraq.tokens.counted import CountedTokens


@dataclass(frozen=True)
class AlignedBlock:
    """A block to tune, with what router alignment needs.

    Attributes:
        module: The block, or several in one module (`nblocks`).
        names: Their names in the model.
        routers: By their names inside `module`.
        tensors: What it is tuned with.
        tokens: Which tokens count.
        run: The run.
        runner: AutoRound's, for its batches, precision and device.
    """

    module: nn.Module
    names: Sequence[str]
    routers: Sequence[Router]
    tensors: BlockTensors
    tokens: CountedTokens
    run: AlignmentRun
    runner: BlockForwardRunner

    @property
    def name(self) -> str:
        """The block's name, or the names of all blocks in the module."""
        return "+".join(self.names)

    def full_name(self, router: Router) -> str:
        """Return a router's name in the model."""
        if len(self.names) == 1:
            return f"{self.names[0]}.{router.name}"
        # AutoRound's WrapperMultiblock names them layers.<index>.<name>
        _layers, index, name = router.name.split(".", 2)
        return f"{self.names[int(index)]}.{name}"

    def check_routers(self) -> None:
        """Compare the block's routers with those of the model.

        Raises:
            RuntimeError: They differ.
        """
        routers = self.run.routers
        expected = sum(router.is_in(name) for name in self.names for router in routers)
        if len(self.routers) != expected:
            raise RuntimeError(
                f"block {self.name}: it has {len(self.routers)} routers, the model "
                f"{expected} in it; allowed is a router_pattern that finds the same in "
                "both, from the name's end on"
            )

    def fp_routers(
        self, capture: FullPrecisionCapture | None, *, derivable: bool
    ) -> FpRouters:
        """Return what the block's routers do in full precision.

        Args:
            capture: Of AutoRound's reference forward.
            derivable: Whether the block's inputs are those of full precision.

        Raises:
            RuntimeError: Nothing was captured, and it cannot be computed now.
        """
        if not self.routers:
            return FpRouters({}, {}, {})
        if capture is None:
            raise RuntimeError(
                f"block {self.name}: its full-precision forward was not announced; "
                "allowed are runs through AutoRound 0.16's compress_block"
            )
        # The caller may have passed reference_output and so skipped that forward.
        tensors = self.tensors
        forward = partial(
            self.runner.forward, self.module, tensors.inputs, tensors.others
        )
        return capture.take(self.name, tensors, forward if derivable else None)

    def count_tokens(self, fp_routers: FpRouters, *, quantized_stream: bool) -> None:
        """Count the tokens that the block's experts are about to be tuned on.

        Args:
            fp_routers: What the routers choose in full precision.
            quantized_stream: Whether the block is tuned on quantized inputs.

        Raises:
            ValueError: An expert got too few, and `on_unreached` is "error".
        """
        fp_selected = fp_routers.selected
        counted = [router for router in self.routers if router.name in fp_selected]
        q_selected = fp_selected
        if quantized_stream:
            q_selected = selected_experts(
                self.module, counted, self.tensors, self.runner
            )
        valid = self.tokens.valid(range(len(self.tensors.fp_outputs)))
        for router in counted:
            self.run.coverage.add(
                self.full_name(router),
                count_experts(self.module, router),
                q_selected[router.name],
                fp_selected[router.name],
                valid,
            )

    def own_term(self, fp_routers: FpRouters, stack: ExitStack) -> RouterTerm | None:
        """Build the term of the block's own routers, None if there is none.

        Args:
            fp_routers: What they do in full precision.
            stack: Gets the capture that is open while the block is tuned.
        """
        alignment = self.run.alignment
        if not self.routers or alignment.router_weight == 0:
            return None
        objective = alignment.own_objective
        capture = stack.enter_context(
            RouterCapture[Tensor](
                self.module, self.routers, compared=objective.compares
            )
        )
        return own_term(
            objective,
            alignment.router_weight,
            self.routers,
            fp_routers.targets,
            capture,
        )

    def next_term(self, device: torch.device | str) -> RouterTerm | None:
        """Build the term of the next router, None if there is none.

        Args:
            device: Where it runs, unless AutoRound's device map names another.
        """
        if self.run.alignment.next_router_weight == 0:
            return None
        group = self.run.group_of(self.names[-1])
        following = group[group.index(self.names[-1]) + 1 :]
        next_router = load_next_router(
            self.name, following, self.run, self.runner, device
        )
        if next_router is None:
            return None
        return next_term(
            self.name,
            next_router,
            self.run.alignment,
            self.tensors,
            self.runner,
            self.run.orchestrator.compress_context.cache_device,
        )

    def refit(self, fp_routers: FpRouters) -> list[RouterRefit]:
        """Re-fit the routers of the tuned block, before its output feeds the next.

        Returns:
            What was tried; nothing without `realign_routers`.
        """
        settings = self.run.alignment.refit
        if settings is None:
            return []
        tried = []
        for router in self.routers:
            named = replace(router, name=self.full_name(router))
            refit, weights = refit_in_block(
                self.module,
                replace(router.bind(self.module), description=named),
                fp_routers.logits[router.name],
                self.tensors,
                self.tokens,
                self.runner,
                settings,
            )
            self.run.refitted |= weights
            overlap = refit.before_jaccard, refit.after_jaccard
            tried.append(
                RouterRefit(
                    name=refit.router,
                    refit=refit.applied,
                    logit_error=(refit.before, refit.after),
                    jaccard=None if math.isnan(overlap[0]) else overlap,
                )
            )
        return tried


@contextmanager
def without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Switch off gradient checkpointing, which would run the routers twice.

    AutoScheme leaves gradient checkpointing on in the model that it has scored.
    """
    checkpointed = [
        module
        for module in block.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
