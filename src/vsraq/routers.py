# SPDX-License-Identifier: Apache-2.0
"""What a router is: find it, compute its logits, apply its selection rule.

Shapes: T tokens, E experts, K top-k, H hidden width.

A router maps H to E and stands beside the experts that it chooses from. Since
transformers 5.13 it is a small module with a `weight` (E, H); older code, remote code
and some AutoRound loaders use `nn.Linear`. Names say nothing: `gate_proj` and
`shared_expert_gate` are no routers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from vsraq.selection import (
    HIGHEST_LOGITS,
    LearnedSelection,
    SelectionRule,
    learn_selection,
)

# what an objective reads of a router: its logits (T, E), or its inputs (T, H)
Compared: TypeAlias = Literal["logits", "inputs"]


@dataclass(frozen=True)
class Router:
    """One router of a model or block.

    Attributes:
        name: Qualified name, inside the module that was searched, of the module that is
            called with the hidden states: the linear map to logits, or one around it
            that uses its weight without calling it; see `linear_map`.
        top_k: K, experts per token.
        num_experts: E.
        rule: How it chooses, or None if its choice follows no known rule.
        correction_bias: Qualified name of the bias, E values, added to the scores for
            the choice only, or None.
        unverified: Empty if the rule was learned from the router's own choices;
            otherwise why it could not be, and what is known of it.
    """

    name: str
    top_k: int
    num_experts: int
    rule: SelectionRule | None = HIGHEST_LOGITS
    correction_bias: str | None = None
    unverified: str = field(default="", compare=False)


def find_routers(
    module: nn.Module,
    *,
    router_classes: tuple[type, ...] | None = None,
    router_pattern: str | None = None,
) -> tuple[Router, ...]:
    """Find every MoE router of a model or of one of its blocks.

    First what transformers declares (`_can_record_outputs["router_logits"]`), then
    structure: beside an experts module with E experts, the one child whose weight is
    (E, H). A pattern of your own comes in place of both.

    Args:
        module: A model, a decoder block, or several blocks in one module; tensors may
            be on meta.
        router_classes: Classes that are routers for sure. None reads them from
            `module`; a block does not know them, so pass
            `declared_router_classes(model)` there.
        router_pattern: A regular expression for the end of the qualified name of each
            router's linear map, from a dot on ("gate" finds "layers.0.moe.gate"), for
            layouts that are not found, or to align some routers only.

    Returns:
        The routers in module order; empty for a dense module.

    Raises:
        ValueError: A MoE layer's router is ambiguous, its top-k unknown, its layout not
            supported, or the pattern matches something that is no router.
    """
    if router_pattern is not None:
        return _matching(module, router_pattern)
    classes = router_classes
    if classes is None:
        classes = declared_router_classes(module)
    learned: _Learned = {}
    routers: list[Router] = []
    for parent_name, parent in module.named_modules():
        num_experts = _experts_beside(parent)
        if num_experts is None:
            continue
        name = _router_beside(parent_name, parent, num_experts, classes)
        if name is not None:
            routers.append(_describe(module, parent_name, name, num_experts, learned))
    names = [router.name for router in routers]
    for name, candidate in module.named_modules():
        if not isinstance(candidate, classes):
            continue
        # some models declare the layer around the router
        if any(found == name or found.startswith(f"{name}.") for found in names):
            continue
        declared = module.get_submodule(name)
        maps = [below for below, inside in declared.named_modules() if _rows(inside)]
        if len(maps) != 1:
            raise ValueError(
                f"router {name!r} ({type(candidate).__name__}): it is declared as one, "
                "but holds no weight (num_experts, hidden) beside its experts; allowed "
                "is that layout, or name the linear map with router_pattern"
            )
        # experts of a layout that is not recognised
        parent_name, _, own = name.rpartition(".")
        own = f"{own}.{maps[0]}" if maps[0] else own
        rows = _rows(declared.get_submodule(maps[0]))
        routers.append(_describe(module, parent_name, own, rows, learned))
    order = {name: index for index, (name, _) in enumerate(module.named_modules())}
    return tuple(sorted(routers, key=lambda router: order[router.name]))


def _matching(module: nn.Module, pattern: str) -> tuple[Router, ...]:
    """The routers whose names match a pattern."""
    learned: _Learned = {}
    routers = []
    for name, candidate in module.named_modules():
        if not re.search(rf"(^|\.)({pattern})$", name):
            continue
        if getattr(getattr(candidate, "weight", None), "ndim", None) != 2:
            raise ValueError(
                f"router_pattern={pattern!r} matches {name!r} "
                f"({type(candidate).__name__}): allowed are modules with a weight "
                "(num_experts, hidden)"
            )
        parent_name, own = _around(module, name)
        experts = _experts_beside(module.get_submodule(parent_name))
        rows = _rows(candidate) if experts is None else experts
        routers.append(_describe(module, parent_name, own, rows, learned))
    return tuple(routers)


def _around(module: nn.Module, name: str) -> tuple[str, str]:
    """The module that holds a router and its experts, and the router's name in it."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent_name, own = ".".join(parts[:depth]), ".".join(parts[depth:])
        parent = module.get_submodule(parent_name)
        if _experts_beside(parent) and own in dict(_children_below(parent)):
            return parent_name, own
    return ".".join(parts[:-1]), parts[-1]


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


def linear_map(router: nn.Module) -> nn.Module:
    """The module that holds a router's weight (E, H), and its bias, if it has one.

    Args:
        router: The router module.

    Returns:
        The module itself, or the first one with a weight inside it; that may be emptied
        while AutoRound keeps it on disk.

    Raises:
        ValueError: There is no weight in it.
    """
    for module in router.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            return module
    raise ValueError(
        f"router {type(router).__name__}: allowed is a module that holds a weight "
        "(num_experts, hidden)"
    )


def router_logits(
    router: nn.Module, hidden_states: Tensor, num_experts: int | None = None
) -> Tensor:
    """Recompute a router's raw logits from its input, its weight and its bias.

    Module outputs differ between families and versions (logits, softmax, sigmoid,
    top-k only); the linear map does not. Runs in float32, outside autocast, on the
    router's device, and is differentiable in `hidden_states`.

    Args:
        router: The router module: `weight` (E, H), optionally `bias` (E,).
        hidden_states: Its input, (..., H).
        num_experts: E, where the weight has rows of shared experts behind those that
            the router chooses from; None takes all rows.

    Returns:
        (T, E) with T the product of the leading dimensions.
    """
    linear = linear_map(router)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(linear, "bias", None)
    hidden_states = hidden_states.reshape(-1, weight.shape[-1]).to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(
            hidden_states.float(),
            weight[:num_experts].float(),
            None if bias is None else bias[:num_experts].float(),
        )


def router_inputs(router: nn.Module, hidden_states: Tensor) -> Tensor:
    """A router's input as (T, H), in its own dtype; differentiable.

    Args:
        router: The router module.
        hidden_states: Its input, (..., H).
    """
    weight: Tensor = linear_map(router).weight  # type: ignore[assignment]
    return hidden_states.reshape(-1, weight.shape[-1])


def router_values(
    router: Router, module: nn.Module, hidden_states: Tensor, what: Compared
) -> Tensor:
    """A router's logits, (T, E), or its inputs, (T, H).

    Args:
        router: Its description.
        module: The router module.
        hidden_states: Its input, (..., H).
        what: Which.

    Raises:
        ValueError: `what` is neither.
    """
    if what == "logits":
        return router_logits(module, hidden_states, router.num_experts)
    if what == "inputs":
        return router_inputs(module, hidden_states)
    raise ValueError(f"what={what!r}: allowed are {', '.join(get_args(Compared))}")


def select_experts(
    router: Router, logits: Tensor, correction_bias: Tensor | None = None
) -> Tensor:
    """The experts that the router really chooses, best first.

    Args:
        router: Its description.
        logits: Raw logits, (..., E).
        correction_bias: `correction_bias(module, router)`.

    Returns:
        Expert indices, int64, (..., K).

    Raises:
        ValueError: The correction bias is missing, or the router follows no known rule.
    """
    scores = selection_scores(router, logits, correction_bias)
    return scores.topk(router.top_k, dim=-1).indices


def selection_ranking(
    router: Router, logits: Tensor, correction_bias: Tensor | None = None
) -> Tensor:
    """The experts in the order in which the router would choose them.

    The first K are those that it chooses; the next is the first that it does not.

    Args:
        router: Its description.
        logits: Raw logits, (..., E).
        correction_bias: `correction_bias(module, router)`.

    Returns:
        Expert indices, int64, (..., E).

    Raises:
        ValueError: The correction bias is missing, or the router follows no known rule.
    """
    return _rule(router).ranking(logits, correction_bias)


def selection_scores(
    router: Router, logits: Tensor, correction_bias: Tensor | None = None
) -> Tensor:
    """The scores by which the router chooses.

    Args:
        router: Its description.
        logits: Raw logits, (..., E).
        correction_bias: `correction_bias(module, router)`.

    Returns:
        (..., E), float32; see `vsraq.selection.SelectionRule`.

    Raises:
        ValueError: The correction bias is missing, or the router follows no known rule.
    """
    return _rule(router).scores(logits, correction_bias)


def _rule(router: Router) -> SelectionRule:
    if router.rule is None:
        raise ValueError(
            f"router {router.name!r}: which experts it chooses is unknown, because "
            f"{router.unverified}; allowed are routers that choose the top K of a "
            "function of their logits, so leave out the option that asks for the choice"
        )
    return router.rule


def correction_bias(module: nn.Module, router: Router) -> Tensor | None:
    """The bias that a router adds to its scores for the choice.

    Args:
        module: The module that the router was found in.
        router: The router.

    Returns:
        (E,), or None for a router without one.
    """
    if router.correction_bias is None:
        return None
    owner, _, name = router.correction_bias.rpartition(".")
    bias: Tensor = getattr(module.get_submodule(owner), name)
    return bias.flatten()


def routers_inside(routers: Iterable[Router], block: str) -> tuple[Router, ...]:
    """The routers of one block, named relative to it.

    Args:
        routers: Routers of a model.
        block: The block's qualified name in that model.
    """
    prefix = f"{block}."
    return tuple(
        replace(
            router,
            name=router.name.removeprefix(prefix),
            correction_bias=router.correction_bias
            and router.correction_bias.removeprefix(prefix),
        )
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
    own = experts_of_routers(module, routers).values()
    names = {name for names in own for name in names}
    if len(names) < 2:
        return tuple(names)
    return tuple(name for name, _ in module.named_modules() if name in names)


def experts_of_routers(
    module: nn.Module, routers: Iterable[Router]
) -> dict[str, tuple[str, ...]]:
    """The modules that hold the experts of each router, in one walk of the module.

    Args:
        module: The module that the routers were found in.
        routers: Its routers.

    Returns:
        Qualified names by router name; routers whose experts are of a layout that is
        not recognised are missing.
    """
    wanted = {router.name for router in routers}
    found: dict[str, tuple[str, ...]] = {}
    for parent_name, parent in module.named_modules():
        num_experts = _experts_beside(parent)
        if num_experts is None:
            continue
        prefix = f"{parent_name}." if parent_name else ""
        below = {f"{prefix}{name}" for name, _ in _children_below(parent)}
        names = tuple(
            f"{prefix}{name}"
            for name, child in parent.named_children()
            if _count_experts(child) == num_experts or _stacked(child) == [num_experts]
        )
        for router in wanted & below:
            found[router] = (*found.get(router, ()), *names)
    return found


def count_experts(module: nn.Module, router: Router) -> int:
    """How many experts there are: not all that a router chooses may be one.

    Args:
        module: The module that the router was found in.
        router: The router.

    Returns:
        Experts with weights; E if they are of a layout that is not recognised.
    """
    for name in expert_containers(module, [router]):
        parent = module.get_submodule(name.rpartition(".")[0])
        return _experts_beside(parent) or router.num_experts
    return router.num_experts


def _experts_beside(parent: nn.Module) -> int | None:
    """E, if direct children of `parent` hold experts."""
    for child in parent.children():
        num_experts = _count_experts(child)
        if num_experts is not None:
            return num_experts
    # one module for each matrix of all experts
    matrices = [stack[0] for c in parent.children() if len(stack := _stacked(c)) == 1]
    return matrices[0] if len(matrices) >= 2 and len(set(matrices)) == 1 else None


def _stacked(module: nn.Module) -> list[int]:
    """The first dimensions of the matrices that a module holds as a stack."""
    if isinstance(module, _ConvNd):
        return []
    return [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]


def _count_experts(module: nn.Module) -> int | None:
    """The number of experts in a container of experts, None for anything else."""
    fused = _stacked(module)
    if len(fused) >= 2:
        return max(fused)  # the identities of zero experts need no second matrix
    numbered = [child for name, child in module.named_children() if name.isdecimal()]
    # Experts are copies of each other and hold nothing but linear layers and an
    # activation; decoder layers also fit the first half, so the caller looks for the
    # router too.
    if len(numbered) >= 2 and len({type(child) for child in numbered}) == 1:
        return len(numbered)
    return None


def _router_beside(
    parent_name: str,
    parent: nn.Module,
    num_experts: int,
    classes: tuple[type, ...],
) -> str | None:
    """The name of the router inside `parent`, whose child the experts are."""
    below = list(_children_below(parent))
    declared = [name for name, module in below if isinstance(module, classes)]
    candidates = [n for n, m in below if _maps_to(m, num_experts)]
    if not candidates:
        # rows for more than the experts: zero experts, a class for skipping them
        candidates = [
            name
            for name, module in below
            if _rows(module) > num_experts
            and any(name == d or name.startswith(f"{d}.") for d in declared)
        ][-1:]
    for rule in (
        lambda name: any(name == d or name.startswith(f"{d}.") for d in declared),
        lambda name: hasattr(parent.get_submodule(name), "top_k"),
        lambda name: "." not in name,
    ):
        preferred = [name for name in candidates if rule(name)]
        if len(preferred) == 1:
            return preferred[0]
        if len(preferred) > 1:
            raise ValueError(
                f"{parent_name or type(parent).__name__!r} has {num_experts} experts "
                f"and more than one candidate for their router: "
                f"{', '.join(preferred)}; allowed is one, so name it with "
                "router_pattern"
            )
    return None


def _children_below(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All submodules of `parent` except experts and those beside other experts."""
    for name, child in parent.named_children():
        if _count_experts(child) is None and _experts_beside(child) is None:
            yield name, child
            for below, module in _children_below(child):
                yield f"{name}.{below}", module


def _maps_to(module: nn.Module, num_experts: int) -> bool:
    return _rows(module) == num_experts


def _rows(module: nn.Module) -> int:
    """Rows of a module's weight, 0 if it has none."""
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0


# What routers of one class and configuration were found to choose.
_Learned: TypeAlias = dict[tuple[object, ...], LearnedSelection]


def _describe(
    module: nn.Module,
    parent_name: str,
    name: str,
    experts: int,
    learned: _Learned,
) -> Router:
    """A router, by the name of its linear map inside the module around it."""
    parent = module.get_submodule(parent_name)
    # the child that holds the map: what the parent calls
    owner_name, _, linear = name.partition(".")
    owner = parent.get_submodule(owner_name)
    num_experts = _rows(parent.get_submodule(name))
    prefix = f"{parent_name}." if parent_name else ""

    def first(*attributes: str) -> int | None:
        config = getattr(parent, "config", None)
        for attribute in attributes:
            for place in (owner, parent, config):
                value = getattr(place, attribute, None)
                if isinstance(value, int):
                    return value
        return None

    groups = first("num_group", "n_group") or 1, first("topk_group") or 1
    key = (
        type(owner),
        linear,
        groups,
        *(str(v) for v in vars(owner).values() if isinstance(v, int | float | str)),
        *(tuple(parameter.shape) for parameter in owner.parameters()),
    )
    if key not in learned:
        learned[key] = learn_selection(parent, owner_name, linear, num_experts, groups)
    selection = learned[key]
    if selection.rule is None and experts < num_experts:
        # rows behind those of the experts may belong to shared ones
        fewer = learn_selection(parent, owner_name, linear, experts, groups)
        if fewer.rule is not None:
            selection, num_experts = fewer, experts
    top_k = selection.top_k or first("top_k", "num_experts_per_tok")
    if top_k is None:
        raise ValueError(
            f"router {prefix + name!r} ({type(owner).__name__}): neither it nor its "
            f"parent {type(parent).__name__} has top_k or num_experts_per_tok; allowed "
            "is an int on one of them, so set it before the run"
        )
    bias = selection.correction_bias
    return Router(
        name=prefix + (name if selection.calls_linear else owner_name),
        top_k=top_k,
        num_experts=num_experts,
        rule=selection.rule,
        correction_bias=None if bias is None else prefix + bias,
        unverified=selection.unverified,
    )
