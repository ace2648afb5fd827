# SPDX-License-Identifier: Apache-2.0
"""`vsraq.plan_bits`: which layers get more bits, and which fewer, before a run."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vsraq import stamp
from vsraq.autoround.export_sizes import ExportSizes
from vsraq.autoround.planning import (
    Candidates,
    Planned,
    find_candidates,
    make_plan,
    scheme_fields,
    why_refused,
)
from vsraq.autoround.planning_cost import planning_cost
from vsraq.autoround.planning_tokens import SAMPLE_TOKENS, token_batches
from vsraq.autoround.prepared_model import PreparedModel
from vsraq.bits.engines import Engine, get_engine
from vsraq.bits.exceptions import check_layers, exceptions
from vsraq.bits.plan import BitPlan, Cost, PlannedUnit, config_digest
from vsraq.bits.units import Unit, find_units

logger = logging.getLogger("autoround.vsraq")

_METRICS = ("kl", "routing")
_OFF = 0.3  # of the measured KL: a prediction that is further away is warned about


def plan_bits(
    model: Any,
    dataset: Any = "NeelNanda/pile-10k",
    scheme: str = "W4A16",
    *,
    options: Sequence[str] | None = None,
    budget: str | int = "0%",
    active_budget: str | int | None = None,
    metric: str | Mapping[str, float] = "kl",
    engine: str | None = None,
    export_format: str = "auto_round",
    lm_head: bool = False,
    tokens: int = 4096,
    state_memory: int | None = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 42,
    router_pattern: str | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> BitPlan:
    """Choose the schemes of a model's layers: the least damage within a budget.

        plan = vsraq.plan_bits(model, dataset, "W4A16", budget="3%", engine="vllm")
        print(plan)
        AutoRound(model, scheme="W4A16", layer_config=plan.layer_config)

    Layers that must share a scheme are one unit. Each unit is rounded alone with each
    scheme that it may have, and carried to the end of the model: KL of the output,
    Jaccard of every router. Then the choice is an integer programme.

    Args:
        model: What `auto_round.AutoRound` takes: a model, an id or a path. Its values
            stay; AutoRound prepares a model in memory for quantization.
        dataset: What AutoRound calibrates on, or a list of token ids, (S,) or (B, S).
        scheme: AutoRound's name of the scheme that the bytes are compared with.
        options: Names of the other schemes to choose from; None takes those that
            `default_options` names.
        budget: Bytes beyond the uniform export's: "3%" of it, or a number of bytes.
            "0%" raises some layers and lowers others.
        active_budget: The same for the bytes that one token reads; None for any.
        metric: "kl", "routing", or weights of both, such as {"kl": 1, "routing": 1}.
        engine: What has to load the export: "vllm", "sglang", "transformers", or None.
        export_format: AutoRound's name of the export format.
        lm_head: Whether the output projection is a unit too.
        tokens: How many tokens are measured with.
        state_memory: The most bytes that the hidden states of all streams may take on
            the CPU; more would lower `tokens`. None for any; see `PlanningCost`.
        nsamples: How many samples the run draws, where `dataset` is a name; a plan is
            measured with the beginnings of the first ones.
        seqlen: Tokens of a sample, where `dataset` is a name.
        seed: Draws the samples, where `dataset` is a name.
        router_pattern: What names the routers whose choices are measured, as in
            `VSRAQConfig`; None finds them. The experts of all layers are units.
        progress: Whether progress bars are shown.
        **kwargs: Other arguments of `AutoRound` (`tokenizer`, `device_map`,
            `layer_config`, `ignore_layers`, ...), the same as those of the run.

    Returns:
        The plan.

    Raises:
        ValueError: An option is not allowed, or no choice is within the budget.
        NotImplementedError: The model's decoder cannot be run block by block.
    """
    weights = _metric(metric)
    rules = get_engine(engine)
    if "," in export_format:
        raise ValueError(
            f"export_format={export_format!r}: allowed is one; for several, pass one "
            "of them, and the `options` that all of them hold"
        )
    scheme = scheme.upper()
    for name in (scheme, *(options or ())):
        scheme_fields(name)  # refuses it before the model is prepared
    prepared = PreparedModel.of(model, scheme, export_format, kwargs, router_pattern)
    units, candidates = _find_units(
        prepared, scheme, options, rules, export_format, lm_head=lm_head
    )
    sizes = ExportSizes.of(prepared, units, candidates, export_format)
    allowed = sizes.within(budget, active_budget)
    cost = planning_cost(prepared, units, candidates, tokens)
    if state_memory is not None:
        # samples that are given may have any length
        length = min(seqlen, SAMPLE_TOKENS) if isinstance(dataset, str) else 1
        cost = cost.within(state_memory, length)
    logger.info("vsraq: measuring %d units: %s", len(units), cost)
    batches = token_batches(
        dataset, prepared.tokenizer, cost.tokens, seqlen, seed, nsamples
    )
    if state_memory is not None:
        _refuse_long_samples(batches, cost.tokens, state_memory)
    planned = make_plan(
        prepared.model, units, candidates, batches, allowed, weights, progress=progress
    )
    plan = BitPlan(
        model=prepared.name,
        config_digest=config_digest(prepared.module.config),
        scheme=scheme,
        export_format=export_format,
        engine=engine,
        budget=str(budget),
        active_budget=None if active_budget is None else str(active_budget),
        metric=metric if isinstance(metric, str) else str(dict(metric)),
        tokens=sum(ids.numel() for ids in batches),
        units=_planned_units(units, candidates, planned, sizes.bytes_of),
        default=dict(prepared.default),
        layer_config=_layer_config(prepared, units, candidates, planned, rules),
        uniform=sizes.cost(candidates.base, planned.measured.uniform),
        planned=sizes.cost(planned.chosen, planned.together),
        flip_kl=planned.measured.adding.flip_kl,
        versions=current_versions(),
    )
    _warn_of_prediction(plan)
    return plan


def _find_units(
    prepared: PreparedModel,
    scheme: str,
    options: Sequence[str] | None,
    engine: Engine,
    export_format: str,
    *,
    lm_head: bool,
) -> tuple[tuple[Unit, ...], Candidates]:
    """Find the units of a model, and the schemes that they may have."""
    layers = prepared.layers | (prepared.head_layer() if lm_head else {})
    if options is None:
        options = default_options(scheme, engine, export_format)
    names = [option.upper() for option in options]
    units = find_units(prepared.module, list(layers), prepared.routers, engine)
    found = find_candidates(units, layers, scheme, names, engine, export_format)
    plain = prepared.plain_layers
    check_layers(units, layers, prepared.default, engine, export_format, plain=plain)
    return units, found


def _refuse_long_samples(
    batches: Sequence[Tensor], tokens: int, state_memory: int
) -> None:
    """Refuse samples that are longer than the limit of memory allows."""
    found = sum(ids.numel() for ids in batches)
    if found > tokens:
        raise ValueError(
            f"state_memory={state_memory:,}: it allows {tokens} tokens, and the first "
            f"sample has {found}; allow more, or shorter samples (seqlen)"
        )


def _warn_of_prediction(plan: BitPlan) -> None:
    """Say where a plan does something else than its units alone."""
    if abs(plan.predicted_kl - plan.planned.kl) > _OFF * plan.planned.kl:
        logger.warning(
            "vsraq: the units of the plan predict a KL of %.5f, and together they have "
            "%.5f: measure with more tokens, or compare the plan with the uniform "
            "scheme on your own data",
            plan.predicted_kl,
            plan.planned.kl,
        )


def current_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a plan."""
    return stamp.versions("vsraq", "auto-round", "transformers")


def default_options(scheme: str, engine: Engine, export_format: str) -> list[str]:
    """Name the schemes that a plan chooses from if nobody says which.

    For integers: those of 2 to 8 bits with the groups of the scheme. For others: MXFP8
    and 16 bits. Those that the engine does not load, or the format does not hold, are
    left out.
    """
    default = scheme_fields(scheme)
    if default["data_type"] == "int":
        names = [f"W{bits}A16" for bits in (2, 3, 4, 5, 6, 8)]
    else:
        names = ["MXFP8", "BF16"]
    return [
        name
        for name in names
        if scheme_fields(name)["bits"] != default["bits"]
        and not why_refused(scheme_fields(name), default, engine, export_format)
    ]


def _layer_config(
    prepared: PreparedModel,
    units: Sequence[Unit],
    candidates: Candidates,
    planned: Planned,
    engine: Engine,
) -> dict[str, dict[str, Any]]:
    schemes = dict(prepared.all_layers)
    for unit in units:
        schemes |= candidates.schemes[unit.name][planned.chosen[unit.name]]
    # without an entry, what the user leaves in 16 bits there might be quantized
    left = {n for n in prepared.named if schemes.get(n, {}).get("bits", 0) >= 16}
    outside = [n for n in prepared.outside(schemes) if n not in left]
    return exceptions(units, schemes, prepared.default, engine, outside=outside)


def _planned_units(
    units: Sequence[Unit],
    candidates: Candidates,
    planned: Planned,
    bytes_of: Mapping[tuple[str, str], int],
) -> tuple[PlannedUnit, ...]:
    found = []
    for unit in units:
        costs = {}
        for scheme in candidates.schemes[unit.name]:
            damage = planned.measured.damages[unit.name, scheme]
            size = bytes_of[unit.name, scheme]
            costs[scheme] = Cost(size, size * unit.read, damage.kl, damage.routing)
        chosen = planned.chosen[unit.name]
        found.append(PlannedUnit(unit.name, unit.layers, chosen, costs))
    return tuple(found)


def _metric(metric: str | Mapping[str, float]) -> dict[str, float]:
    given = {metric: 1.0} if isinstance(metric, str) else metric
    weights = dict(given) if isinstance(given, Mapping) else {}
    wrong = [n for n, w in weights.items() if n not in _METRICS or not _is_weight(w)]
    if wrong or not any(weights.values()):
        raise ValueError(
            f"metric={metric!r}: allowed are {', '.join(_METRICS)}, or a mapping of "
            "these to weights >= 0, not all of them 0"
        )
    return weights


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")
