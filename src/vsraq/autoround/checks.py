# SPDX-License-Identifier: Apache-2.0
"""What is refused, or said, before the first block is tuned."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from auto_round.utils import check_to_quantized, get_block_names
from torch import nn

from vsraq.objectives import Objective
from vsraq.routers import Router, expert_containers

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer


def check_router(
    model: nn.Module, router: Router, objectives: Sequence[Objective]
) -> None:
    """Refuse a router that cannot be aligned.

    Raises:
        ValueError: It is to be quantized, or an objective reads more experts than it
            has.
    """
    if check_to_quantized(model.get_submodule(router.name)):
        raise ValueError(
            f"router {router.name}: it is among the layers to quantize; allowed "
            f"are routers in full precision, so pass ignore_layers={router.name!r}"
        )
    for objective in objectives:
        if objective.compares == "inputs":
            continue
        ranks = objective.ranks(router.top_k, router.num_experts)
        if not max(router.top_k, 1) <= router.num_experts >= ranks:
            raise ValueError(
                f"objective {objective} reads {ranks} ranks of router "
                f"{router.name}: allowed is 1 to its {router.num_experts} experts"
            )


WITHOUT_NEXT_ROUTER = (
    "no next-router term for this run; allowed is next_router_weight=0 (name the other "
    'parts that you want: router_weight="auto", realign_routers=True)'
)


def check_next_router(orchestrator: Any, composer: "AlgorithmComposer | None") -> None:
    """Refuse runs whose next block cannot be run ahead of its turn.

    Raises:
        NotImplementedError: It is not rotated yet, or its arguments are not there yet.
    """
    if composer is not None and composer.has_layerwise_rotation:
        raise NotImplementedError(
            f"{WITHOUT_NEXT_ROUTER}: with layer-wise rotation the next block is not "
            "rotated yet while this one is tuned; a rotation of the whole model "
            "(layerwise=False) is allowed too"
        )
    if orchestrator.has_variable_block_shape:
        raise NotImplementedError(
            f"{WITHOUT_NEXT_ROUTER}: every block of this model takes arguments of its "
            "own, and AutoRound has not cached the next block's while this one is tuned"
        )


def within_reach(model: nn.Module, routers: Sequence[Router]) -> bool:
    """Whether a quantized layer stands outside any router's MoE layer in its block.

    If not, no own-router loss tunes anything: in a hybrid such as Nemotron-H a block
    is either a MoE layer or something else.

    Args:
        model: The model, its layers marked by AutoRound.
        routers: All of its routers.
    """
    blocks = {name for group in get_block_names(model) for name in group}
    for router in routers:
        containers = expert_containers(model, [router])
        moe_layers = {f"{name.rpartition('.')[0]}." for name in containers}
        for block in blocks:
            if not router.name.startswith(f"{block}."):
                continue
            for name, module in model.get_submodule(block).named_modules(prefix=block):
                inside = any(name.startswith(layer) for layer in moe_layers)
                if (
                    isinstance(module, nn.Linear)
                    and not inside
                    and check_to_quantized(module)
                ):
                    return True
    return False
