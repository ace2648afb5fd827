# SPDX-License-Identifier: Apache-2.0
"""What a router is: find it, compute its logits, apply its selection rule.

Shapes: T tokens, E experts, K top-k, H hidden width.

A router maps H to E and stands beside the experts that it chooses from. Since
transformers 5.13 it is a small module with a `weight` (E, H); older code, remote code
and some AutoRound loaders use `nn.Linear`. Names say nothing: `gate_proj` and
`shared_expert_gate` are no routers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# what an objective reads of a router: its logits (T, E), or its inputs (T, H)
Compared: TypeAlias = Literal["logits", "inputs"]

_CORRECTION_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Router:
    """One router of a model or block.

    Attributes:
        name: Qualified name inside the module that was searched.
        top_k: K, experts per token.
        num_experts: E.
        score_function: What turns logits into scores before the choice.
        correction_bias: Attribute of the router that holds the bias (E,) added to the
            scores for the choice only, or None.
        num_groups: Groups that the experts are divided into (`n_group`).
        topk_groups: Groups that a token may choose from (`topk_group`).
    """

    name: str
    top_k: int
    num_experts: int
    score_function: Literal["softmax", "sigmoid"]
    correction_bias: str | None = None
    num_groups: int = 1
    topk_groups: int = 1


def find_routers(
    module: nn.Module, *, router_classes: tuple[type, ...] | None = None
) -> tuple[Router, ...]:
    """Find every MoE router of a model or of one of its blocks.

    First what transformers declares (`_can_record_outputs["router_logits"]`), then
    structure: beside an experts module with E experts, the one child whose weight is
    (E, H).

    Args:
        module: A model, a decoder block, or several blocks in one module; tensors may
            be on meta.
        router_classes: Classes that are routers for sure. None reads them from
            `module`; a block does not know them, so pass
            `declared_router_classes(model)` there.

    Returns:
        The routers in module order; empty for a dense module.

    Raises:
        ValueError: A MoE layer's router is ambiguous, its top-k unknown, or its layout
            not supported.
    """
    classes = router_classes
    if classes is None:
        classes = declared_router_classes(module)
    routers: list[Router] = []
    for parent_name, parent in module.named_modules():
        num_experts = _experts_beside(parent)
        if num_experts is None:
            continue
        found = _router_of(parent_name, parent, num_experts, classes)
        if found is not None:
            name, router = found
            routers.append(_describe(name, router, parent, num_experts))
    names = [router.name for router in routers]
    for name, candidate in module.named_modules():
        if not isinstance(candidate, classes):
            continue
        # some models declare the layer around the router
        if not any(found == name or found.startswith(f"{name}.") for found in names):
            raise ValueError(
                f"router {name!r} ({type(candidate).__name__}): it is declared as one, "
                "but holds no weight (num_experts, hidden) beside its experts; allowed "
                "is that layout"
            )
    return tuple(routers)


def declared_router_classes(model: nn.Module) -> tuple[type, ...]:
    """The classes that a transformers model declares as recorders of router logits.

    Args:
        model: Any module; everything but `PreTrainedModel`s declares nothing.

    Returns:
        Unique classes, in order.
    """
    classes: dict[type, None] = {}
    for submodule in model.modules():
        declared = getattr(submodule, "_can_record_outputs", None) or {}
        recorders = declared.get("router_logits", ())
        if not isinstance(recorders, list | tuple):
            recorders = (recorders,)
        for recorder in recorders:
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                classes[target] = None
    return tuple(classes)


def router_logits(router: nn.Module, hidden_states: Tensor) -> Tensor:
    """Recompute a router's raw logits from its input, its weight and its bias.

    Module outputs differ between families and versions (logits, softmax, sigmoid,
    top-k only); the linear map does not. Runs in float32, outside autocast, on the
    router's device, and is differentiable in `hidden_states`.

    Args:
        router: The router module: `weight` (E, H), optionally `bias` (E,).
        hidden_states: Its input, (..., H).

    Returns:
        (T, E) with T the product of the leading dimensions.
    """
    weight: Tensor = router.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(router, "bias", None)
    hidden_states = hidden_states.reshape(-1, weight.shape[-1]).to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(
            hidden_states.float(),
            weight.float(),
            None if bias is None else bias.float(),
        )


def router_inputs(router: nn.Module, hidden_states: Tensor) -> Tensor:
    """A router's input as (T, H), in its own dtype; differentiable.

    Args:
        router: The router module.
        hidden_states: Its input, (..., H).
    """
    weight: Tensor = router.weight  # type: ignore[assignment]
    return hidden_states.reshape(-1, weight.shape[-1])


def router_values(router: nn.Module, hidden_states: Tensor, what: Compared) -> Tensor:
    """A router's logits, (T, E), or its inputs, (T, H).

    Raises:
        ValueError: `what` is neither.
    """
    if what == "logits":
        return router_logits(router, hidden_states)
    if what == "inputs":
        return router_inputs(router, hidden_states)
    raise ValueError(f"what={what!r}: allowed are {', '.join(get_args(Compared))}")


def select_experts(
    router: Router, logits: Tensor, correction_bias: Tensor | None = None
) -> Tensor:
    """The experts that the router really chooses, best first.

    Args:
        router: Its description.
        logits: Raw logits, (..., E).
        correction_bias: (E,), required if the router has one.

    Returns:
        Expert indices, int64, (..., K).

    Raises:
        ValueError: The correction bias is missing.
    """
    scores = selection_scores(router, logits, correction_bias)
    return scores.topk(router.top_k, dim=-1).indices


def selection_scores(
    router: Router, logits: Tensor, correction_bias: Tensor | None = None
) -> Tensor:
    """The scores by which the router chooses.

    Scores are sigmoid or softmax of the logits, plus the correction bias; with groups,
    the `topk_groups` groups with the highest sum of their two best scores compete
    (DeepSeek-V3, arXiv:2412.19437).

    Args:
        router: Its description.
        logits: Raw logits, (..., E).
        correction_bias: (E,), required if the router has one.

    Returns:
        (..., E), float32; -inf for experts of groups that were not chosen.

    Raises:
        ValueError: The correction bias is missing.
    """
    scores = logits.float()
    scores = (
        scores.sigmoid() if router.score_function == "sigmoid" else scores.softmax(-1)
    )
    if router.correction_bias is not None:
        if correction_bias is None:
            raise ValueError(
                f"correction_bias=None: router {router.name!r} selects by its "
                f"{router.correction_bias}; pass that tensor"
            )
        scores = scores + correction_bias.to(scores)
    if router.num_groups > 1:
        grouped = scores.unflatten(-1, (router.num_groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        chosen = group_scores.topk(router.topk_groups, dim=-1).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(-1, chosen, True)
        scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    return scores


def routers_inside(routers: Iterable[Router], block: str) -> tuple[Router, ...]:
    """The routers of one block, named relative to it.

    Args:
        routers: Routers of a model.
        block: The block's qualified name in that model.
    """
    prefix = f"{block}."
    return tuple(
        replace(router, name=router.name.removeprefix(prefix))
        for router in routers
        if router.name.startswith(prefix)
    )


def expert_containers(module: nn.Module, routers: Iterable[Router]) -> tuple[str, ...]:
    """The modules that hold the experts which routers choose from.

    Args:
        module: The module that the routers were found in.
        routers: Its routers.

    Returns:
        Qualified names, in module order.
    """
    sizes = {router.name: router.num_experts for router in routers}
    names = []
    for parent_name, parent in module.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        beside = {size for name, size in sizes.items() if name.startswith(prefix)}
        for child_name, child in parent.named_children():
            # decoder layers are numbered modules of one class too
            if _count_experts(child) in beside and not any(
                name.startswith(f"{prefix}{child_name}.") for name in sizes
            ):
                names.append(f"{prefix}{child_name}")
    return tuple(names)


def _experts_beside(parent: nn.Module) -> int | None:
    """E, if a direct child of `parent` holds experts."""
    for child in parent.children():
        num_experts = _count_experts(child)
        if num_experts is not None:
            return num_experts
    return None


def _count_experts(module: nn.Module) -> int | None:
    """The number of experts in a container of experts, None for anything else."""
    fused = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    if len(fused) >= 2 and len(set(fused)) == 1:
        return fused[0]
    numbered = [child for name, child in module.named_children() if name.isdecimal()]
    # Experts are copies of each other and hold nothing but linear layers and an
    # activation; decoder layers also fit the first half, so the caller looks for the
    # router too.
    if len(numbered) >= 2 and len({type(child) for child in numbered}) == 1:
        return len(numbered)
    return None


def _router_of(
    parent_name: str,
    parent: nn.Module,
    num_experts: int,
    classes: tuple[type, ...],
) -> tuple[str, nn.Module] | None:
    candidates = [
        (name, module)
        for name, module in _children_below(parent)
        if _maps_to(module, num_experts)
    ]
    for rule in (
        lambda name, module: isinstance(module, classes),
        lambda name, module: hasattr(module, "top_k"),
        lambda name, module: "." not in name,
    ):
        preferred = [(n, m) for n, m in candidates if rule(n, m)]
        if len(preferred) == 1:
            name, module = preferred[0]
            return f"{parent_name}.{name}" if parent_name else name, module
        if len(preferred) > 1:
            raise ValueError(
                f"{parent_name or type(parent).__name__!r} has {num_experts} experts "
                f"and more than one candidate for their router: "
                f"{', '.join(name for name, _ in preferred)}; allowed is one"
            )
    return None


def _children_below(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All submodules of `parent` except those inside a container of experts."""
    for name, child in parent.named_children():
        if _count_experts(child) is None:
            yield from child.named_modules(prefix=name)


def _maps_to(module: nn.Module, num_experts: int) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.shape[0] == num_experts
    )


def _describe(
    name: str, router: nn.Module, parent: nn.Module, num_experts: int
) -> Router:
    def first(*attributes: str) -> int | None:
        config = getattr(parent, "config", None)
        for attribute in attributes:
            for owner in (router, parent, config):
                value = getattr(owner, attribute, None)
                if isinstance(value, int):
                    return value
        return None

    top_k = first("top_k", "num_experts_per_tok")
    if top_k is None:
        raise ValueError(
            f"router {name!r} ({type(router).__name__}): neither it nor its parent "
            f"{type(parent).__name__} has top_k or num_experts_per_tok; allowed is an "
            "int on one of them, so set it before the run"
        )
    has_bias = isinstance(getattr(router, _CORRECTION_BIAS, None), Tensor)
    return Router(
        name=name,
        top_k=top_k,
        num_experts=num_experts,
        score_function="sigmoid" if has_bias else "softmax",
        correction_bias=_CORRECTION_BIAS if has_bias else None,
        num_groups=first("num_group", "n_group") or 1,
        topk_groups=first("topk_group") or 1,
    )
