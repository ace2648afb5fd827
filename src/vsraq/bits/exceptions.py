# SPDX-License-Identifier: Apache-2.0
"""The `layer_config` of a plan: AutoRound's exceptions from the scheme.

Engines do not read all ways to name an exception, and AutoRound lets a pattern win over
a name. So each unit has one entry if its layers have one scheme: experts by their
container, which engines look up, fused layers by a pattern that matches the fused
layer's name too where the engine asks for that.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from vsraq.bits.engines import FUSED, Engine
from vsraq.bits.units import Unit


def exceptions(
    units: Iterable[Unit],
    schemes: Mapping[str, Mapping[str, Any]],
    default: Mapping[str, Any],
    engine: Engine,
) -> dict[str, dict[str, Any]]:
    """Return the entries of a `layer_config`.

    Args:
        units: The units.
        schemes: The scheme of every layer that can be quantized, by AutoRound's names.
        default: The scheme of all layers without an entry.
        engine: How it looks exceptions up.

    Returns:
        Fields that differ from the default, by the name or the pattern of layers.
    """
    different = {}
    for layer, fields in schemes.items():
        own = {k: v for k, v in fields.items() if v != default.get(k)}
        if own:
            # an entry without bits is 16 bits to some engines
            different[layer] = {"bits": fields["bits"]} | own
    entries: dict[str, dict[str, Any]] = {}
    for unit in units:
        entries |= _entries(unit, different, engine)
    inside = {layer for unit in units for layer in unit.layers}
    return entries | {n: f for n, f in different.items() if n not in inside}


def _entries(
    unit: Unit, different: Mapping[str, dict[str, Any]], engine: Engine
) -> dict[str, dict[str, Any]]:
    """Return the entries of one unit."""
    own = [different.get(layer) for layer in unit.layers]
    first = own[0]
    if all(fields == first for fields in own):
        if first is None:
            return {}
        if unit.is_experts:
            return dict.fromkeys(_containers(unit), first)
        if len(unit.layers) > 1 and engine.reads_fused_names:
            return {_pattern(unit): first}
        return dict.fromkeys(unit.layers, first)
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


def _containers(unit: Unit) -> list[str]:
    """Return the modules that hold the experts: what stands before their numbers."""
    found: dict[str, None] = {}
    for layer in unit.layers:
        parts = layer.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        last = numbers[-1] if len(numbers) > 1 else len(parts) - 1
        found[".".join(parts[:last])] = None
    return list(found)


def _pattern(unit: Unit) -> str:
    """Return a pattern for layers and for the layer that they are fused into."""
    around, _, fused = unit.name.rpartition(".")
    parts = [part for part in FUSED[fused] if f"{around}.{part}" in unit.layers]
    return f"{around}.({'|'.join([*parts, fused])})"
