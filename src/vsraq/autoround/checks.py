# SPDX-License-Identifier: Apache-2.0
"""Checks of a run before the first block is tuned."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from auto_round.algorithms.block_runner import _BLOCK_OUTPUT_REGISTRY
from auto_round.utils import check_to_quantized, get_block_names
from safetensors import safe_open
from torch import Tensor, nn

from vsraq.objectives import Objective
from vsraq.options import Alignment
from vsraq.realignment.error_weights import check_weighted_size
from vsraq.routers import (
    Router,
    expert_containers,
    experts_of_routers,
    linear_map,
    routers_inside,
)

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
    if check_to_quantized(linear_map(model.get_submodule(router.name))):
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


def check_selection(alignment: Alignment, routers: Sequence[Router]) -> None:
    """Refuse options that need a selection which is unknown or that of the logits.

    Raises:
        ValueError: A router's rule is unknown, or every router chooses the highest
            logits and the losses are to rank by its selection.
    """
    asks = {
        f"rank_by={alignment.rank_by!r}": alignment.rank_by != "logits",
    }
    refit, threshold = alignment.refit, alignment.threshold
    if refit is not None:
        weighted = refit.weighting != "uniform"
        asks[f"realign_routers.weighting={refit.weighting!r}"] = weighted
    if threshold is not None:
        shift = threshold.shift_threshold
        asks[f"token_selection.shift_threshold={shift}"] = shift is not None
    options = [option for option, asked in asks.items() if asked]
    unknown = [router for router in routers if router.rule is None]
    if options and unknown:
        raise ValueError(
            f"{', '.join(options)}: which experts router {unknown[0].name} chooses is "
            f"unknown, because {unknown[0].unverified}; allowed are routers that take "
            "the top K of a function of their logits; leave the option out"
        )
    if alignment.rank_by == "selection" and all(
        router.rule is not None and router.rule.by_logits for router in routers
    ):
        raise ValueError(
            'rank_by="selection": every router of this model chooses the highest '
            'logits, so it ranks as "logits" does; leave rank_by out'
        )


def check_weighting(
    model: nn.Module, routers: Sequence[Router], alignment: Alignment
) -> None:
    """Refuse a weighted re-fit that is too large, before the first block is tuned.

    Raises:
        ValueError: Its sums would be larger than `error_weights.WEIGHTED_LIMIT`.
    """
    if alignment.refit is None or alignment.refit.weighting == "uniform":
        return
    for router in routers:
        weight: Tensor = linear_map(model.get_submodule(router.name)).weight  # type: ignore[assignment]
        if weight.ndim == 2:  # emptied ones are checked when they are re-fitted
            check_weighted_size(weight.shape[1], router.num_experts)


def check_smoothing(
    model: nn.Module, routers: Sequence[Router], composer: "AlgorithmComposer"
) -> None:
    """Refuse AWQ mappings that change what a router reads, but not the router.

    AWQ divides a norm's output by scales and multiplies the layers after it by them.
    AutoRound only looks for linear layers there, and a router module is not one.

    Raises:
        ValueError: A mapping would change the routing of the model.
    """
    around: dict[str, list[str]] = {}  # by MoE layer, its routers
    for router, containers in experts_of_routers(model, routers).items():
        for layer in {container.rpartition(".")[0] for container in containers}:
            around.setdefault(layer, []).append(router)
    for member in composer.members():
        for mapping in getattr(member, "_resolved_mappings", ()):
            balanced = set(mapping.balance_names)
            smoothed_around = set(_modules_around(mapping.smooth_name))
            inside = {
                layer: name
                for name in reversed(mapping.balance_names)
                for layer in _modules_around(name)
            }
            for layer in inside.keys() & around.keys() - smoothed_around:
                for router in around[layer]:
                    if router in balanced:
                        continue
                    raise ValueError(
                        f"awq: it scales the output of {mapping.smooth_name} for "
                        f"{inside[layer]}, but not router {router}, which reads it "
                        "too, so the model would route differently; allowed are "
                        "mappings that leave out that norm: AWQConfig(mappings=[...])"
                    )


def check_stream(index: Any, dtype: torch.dtype) -> None:
    """Refuse to stream a checkpoint whose blocks AutoRound would read wrongly.

    AutoRound 0.16 reads blocks from disk as they are: FP8 numbers without their scales,
    and 16 bits where it tunes in float32, on a CPU without bfloat16 instructions. The
    first block would crash.

    Args:
        index: AutoRound's, of the files that it streams; None if it streams none.
        dtype: What AutoRound computes in.

    Raises:
        ValueError: The run would crash in its first block.
    """
    if index is None:
        return
    stored = _stored_dtypes(index)
    if stored & {"F8_E4M3", "F8_E5M2"}:
        reason = "in FP8, and AutoRound streams FP8 numbers without their scales"
    elif dtype == torch.float32 and stored & {"BF16", "F16"}:
        reason = (
            "in 16 bits, and on this device AutoRound tunes in float32 and cannot "
            "stream it"
        )
    else:
        return
    raise ValueError(
        f"model={str(index.checkpoint_dir)!r}: it is stored {reason}; set "
        "AR_DISABLE_META_LOAD=1, which loads the whole model, or pass a model in memory"
    )


def _stored_dtypes(index: Any) -> set[str]:
    """The dtypes in all files of a checkpoint, by safetensors' names."""
    stored: set[str] = set()
    for shard in sorted(set(index.weight_map.values())):
        with safe_open(index.checkpoint_dir / shard, framework="pt") as file:
            stored |= {file.get_slice(name).get_dtype() for name in file.keys()}
    return stored


def _modules_around(name: str) -> list[str]:
    """List the names of the modules that a module is in."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def check_run(alignment: Alignment, calibration: Any) -> None:
    """Refuse runs in which a part of the alignment cannot work.

    Args:
        alignment: The parts that are on.
        calibration: AutoRound's calibration context.

    Raises:
        ValueError: There are too few samples to re-fit a router.
        NotImplementedError: Hidden states are not (batch, sequence, hidden).
    """
    if calibration.batch_dim not in (0, None):  # not set for single blocks
        raise NotImplementedError(
            f"batch_dim={calibration.batch_dim}: allowed is 0, hidden states of shape "
            "(batch, sequence, hidden)"
        )
    if alignment.realign_routers and calibration.nsamples < 2:
        raise ValueError(
            f"nsamples={calibration.nsamples}: re-fitting routers needs 2 samples or "
            "more, one of which decides; calibrate on more, or pass "
            "realign_routers=False"
        )


WITHOUT_NEXT_ROUTER = (
    "no next-router term for this run; allowed is next_router_weight=0"
)


def check_next_router(
    model: nn.Module, orchestrator: Any, composer: "AlgorithmComposer | None"
) -> None:
    """Refuse runs whose next block cannot be run ahead of its turn.

    Raises:
        NotImplementedError: The next block is missing or not rotated yet, its arguments
            are not cached yet, or it takes more than hidden states from the one before.
    """
    blocks = {name for group in get_block_names(model) for name in group}
    if composer is None and len(blocks) == 1:
        raise NotImplementedError(
            f"{WITHOUT_NEXT_ROUTER}: AutoRound was given one block without the model "
            "around it, as llm-compressor gives it, so the next block is not there; "
            'allowed are router_weight="auto" and realign_routers=True'
        )
    classes = {type(model.get_submodule(name)).__name__ for name in blocks}
    several = sorted(classes & _BLOCK_OUTPUT_REGISTRY.keys())
    if several:
        raise NotImplementedError(
            f"{WITHOUT_NEXT_ROUTER}: {', '.join(several)} hands more than its hidden "
            "states to the next block, which the term does not follow"
        )
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
    for name in (name for group in get_block_names(model) for name in group):
        block = model.get_submodule(name)
        for router in routers_inside(routers, name):
            containers = expert_containers(block, [router])
            moe_layers = [c.rpartition(".")[0] for c in containers]
            for layer_name, module in block.named_modules():
                inside = any(layer_name.startswith(f"{m}.") for m in moe_layers)
                if (
                    isinstance(module, nn.Linear)
                    and not inside
                    and check_to_quantized(module)
                ):
                    return True
    return False
