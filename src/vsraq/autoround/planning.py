# SPDX-License-Identifier: Apache-2.0
"""Measure the units of a model, and choose their schemes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.schemes import BF16, QuantizationScheme, preset_name_to_scheme
from torch import Tensor, nn

from vsraq.autoround.unit_damage import (
    Damage,
    MeasuredModel,
    SchemeFields,
    Trial,
    measure_damage,
)
from vsraq.bits.choice import Offer, choose
from vsraq.bits.engines import Engine, why_not_held
from vsraq.bits.plan import fitted_exponent
from vsraq.bits.sizes import layer_bytes, weight_bytes
from vsraq.bits.units import Unit

_NAMES = tuple(QuantizationScheme.get_attributes())
_UNQUANTIZED = {
    "bits": 16,
    "act_bits": 16,
    "data_type": "float",
    "act_data_type": "float",
}


@dataclass(frozen=True)
class Candidates:
    """What each unit may have.

    Attributes:
        base: The unit's scheme in a run without a plan, by the unit's name: one of
            those below.
        schemes: By the unit's name: the name of a scheme -> its layers' fields.
    """

    base: Mapping[str, str]
    schemes: Mapping[str, Mapping[str, Mapping[str, SchemeFields]]]


def find_candidates(
    units: Sequence[Unit],
    layers: Mapping[str, SchemeFields],
    scheme: str,
    options: Sequence[str],
    engine: Engine,
    export_format: str,
) -> Candidates:
    """Find the schemes that each unit may have.

    Schemes of fewer bits are for routed experts, whose weights few tokens read. A
    layer with a group size of its own keeps it.

    Args:
        units: The units.
        layers: Each layer's scheme without a plan, by AutoRound's names.
        scheme: AutoRound's name of the scheme of all other layers.
        options: AutoRound's names of the schemes to choose from besides that.
        engine: What it does not load is not offered.
        export_format: What it does not hold is not offered.

    Raises:
        ValueError: An option, or the scheme itself, cannot be loaded or held, or no
            unit may have it.
    """
    default = scheme_fields(scheme)
    for name in (scheme, *options):
        reason = why_refused(scheme_fields(name), default, engine, export_format)
        if reason:
            raise ValueError(
                f"options={tuple(options)}, scheme={scheme!r}: {name} is not allowed, "
                f"because {reason}; leave it out, or pass another engine"
            )
    base, schemes = {}, {}
    for unit in units:
        own = {layer: layers[layer] for layer in unit.layers}
        bits = max(fields["bits"] for fields in own.values())
        base[unit.name] = scheme if bits < 16 else "BF16"
        offered: dict[str, Mapping[str, SchemeFields]] = {base[unit.name]: own}
        for name in (scheme, *options):  # the scheme for an output projection
            fields = scheme_fields(name)
            if fields["bits"] < default["bits"] and not unit.is_experts:
                continue
            offered.setdefault(
                name, {n: _with(own[n], fields, default) for n in unit.layers}
            )
        schemes[unit.name] = offered
    unused = [
        n for n in options if not any(n in offered for offered in schemes.values())
    ]
    if unused:
        raise ValueError(
            f"options={tuple(options)}: no unit may have {', '.join(unused)}: schemes "
            "of fewer bits are for routed experts; leave them out"
        )
    return Candidates(base, schemes)


def why_refused(
    fields: SchemeFields, default: SchemeFields, engine: Engine, export_format: str
) -> str:
    """Say why layers cannot have a scheme, or return ""."""
    reason = engine.why_not(fields, export_format)
    if reason:
        return reason
    same_bits = fields["bits"] == default["bits"] and fields != default
    if same_bits and engine.needs_other_bits:
        return f"{engine.name} reads an exception without other bits as 16 bits"
    return why_not_held(fields, default, export_format)


def scheme_fields(name: str) -> SchemeFields:
    """Return the fields of one of AutoRound's schemes."""
    scheme = preset_name_to_scheme(name.upper())
    if scheme == BF16:
        return _UNQUANTIZED
    return {n: v for n, v in scheme.items() if v is not None}


def own_fields(layer_config: Mapping[str, Any]) -> SchemeFields:
    """Return the scheme in what AutoRound has resolved for a layer."""
    return {n: layer_config[n] for n in _NAMES if layer_config.get(n) is not None}


def _with(
    own: SchemeFields, fields: SchemeFields, default: SchemeFields
) -> SchemeFields:
    """Return a layer's fields with another scheme."""
    if fields["bits"] >= 16:
        return dict(_UNQUANTIZED)
    merged = {**own, **fields}
    same_type = own.get("data_type") in (fields["data_type"], "float")
    if same_type and own["group_size"] != default["group_size"]:
        merged["group_size"] = own["group_size"]
    if same_type and fields["bits"] < 8:  # AutoRound's formats hold 8 bits symmetric
        merged["sym"] = own["sym"]
    return merged


@dataclass(frozen=True)
class Sizes:
    """What each unit takes with each scheme, in the unit of a budget.

    Attributes:
        of: By the unit's name and the scheme's.
        limit: What all units may take.
        active_limit: What a token may read of them; None for any.
    """

    of: Mapping[tuple[str, str], float]
    limit: float
    active_limit: float | None = None


@dataclass(frozen=True)
class Planned:
    """A choice, and what was measured for it.

    Attributes:
        chosen: The name of each unit's scheme, by the unit's name.
        damages: Of each unit with each scheme, alone.
        uniform: Of all units with their base schemes.
        together: Of all units with the chosen schemes.
        exponent: With which damages add.
    """

    chosen: Mapping[str, str]
    damages: Mapping[tuple[str, str], Damage]
    uniform: Damage
    together: Damage
    exponent: float


def make_plan(
    model: MeasuredModel,
    units: Sequence[Unit],
    candidates: Candidates,
    batches: Sequence[Tensor],
    sizes: Sizes,
    metric: Mapping[str, float],
    *,
    progress: bool = False,
) -> Planned:
    """Measure every unit with every scheme, and choose.

    Errors of different layers are independent, so what they do to a router adds in its
    squares, and damages add with an exponent p between 1 and 2. Choices are made for
    several p, each is measured as a whole, and the best is taken.

    Args:
        model: The model.
        units: Its units.
        candidates: Their schemes.
        batches: Token ids, each (B, S).
        sizes: What they take.
        metric: Weights of "kl" and "routing", each as a share of the uniform scheme's.
        progress: Whether progress bars are shown.

    Raises:
        ValueError: The smallest schemes are over the limit.
        NotImplementedError: The model's blocks cannot be run alone.
    """
    pairs = [(u, s) for u in units for s in candidates.schemes[u.name]]
    zero = Damage(0.0, 0.0)
    trials = {
        (u.name, s): Trial(candidates.schemes[u.name][s])
        for u, s in pairs
        if any(f["bits"] < 16 for f in candidates.schemes[u.name][s].values())
    }
    model.check(batches[0])
    uniform = _trial_of(units, candidates, candidates.base)
    title = "Measuring units" if progress else None
    found = measure_damage(model, [*trials.values(), uniform], batches, progress=title)
    damages = dict.fromkeys([(u.name, s) for u, s in pairs], zero)
    damages |= dict(zip(trials, found, strict=False))

    def score(damage: Damage) -> float:
        return sum(
            weight * getattr(damage, name) / (getattr(found[-1], name) or 1.0)
            for name, weight in metric.items()
        )

    base = [score(damages[u.name, candidates.base[u.name]]) for u in units]
    exponent = fitted_exponent(base, score(found[-1]))
    choices = []
    for p in dict.fromkeys((1.0, exponent, 2.0)):
        scores = {key: max(score(d), 0.0) ** p for key, d in damages.items()}
        choice = _choose(units, candidates, sizes, scores)
        if choice not in choices:
            choices.append(choice)
    title = "Measuring plans" if progress else None
    together = measure_damage(
        model,
        [_trial_of(units, candidates, choice) for choice in choices],
        batches,
        progress=title,
    )
    best = min(range(len(choices)), key=lambda i: score(together[i]))
    return Planned(choices[best], damages, found[-1], together[best], exponent)


def _choose(
    units: Sequence[Unit],
    candidates: Candidates,
    sizes: Sizes,
    scores: Mapping[tuple[str, str], float],
) -> dict[str, str]:
    offers = [
        {
            scheme: Offer(
                sizes.of[unit.name, scheme],
                sizes.of[unit.name, scheme] * unit.read,
                scores[unit.name, scheme],
            )
            for scheme in candidates.schemes[unit.name]
        }
        for unit in units
    ]
    chosen = choose(offers, sizes.limit, sizes.active_limit)
    return {unit.name: scheme for unit, scheme in zip(units, chosen, strict=True)}


def _trial_of(
    units: Sequence[Unit], candidates: Candidates, choice: Mapping[str, str]
) -> Trial:
    """Return the trial that rounds all units."""
    return Trial(
        {
            layer: fields
            for unit in units
            for layer, fields in candidates.schemes[unit.name][
                choice[unit.name]
            ].items()
            if fields["bits"] < 16
        }
    )


def unit_bytes(
    model: nn.Module,
    schemes: Mapping[str, SchemeFields],
    export_format: str,
    widths: Mapping[str, int] | None = None,
) -> int:
    """Compute the bytes of a unit's weights.

    Args:
        model: The model, in the dtype of the export.
        schemes: The scheme of each of the unit's layers.
        export_format: AutoRound's name of the export format.
        widths: See `plain_bytes`.
    """
    total = 0
    for layer, fields in schemes.items():
        if fields["bits"] >= 16:
            total += weight_bytes(model, layer, widths)
        else:
            weight: Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
            rows, columns = weight.shape
            total += layer_bytes(fields, rows, columns, export_format)
    return total
