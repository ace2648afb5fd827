# SPDX-License-Identifier: Apache-2.0
"""Find the routers of a model.

A router maps H hidden values to E logits and stands beside the experts that it chooses
from. Since transformers 5.13 it is a small module with a `weight` (E, H); older code,
remote code and some AutoRound loaders use `nn.Linear`. Names do not help: `gate_proj`
and `shared_expert_gate` are not routers.

A new layout of routers needs one more function here, and its name in `_LAYOUTS`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from vsraq.routers.describe import Learned, describe
from vsraq.routers.experts import children_below, experts_beside, rows_of
from vsraq.routers.router import Router


def find_routers(
    module: nn.Module,
    *,
    router_classes: tuple[type, ...] | None = None,
    router_pattern: str | None = None,
    others: bool = False,
) -> tuple[Router, ...]:
    """Find every MoE router of a model or of one of its blocks.

    It first reads what transformers declares (`_can_record_outputs["router_logits"]`),
    then the structure: beside an experts module with E experts, the one child whose
    weight is (E, H). A pattern of your own replaces both.

    Args:
        module: A model, a decoder block, or several blocks in one module; tensors may
            be on meta.
        router_classes: Classes that are known to be routers. None reads them from
            `module`; a block does not know them, so pass
            `declared_router_classes(model)` there.
        router_pattern: A regular expression for the end of the qualified name of each
            router's linear map, from a dot on ("gate" finds "layers.0.moe.gate"), for
            layouts that are not found, or to align some routers only.
        others: Whether the routers that a pattern does not name are found beside them,
            for what concerns the experts of all layers.

    Returns:
        The routers in module order; empty for a dense module.

    Raises:
        ValueError: A MoE layer's router is ambiguous, its top-k unknown, its layout not
            supported, or the pattern matches something else than a router.
    """
    places: list[_Place] = []
    if router_pattern is not None:
        places += _matching(module, router_pattern)
    if router_pattern is None or others:
        if router_classes is None:
            router_classes = declared_router_classes(module)
        for layout in _LAYOUTS:
            places += layout(module, router_classes, [place.name for place in places])
    learned: Learned = {}
    order = {name: index for index, (name, _) in enumerate(module.named_modules())}
    routers = [
        describe(module, place.parent, place.linear, place.rows, learned)
        for place in places
    ]
    return tuple(sorted(routers, key=lambda router: order[router.name]))


class _Place(NamedTuple):
    """A linear map to logits, inside the module around it and its experts."""

    parent: str
    linear: str
    rows: int  # E, counted from the experts

    @property
    def name(self) -> str:
        return f"{self.parent}.{self.linear}" if self.parent else self.linear


def _beside_experts(
    module: nn.Module, classes: tuple[type, ...], found: list[str]
) -> Iterator[_Place]:
    """Find routers that stand beside experts of a known layout."""
    for parent_name, parent in module.named_modules():
        num_experts = experts_beside(parent)
        inside = f"{parent_name}." if parent_name else ""
        if num_experts is None or any(name.startswith(inside) for name in found):
            continue
        name = _router_beside(parent_name, parent, num_experts, classes)
        if name is not None:
            yield _Place(parent_name, name, num_experts)


def _declared(
    module: nn.Module, classes: tuple[type, ...], found: list[str]
) -> Iterator[_Place]:
    """Find declared routers whose experts are of an unknown layout."""
    for name, candidate in module.named_modules():
        if not isinstance(candidate, classes):
            continue
        declared = module.get_submodule(name)
        # some models declare the layer around the router
        if any(other == name or other.startswith(f"{name}.") for other in found):
            continue
        maps = [below for below, inside in declared.named_modules() if rows_of(inside)]
        if len(maps) != 1:
            raise ValueError(
                f"router {name!r} ({type(candidate).__name__}): it is declared as one, "
                "but holds no weight (num_experts, hidden) beside its experts; allowed "
                "is that layout, or name the linear map with router_pattern"
            )
        parent, _, child = name.rpartition(".")
        linear = f"{child}.{maps[0]}" if maps[0] else child
        yield _Place(parent, linear, rows_of(declared.get_submodule(maps[0])))


# (module, declared classes, linear maps that were found) -> more places, in this order
_LAYOUTS = (_beside_experts, _declared)


def _matching(module: nn.Module, pattern: str) -> Iterator[_Place]:
    """Find the routers whose names match a pattern."""
    for name, candidate in module.named_modules():
        if not re.search(rf"(^|\.)({pattern})$", name):
            continue
        if getattr(getattr(candidate, "weight", None), "ndim", None) != 2:
            raise ValueError(
                f"router_pattern={pattern!r} matches {name!r} "
                f"({type(candidate).__name__}): allowed are modules with a weight "
                "(num_experts, hidden)"
            )
        parent, linear = _around(module, name)
        experts = experts_beside(module.get_submodule(parent))
        yield _Place(parent, linear, rows_of(candidate) if experts is None else experts)


def _around(module: nn.Module, name: str) -> tuple[str, str]:
    """Return the module of a router and its experts, and the router's name in it."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent_name, linear = ".".join(parts[:depth]), ".".join(parts[depth:])
        parent = module.get_submodule(parent_name)
        if experts_beside(parent) and linear in dict(children_below(parent)):
            return parent_name, linear
    return ".".join(parts[:-1]), parts[-1]


def declared_router_classes(model: nn.Module) -> tuple[type, ...]:
    """List the classes that a transformers model declares to record router logits.

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


def _router_beside(
    parent_name: str,
    parent: nn.Module,
    num_experts: int,
    classes: tuple[type, ...],
) -> str | None:
    """Return the name of the router inside `parent`, which also holds the experts."""
    below = list(children_below(parent))
    declared = [name for name, module in below if isinstance(module, classes)]
    candidates = [n for n, m in below if rows_of(m) == num_experts]
    if not candidates:
        # rows for more than the experts: zero experts, a class for skipping them
        candidates = [
            name
            for name, module in below
            if rows_of(module) > num_experts
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
