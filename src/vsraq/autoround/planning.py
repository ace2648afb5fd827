# SPDX-License-Identifier: Apache-2.0
"""Measure the units of a model, and choose their schemes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.schemes import (
    BF16,
    PRESET_SCHEMES,
    QuantizationScheme,
    preset_name_to_scheme,
)
from torch import Tensor

from vsraq.autoround.unit_damage import (
    MeasuredModel,
    SchemeFields,
    Trial,
    measure_damage,
)
from vsraq.bits.allocation import (
    MORE_ROUTING,
    Metric,
    Priced,
    allocate,
    check_limits,
)
from vsraq.bits.damage import Damage, DamageModel
from vsraq.bits.engines import Engine, why_not_held
from vsraq.bits.limits import Sizes
from vsraq.bits.units import Unit
from vsraq.strict import did_you_mean

# on other tokens of the same text, the damage of a plan differs by about as much
_SAME = 0.02
_GROUPED = re.compile(r"G\d+$")  # the name of a scheme that has a group size
OWN = "own"  # a scheme from the user's layer_config that has no name
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
            those below. It is `OWN` where no scheme has that name.
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
    *,
    own_groups: bool = True,
) -> Candidates:
    """Find the schemes that each unit may have.

    Routed experts may have any fewer bits, since few tokens read their weights, all
    other layers one bit fewer than the scheme.

    Args:
        units: The units.
        layers: Each layer's scheme without a plan, by AutoRound's names.
        scheme: AutoRound's name of the scheme of all other layers.
        options: AutoRound's names of the schemes to choose from besides that.
        engine: What it does not load is not offered.
        export_format: What it does not hold is not offered.
        own_groups: Whether layers of integers keep their group size with schemes whose
            names have none: W8A16, not W8A16G64.

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
                f"because {reason}; leave it out, or pass another engine or format"
            )
    base, schemes = {}, {}
    for unit in units:
        own = {layer: layers[layer] for layer in unit.layers}
        bits = max(fields["bits"] for fields in own.values())
        base[unit.name] = _own_name(own, scheme, options)
        offered: dict[str, Mapping[str, SchemeFields]] = {base[unit.name]: own}
        for name in (scheme, *options):  # the scheme for an output projection
            fields = scheme_fields(name)
            if fields["bits"] < default["bits"] - _fewer(unit, bits):
                continue
            keeps = own_groups and _GROUPED.search(name) is None
            offer = {n: _with(own[n], fields, keeps) for n in unit.layers}
            if offer not in offered.values():
                offered.setdefault(name, offer)
        schemes[unit.name] = offered
    unused = [
        n for n in options if not any(n in offered for offered in schemes.values())
    ]
    if unused:
        raise ValueError(
            f"options={tuple(options)}: no unit may have {', '.join(unused)}; allowed "
            f"are {default['bits'] - 1} bits or more, fewer for routed experts, and "
            "nothing that all layers have already"
        )
    return Candidates(base, schemes)


def _own_name(
    own: Mapping[str, SchemeFields], scheme: str, options: Sequence[str]
) -> str:
    """Name the scheme that layers have without a plan; group sizes may be their own."""
    kinds = {_kind(fields) for fields in own.values()}
    if max(bits for bits, _, _ in kinds) >= 16:
        return "BF16"
    default = scheme_fields(scheme)
    if all(bits == default["bits"] for bits, _, _ in kinds):
        return scheme
    names = (*options, *(n for n in PRESET_SCHEMES if not n.startswith("GGUF")))
    same = (n for n in names if kinds == {_kind(scheme_fields(n))})
    return next(same, OWN)


def _kind(fields: SchemeFields) -> tuple[int, str, int]:
    return fields["bits"], str(fields["data_type"]), fields.get("act_bits") or 16


def _fewer(unit: Unit, bits: int) -> int:
    """Return how many bits fewer than the scheme a unit may have."""
    if unit.is_experts:
        return 16
    return 1 if bits < 16 else 0  # the output projection


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
    """Return the fields of one of AutoRound's schemes.

    Raises:
        ValueError: It has no scheme of that name.
    """
    if name.upper() not in PRESET_SCHEMES:
        raise ValueError(
            f"scheme {name!r}: unknown{did_you_mean(name.upper(), PRESET_SCHEMES)} "
            f"Allowed are AutoRound's schemes: {', '.join(PRESET_SCHEMES)}"
        )
    scheme = preset_name_to_scheme(name)
    if scheme == BF16:
        return _UNQUANTIZED
    return {n: v for n, v in scheme.items() if v is not None}


def own_fields(layer_config: Mapping[str, Any]) -> SchemeFields:
    """Return the scheme in what AutoRound has resolved for a layer."""
    return {n: layer_config[n] for n in _NAMES if layer_config.get(n) is not None}


def _with(own: SchemeFields, fields: SchemeFields, keeps_group: bool) -> SchemeFields:
    """Return a layer's fields with another scheme."""
    if fields["bits"] >= 16:
        return dict(_UNQUANTIZED)
    merged = {**own, **fields}
    same_type = own.get("data_type") in (fields["data_type"], "float")
    weights_only = (fields.get("act_bits") or 16) >= 16
    if same_type and weights_only and keeps_group:
        merged["group_size"] = own["group_size"]
    if same_type and fields["bits"] < 8:  # AutoRound's formats hold 8 bits symmetric
        merged["sym"] = own["sym"]
    return merged


@dataclass(frozen=True)
class Measured:
    """What rounding does to a model; it holds for every budget.

    Attributes:
        damages: Of each unit with each scheme, alone, by their names.
        uniform: Of all units with their base schemes.
        adding: How damages add.
    """

    damages: Mapping[tuple[str, str], Damage]
    uniform: Damage
    adding: DamageModel


@dataclass(frozen=True)
class Planned:
    """A choice, and what was measured for it.

    Attributes:
        chosen: The name of each unit's scheme, by the unit's name.
        measured: Of the units.
        together: Of all units with the chosen schemes.
    """

    chosen: Mapping[str, str]
    measured: Measured
    together: Damage


def make_plan(
    model: MeasuredModel,
    units: Sequence[Unit],
    candidates: Candidates,
    batches: Sequence[Tensor],
    sizes: Sizes,
    metric: Mapping[str, float],
    measured: Measured | None = None,
    *,
    progress: bool = False,
) -> Planned:
    """Measure every unit, make several choices, and keep the one that measures best.

    A prediction is a few per cent off, and too low where many routers are close to
    another choice. So the metric's own choice is compared with choices that weigh
    routing more. What is measured decides, by the metric; between plans that are as
    good as the tokens can tell, the one that changes fewer selected experts.

    Args:
        model: The model.
        units: Its units.
        candidates: Their schemes.
        batches: Token ids, each (B, S).
        sizes: What they take.
        metric: Weights of "kl" and "routing", each as a share of the uniform scheme's.
        measured: What `measure_units` returned before; None measures now.
        progress: Whether progress bars are shown.

    Raises:
        ValueError: No choice is within the limits; before anything is measured.
        NotImplementedError: Blocks that run alone do not give what the model gives.
    """
    if sizes.active_limit is not None:  # one limit alone was checked with its name
        nothing = dict.fromkeys(sizes.of, Damage(0.0, 0.0))
        check_limits(_priced(units, candidates, sizes, nothing), *sizes.limits)
    if measured is None:
        measured = measure_units(model, units, candidates, batches, progress=progress)
    choices: list[dict[str, str]] = []
    # without KL, more routing is the same metric
    for more in MORE_ROUTING if metric.get("kl") else (0.0,):
        weights = {**metric, "routing": metric.get("routing", 0.0) + more}
        choice = choose(units, candidates, measured, sizes, weights)
        if choice not in choices:
            choices.append(choice)
    trials = [_trial_of(units, candidates, choice) for choice in choices]
    title = "Measuring plans" if progress else None
    found = measure_damage(model, trials, batches, progress=title)
    weighted = _weights(metric, measured.uniform)
    limit = (1 + _SAME) * min(weighted.of(damage) for damage in found)
    good = [i for i, damage in enumerate(found) if weighted.of(damage) <= limit]
    best = min(good, key=lambda index: found[index].routing)
    return Planned(choices[best], measured, found[best])


def measure_units(
    model: MeasuredModel,
    units: Sequence[Unit],
    candidates: Candidates,
    batches: Sequence[Tensor],
    *,
    progress: bool = False,
) -> Measured:
    """Measure every unit with every scheme, and all together with their base schemes.

    Arguments and errors are those of `make_plan`.
    """
    model.check(batches[0])
    schemes = candidates.schemes
    trials = {
        (unit.name, name): Trial(schemes[unit.name][name])
        for unit in units
        for name in schemes[unit.name]
        if any(fields["bits"] < 16 for fields in schemes[unit.name][name].values())
    }
    whole = _trial_of(units, candidates, candidates.base)
    title = "Measuring units" if progress else None
    found = measure_damage(model, [*trials.values(), whole], batches, progress=title)
    uniform = found[-1]
    zero = Damage(0.0, 0.0)
    damages = {(u.name, name): zero for u in units for name in schemes[u.name]}
    damages |= dict(zip(trials, found, strict=False))
    adding = DamageModel.fit(
        [damages[unit.name, candidates.base[unit.name]] for unit in units], uniform
    )
    return Measured(damages, uniform, adding)


def choose(
    units: Sequence[Unit],
    candidates: Candidates,
    measured: Measured,
    sizes: Sizes,
    metric: Mapping[str, float],
) -> dict[str, str]:
    """Return the name of each unit's scheme: the least damage within the sizes.

    Arguments and errors are those of `make_plan`.
    """
    priced = _priced(units, candidates, sizes, measured.damages)
    weights = _weights(metric, measured.uniform)
    base = [candidates.base[unit.name] for unit in units]
    chosen = allocate(priced, base, measured.adding, weights, *sizes.limits)
    return {unit.name: name for unit, name in zip(units, chosen, strict=True)}


def _priced(
    units: Sequence[Unit],
    candidates: Candidates,
    sizes: Sizes,
    damages: Mapping[tuple[str, str], Damage],
) -> list[dict[str, Priced]]:
    """Return what each unit's schemes take and do."""
    return [
        {
            name: Priced(
                sizes.of[unit.name, name],
                sizes.of[unit.name, name] * unit.read,
                damages[unit.name, name],
            )
            for name in candidates.schemes[unit.name]
        }
        for unit in units
    ]


def _weights(metric: Mapping[str, float], uniform: Damage) -> Metric:
    return Metric(
        metric.get("kl", 0.0) / (uniform.kl or 1.0),
        metric.get("routing", 0.0) / (uniform.routing or 1.0),
    )


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
