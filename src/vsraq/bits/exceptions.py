# SPDX-License-Identifier: Apache-2.0
"""The `layer_config` of a plan: AutoRound's exceptions from the scheme.

Engines do not read all ways to name an exception, and AutoRound lets a pattern win over
a name. So each unit has one entry if its layers have one scheme: experts by their
container, which engines look up, fused layers by a pattern that matches the fused
layer's name too where the engine asks for that.

AutoRound gives all layers of a pattern one dictionary, and writes 16 bits into it for a
layer that it cannot quantize. So no pattern may match a layer outside of its unit.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vsraq.bits.engines import ALSO_NAMED, FUSED, Engine
from vsraq.bits.units import Unit

_LOOKED_UP = ("bits", "group_size", "sym")  # of an exception, by engines


def exceptions(
    units: Iterable[Unit],
    schemes: Mapping[str, Mapping[str, Any]],
    default: Mapping[str, Any],
    engine: Engine,
    *,
    outside: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return the entries of a `layer_config`.

    Args:
        units: The units.
        schemes: The scheme of every layer that can be quantized, by AutoRound's names.
        default: The scheme of all layers without an entry.
        engine: How it looks exceptions up.
        outside: Layers outside of the decoder's blocks, such as the output projection:
            an entry must say that they are quantized, and none that they are not. Not
            among them are those of 16 bits that need an entry.

    Returns:
        Fields that differ from the default, by the name or the pattern of layers.
    """
    different = {}
    for layer, fields in schemes.items():
        own = {k: v for k, v in fields.items() if v != default.get(k)}
        if layer in outside:
            own = {"bits": fields["bits"]} | own if fields["bits"] < 16 else {}
        if own:
            # an entry without bits is 16 bits to some engines
            different[layer] = {"bits": fields["bits"]} | own
    entries: dict[str, dict[str, Any]] = {}
    inside = {layer for unit in units for layer in unit.layers}
    others = [layer for layer in schemes if layer not in inside]
    for unit in units:
        entries |= _entries(unit, different, engine, others)
    return entries | {n: f for n, f in different.items() if n not in inside}


def _entries(
    unit: Unit,
    different: Mapping[str, dict[str, Any]],
    engine: Engine,
    others: Iterable[str],
) -> dict[str, dict[str, Any]]:
    """Return the entries of one unit; none may match a layer that no unit has."""
    own = [different.get(layer) for layer in unit.layers]
    first = own[0]
    if all(fields == first for fields in own):
        if first is None:
            return {}
        containers = _containers(unit)
        alone = not any(name.startswith(tuple(containers)) for name in others)
        if unit.is_experts and alone:
            return dict.fromkeys(containers, first)
        if not unit.is_experts and len(unit.layers) > 1 and engine.reads_fused_names:
            return {_pattern(unit): first}
    if not unit.is_experts:
        return {n: f for n, f in zip(unit.layers, own, strict=True) if f is not None}
    # one entry for each projection of all experts
    by_part: dict[str, list[dict[str, Any] | None]] = defaultdict(list)
    for layer, fields in zip(unit.layers, own, strict=True):
        by_part[layer.rpartition(".")[2]].append(fields)
    if all(f == values[0] for values in by_part.values() for f in values):
        return {
            f"{container}.*{part}": values[0]
            for container in _containers(unit)
            for part, values in by_part.items()
            if values[0] is not None
        }
    return {n: f for n, f in zip(unit.layers, own, strict=True) if f is not None}


def _beside(unit: Unit, layers: Iterable[str]) -> set[str]:
    """Return those of some layers that engines load as one with a unit's."""
    if unit.is_experts:
        inside = tuple(f"{name.removesuffix('.')}." for name in _containers(unit))
        return {layer for layer in layers if layer.startswith(inside)}
    around, _, part = unit.layers[0].rpartition(".")
    fused = next((parts for parts in FUSED.values() if part in parts), ())
    return set(layers) & {f"{around}.{name}" for name in fused}


def _containers(unit: Unit) -> list[str]:
    """Return what names the modules that hold the experts, and nothing beside them.

    That is what stands before their numbers, which engines look up, or the module of
    one shared expert, with the dot that ends it: `shared_expert_gate` begins like it.
    """
    found: dict[str, None] = {}
    for layer in unit.layers:
        parts = layer.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        if len(numbers) > 1:
            found[".".join(parts[: numbers[-1]])] = None
        else:
            found[layer.rpartition(".")[0] + "."] = None
    return list(found)


def _pattern(unit: Unit) -> str:
    """Return a pattern for layers and for the layer that they are fused into."""
    around, _, fused = unit.name.rpartition(".")
    parts = [part for part in FUSED[fused] if f"{around}.{part}" in unit.layers]
    names = [*parts, fused, *ALSO_NAMED.get(fused, ())]
    return f"{around}.({'|'.join(names)})"


def check_layers(
    units: Iterable[Unit],
    layers: Mapping[str, Mapping[str, Any]],
    default: Mapping[str, Any],
    engine: Engine,
    export_format: str,
    *,
    plain: Collection[str] = (),
) -> None:
    """Refuse layers that an engine does not load as they are without a plan.

    Args:
        units: The units.
        layers: Each layer's scheme without a plan, by AutoRound's names.
        default: The run's scheme.
        engine: The engine.
        export_format: AutoRound's name of the export format.
        plain: Layers of the decoder's blocks that stay in 16 bits.

    Raises:
        ValueError: It does not load one of them.
    """
    for unit in units:
        beside = sorted(_beside(unit, plain)) if engine.fuses else []
        if beside:
            raise ValueError(
                f"{unit.layers[0]}: {engine.name} loads it as one with {beside[0]}, "
                "which stays in 16 bits; quantize both or neither (layer_config, "
                "ignore_layers), or pass another engine"
            )
        shown = {}
        for layer in unit.layers:
            fields = layers[layer]
            reason = engine.why_not(fields, export_format)
            shown[layer] = {n: fields.get(n) for n in _LOOKED_UP}
            common = {n: default.get(n) for n in _LOOKED_UP}
            same_bits = fields["bits"] == default["bits"] and shown[layer] != common
            if engine.needs_other_bits and same_bits and not reason:
                reason = f"{engine.name} reads an exception without other bits as 16"
            first = unit.layers[0]
            if engine.fuses and shown[layer] != shown[first] and not reason:
                reason = f"{engine.name} loads it as one with {first}, which differs"
            if reason:
                raise ValueError(
                    f"layer_config: {layer} is {shown[layer]}, which is not allowed, "
                    f"because {reason}; change its group size or symmetry, or pass "
                    "another engine"
                )
