# SPDX-License-Identifier: Apache-2.0
"""The next MoE router's logits, seen from a block's output.

A block's own router stands before its experts, so only the next router sees them. Its
logits are computed by running the following blocks in full precision on the tuned
block's output, up to the router's input; no expert is computed (the "downstream
router" of DREAM-MoE). The following blocks get the arguments that AutoRound has cached
for its blocks, the same that it will run them with when their turn comes.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from auto_round.compressors.utils import block_forward
from auto_round.utils import convert_module_to_hp_if_necessary
from auto_round.utils.model import to_device
from auto_round.utils.offload import OffloadManager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vsraq.autoround.alignment_run import AlignmentRun
from vsraq.autoround.block_copy import copy_block
from vsraq.capture import router_input
from vsraq.full_precision import ranking_of
from vsraq.look_ahead_device import look_ahead_device
from vsraq.options import Alignment
from vsraq.ranks import split_samples
from vsraq.router_terms import (
    NEXT_ROUTER,
    BlockTensors,
    RouterTerm,
)
from vsraq.routers import Compared, Router, expert_containers, routers_inside


class _NotLoaded(nn.Module):
    """A placeholder for a block's experts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        raise NotImplementedError(
            f"{self.name}: its block calls its experts before its router module, or "
            "uses the router's weight without calling that, so the router's input "
            "cannot be computed without them; allowed is next_router_weight=0"
        )


logger = logging.getLogger("autoround.vsraq")


class NextRouter:
    """The following blocks up to a router, in full precision.

    Args:
        name: The router's qualified name in the model.
        router: The router, named relative to the last block.
        blocks: One or more following blocks; the last one holds the router.
        runner: AutoRound's runner, for its batches and precision.
    """

    def __init__(
        self,
        name: str,
        router: Router,
        blocks: Sequence[nn.Module],
        runner: BlockForwardRunner,
    ) -> None:
        self.name = name
        self.router = router.bind(blocks[-1])
        self._blocks = tuple(blocks)
        self._runner = runner

    def values(
        self,
        hidden_states: Tensor,
        input_others: dict[str, Any],
        samples: list[int],
        compared: Compared,
    ) -> Tensor:
        """Compute the router's logits or inputs, differentiable in `hidden_states`.

        Args:
            hidden_states: Output of the tuned block, (B, S, H).
            input_others: What AutoRound has cached for the blocks of this model.
            samples: Which B calibration samples these are.
            compared: "logits" or "inputs".

        Returns:
            (B * S, E) or (B * S, H), float32.
        """
        _, others = self._runner.select_batch({}, input_others, torch.tensor(samples))

        def forward(block: nn.Module, hidden_states: Tensor) -> Tensor:
            device = next(block.parameters()).device
            # AutoRound's function changes the mapping that it is given.
            return block_forward(
                block,
                hidden_states.to(device),
                dict(to_device(others, device)),
                self._runner.amp,
                self._runner.amp_dtype,
                device,
                0,
            )

        for block in self._blocks[:-1]:
            hidden_states = forward(block, hidden_states)
        last = self._blocks[-1]
        inputs = router_input(self.router.module, lambda: forward(last, hidden_states))
        return self.router.values(inputs, compared)


def shares_a_batch(input_others: dict[str, Any], runner: BlockForwardRunner) -> bool:
    """Whether an argument that all samples share has a dimension of the batch.

    AutoRound keeps the position embeddings of the first batch for all others. Where
    they have a row per sample (models with images), a block takes whole batches only.

    Args:
        input_others: What AutoRound has cached for the blocks of this model.
        runner: AutoRound's runner, which knows what is shared.
    """
    shared = [input_others.get(key) for key in runner.shared_cache_keys]
    tensors = [leaf for leaf in tree_leaves(shared) if isinstance(leaf, Tensor)]
    return any(tensor.ndim > 1 and tensor.shape[0] > 1 for tensor in tensors)


def find_next_router(
    following: Sequence[str], routers: Iterable[Router], lookahead: int
) -> tuple[tuple[str, ...], Router] | None:
    """Find the first router after a block, and the blocks to run up to it.

    Args:
        following: Names of the blocks after the tuned one, in order.
        routers: The model's routers.
        lookahead: How many blocks may be run, the one with the router included.

    Returns:
        Block names and the router, named relative to the last of them; None if no
        router is near enough.
    """
    for count, block in enumerate(following[:lookahead], start=1):
        inside = routers_inside(routers, block)
        if inside:
            return tuple(following[:count]), inside[0]
    return None


def load_without_experts(
    model: nn.Module,
    name: str,
    routers: Iterable[Router],
    offloader: OffloadManager,
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    """Load a block of the model on its device, without its experts.

    The block of the model itself is not touched. Tensors that are already on the device
    are shared with it; those that are on disk are read.

    Args:
        model: The model.
        name: The block's qualified name.
        routers: The model's routers.
        offloader: AutoRound's, which knows where tensors that are not loaded are.
        dtype: For weights that no device computes with as they are (FP8).
        device: Where the block runs, unless AutoRound's device map names another.

    Raises:
        RuntimeError: Tensors are neither in memory nor on disk.
    """
    block = model.get_submodule(name)
    experts = {
        id(block.get_submodule(experts)): _NotLoaded(f"{name}.{experts}")
        for experts in expert_containers(block, routers_inside(routers, name))
    }
    loaded = copy_block(
        model,
        name,
        offloader,
        "its router's input cannot be computed; pass next_router_weight=0, or load the "
        "model into memory before AutoRound gets it",
        experts,
    )
    device = look_ahead_device(loaded, device)
    convert_module_to_hp_if_necessary(loaded, dtype, device)
    return loaded.to(device).eval()


def load_next_router(
    block: str,
    following: Sequence[str],
    run: AlignmentRun,
    runner: BlockForwardRunner,
    device: torch.device | str,
) -> NextRouter | None:
    """Load the next router of a block, with the blocks on the way to it.

    Args:
        block: The name of the block that is tuned.
        following: The blocks after it, in order.
        run: For the routers, the model and the look-ahead.
        runner: AutoRound's, for batches and precision.
        device: Where it runs, unless AutoRound's device map names another.

    Returns:
        None if there is no MoE router in reach, which the log says.

    Raises:
        RuntimeError: Tensors are neither in memory nor on disk.
    """
    lookahead = run.alignment.lookahead
    found = find_next_router(following, run.routers, lookahead)
    if found is None:
        logger.info(
            "vsraq: %s: no MoE router in the %d blocks after it, so no next "
            "router term",
            block,
            min(lookahead, len(following)),
        )
        return None
    blocks, router = found
    orchestrator = run.orchestrator
    loaded = [
        load_without_experts(
            run.model,
            name,
            run.routers,
            orchestrator._offloader,
            orchestrator.model_context.amp_dtype,
            device,
        )
        for name in blocks
    ]
    return NextRouter(f"{blocks[-1]}.{router.name}", router, loaded, runner)


def next_term(
    block: str,
    next_router: NextRouter,
    alignment: Alignment,
    tensors: BlockTensors,
    runner: BlockForwardRunner,
    cache_device: torch.device | str,
) -> RouterTerm:
    """Build the term of the next router, with its full-precision targets.

    Args:
        block: The name of the block that is tuned.
        next_router: The router ahead of it.
        alignment: For the weight, the objective and the ranking.
        tensors: What the block is tuned with.
        runner: AutoRound's, for its batches.
        cache_device: Where the targets are kept.

    Raises:
        RuntimeError: The router saw other tokens than the block.
    """
    router, objective = next_router.router, alignment.next_objective

    def compared(output: Tensor, samples: list[int]) -> Tensor:
        return next_router.values(output, tensors.others, samples, objective.compares)

    targets = []
    with torch.no_grad():
        for samples in tensors.batches(runner.batch_size):
            fp_compared = compared(tensors.reference(samples), samples)
            ranking = None
            if objective.compares == "logits":
                ranking = ranking_of(alignment.rank_by, router, fp_compared)
            target = objective.target(fp_compared, top_k=router.top_k, ranking=ranking)
            targets.append(target.to(cache_device))

    def q_compared(output: Tensor, samples: list[int]) -> dict[str, Tensor]:
        return {router.name: compared(output, samples)}

    fp_targets = split_samples(block, next_router.name, targets, tensors.tokens)
    return RouterTerm(
        NEXT_ROUTER,
        objective,
        alignment.next_router_weight,
        (router.description,),
        {router.name: fp_targets},
        q_compared,
        every_second=not shares_a_batch(tensors.others, runner),
    )
