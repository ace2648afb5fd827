# SPDX-License-Identifier: Apache-2.0
"""Units: the layers that must share one scheme.

All routed experts of a layer are one unit. Some engines load q, k and v as one layer,
and gate and up as one; for these engines they are one unit, too. Every other layer is a
unit of its own, also one that is fused elsewhere but stands alone here, as `up_proj` of
an expert without a gate.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vsraq.bits.engines import FUSED, Engine
from vsraq.routers import Router, count_experts, experts_of_routers

_FUSED_NAME = {part: name for name, parts in FUSED.items() for part in parts}


@dataclass(frozen=True)
class Unit:
    """Layers that share one scheme.

    Attributes:
        name: The name that engines have for it: that of the fused layer, of the
            module that holds the experts, or of the one layer.
        layers: Qualified names of its linear layers, in module order.
        read: The share of its weights that one token reads: K of E for routed experts,
            all of it for shared ones.
        is_experts: Whether it has the routed experts of a layer.
    """

    name: str
    layers: tuple[str, ...]
    read: float = 1.0
    is_experts: bool = False


def find_units(
    model: nn.Module,
    layers: Sequence[str],
    routers: Iterable[Router],
    engine: Engine,
) -> tuple[Unit, ...]:
    """Find the units of a model.

    Args:
        model: The model, its experts split into linear layers; tensors may be on meta.
        layers: Names of the layers that are quantized, in module order.
        routers: The model's routers.
        engine: It decides which layers are one, and whether shared experts belong to
            the routed ones.

    Returns:
        The units in the order of their first layers.
    """
    routers = tuple(routers)
    by_router = experts_of_routers(model, routers)
    shares = {r.name: r.top_k / count_experts(model, r) for r in routers}
    containers = {
        container: router for router, names in by_router.items() for container in names
    }
    routed = {n: router for n in layers if (router := _router_of(n, containers))}
    quantized = {c: r for c, r in containers.items() if r in routed.values()}
    members: dict[str, list[str]] = defaultdict(list)
    experts = set()
    for layer in layers:
        router = routed.get(layer)
        if router is None and engine.shares_experts:
            router = _router_beside(layer, quantized)
        if router is None:
            parent, _, part = layer.rpartition(".")
            fused = engine.fuses and part in _FUSED_NAME
            name = f"{parent}.{_FUSED_NAME[part]}" if fused else layer
        else:
            name = _unit_of(by_router[router])
            experts.add(name)
        members[name].append(layer)
    return tuple(
        Unit(name, tuple(found), _read(model, found, routed, shares), True)
        if name in experts
        else Unit(name if len(found) > 1 else found[0], tuple(found))
        for name, found in members.items()
    )


def _read(
    model: nn.Module,
    layers: Sequence[str],
    routed: Mapping[str, str],
    shares: Mapping[str, float],
) -> float:
    """Return the share of the weights of experts that one token reads."""
    if all(layer in routed for layer in layers):
        return shares[routed[layers[0]]]  # exactly
    counts = [model.get_submodule(n).weight.numel() for n in layers]  # type: ignore
    parts = [shares[routed[n]] if n in routed else 1.0 for n in layers]
    return sum(n * part for n, part in zip(counts, parts, strict=True)) / sum(counts)


def merge_units(
    units: Sequence[Unit], groups: Iterable[Iterable[str]]
) -> tuple[Unit, ...]:
    """Merge units of which some layers must share a scheme.

    Args:
        units: The units.
        groups: Names of layers that must share one.

    Returns:
        Units; a merged one has the name and the place of its first.
    """
    merged = list(units)
    for group in groups:
        names = set(group)
        together = [unit for unit in merged if names & set(unit.layers)]
        if len(together) < 2:
            continue
        layers = tuple(layer for unit in together for layer in unit.layers)
        read = max(unit.read for unit in together)
        first = together[0]
        whole = Unit(first.name, layers, read, any(u.is_experts for u in together))
        merged = [
            whole if unit is first else unit
            for unit in merged
            if unit is first or unit not in together
        ]
    return tuple(merged)


def _router_of(layer: str, containers: dict[str, str]) -> str | None:
    """Return the router that chooses among the experts which a layer is part of."""
    parts = layer.split(".")
    for depth in range(len(parts), 0, -1):
        router = containers.get(".".join(parts[:depth]))
        if router is not None:
            return router
    return None


def _router_beside(layer: str, containers: dict[str, str]) -> str | None:
    """Return the router of the experts that stand beside a shared expert.

    The block around experts holds more than shared ones, sometimes attention.
    """
    for container, router in containers.items():
        around = container.rpartition(".")[0]
        if layer.startswith(f"{around}.shared_expert"):
            return router
    return None


def _unit_of(containers: Sequence[str]) -> str:
    """Return one name for the modules that hold a router's experts."""
    if len(containers) == 1:
        return containers[0]
    around = containers[0].rpartition(".")[0]
    return f"{around}.experts"
