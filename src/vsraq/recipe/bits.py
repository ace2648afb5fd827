# SPDX-License-Identifier: Apache-2.0
"""The bit plan of a recipe: read from a file, or made, kept, and found again."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from auto_round.scheme_entry import preview_resolved_attrs
from auto_round.schemes import QuantizationScheme

from vsraq.autoround import plan_bits
from vsraq.autoround.plan_bits import current_versions, default_options
from vsraq.autoround.planning import OWN, scheme_fields, why_refused
from vsraq.bits import BitPlan
from vsraq.bits.engines import Engine, get_engine
from vsraq.checkpoint.planned import (
    PLAN_FILE,
    PlannedLayers,
    config_digest,
    is_ignored,
    to_pattern,
)
from vsraq.recipe.model import model_config
from vsraq.recipe.recipe import Recipe

logger = logging.getLogger("autoround.vsraq")

# of a scheme; what decides how a weight is stored
_STORED = ("bits", "group_size", "sym")
# of `runtime`; what decides which layers are quantized, and what is measured
_DECIDES = (
    "ignore_layers",
    "layer_config",
    "model_dtype",
    "quant_lm_head",
    "to_quant_block_names",
)


def plan_path(recipe: Recipe) -> Path:
    """Return where the plan that a run makes is kept, and looked for."""
    return Path(recipe.output) / PLAN_FILE


def check_bit_plan(recipe: Recipe, config: Any) -> BitPlan | None:
    """Check the bit plan of a recipe as far as that is possible without weights.

    Args:
        recipe: The recipe.
        config: Its model's transformers config.

    Returns:
        The plan, if there is one already.

    Raises:
        FileNotFoundError: The file of the plan is missing.
        ValueError: The plan is for another model or other settings, or no plan can be
            made.
    """
    if recipe.bits is None:
        return None
    if isinstance(recipe.bits, str):
        plan = _load(recipe.bits)
        plan.check(config, recipe.scheme)
        _check_scheme(recipe, plan)
        run_layer_config(recipe, plan)
        return plan
    plan_choices(recipe)
    tied = getattr(config, "tie_word_embeddings", False)
    if recipe.bit_settings["lm_head"] and tied:
        raise ValueError(
            "bits.lm_head=True: the output projection shares its weight with the "
            "embedding, which AutoRound does not quantize; leave it out"
        )
    return _kept(recipe)


def bit_plan(
    recipe: Recipe, model: Any = None, *, progress: bool = False, **overrides: Any
) -> BitPlan | None:
    """Return the bit plan of a recipe, None if it has no `bits`.

    Args:
        recipe: The recipe.
        model: A model in memory instead of `recipe.model`.
        progress: Whether progress bars are shown.
        **overrides: See `build`.

    Returns:
        The plan at the path that the recipe names; or the one that a run with the same
        settings has kept in the output folder; or a new one, which is then kept there.

    Raises:
        FileNotFoundError: The file of the plan is missing.
        ValueError: The plan is for another model or other settings, or no plan can be
            made.
    """
    if recipe.bits is None:
        return None
    if isinstance(recipe.bits, str):
        config = model_config(recipe) if model is None else model.config
        return check_bit_plan(recipe, config)
    # what YAML cannot hold is not in the settings of a kept plan
    plan = None if model is not None or overrides else _kept(recipe, warn=True)
    if plan is not None:
        logger.info("vsraq: the bit plan was made before, in %s", plan_path(recipe))
        return plan
    plan = make_plan(recipe, model, progress=progress, **overrides)
    path = plan_path(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    logger.info("vsraq: bit plan, kept in %s\n%s", path, plan)
    return plan


def with_bits(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """Return a recipe with these settings of a bit plan over its own.

    Raises:
        ValueError: It has a plan already, or a setting is not allowed.
    """
    if isinstance(recipe.bits, str):
        raise ValueError(
            f"bits={recipe.bits!r}: the recipe has a bit plan already; leave that key "
            "out to make another one"
        )
    return replace(recipe, bits={**(recipe.bits or {}), **given})


def make_plan(
    recipe: Recipe, model: Any = None, *, progress: bool = False, **overrides: Any
) -> BitPlan:
    """Make the bit plan that a recipe's `bits` asks for.

    Args:
        recipe: A recipe with settings of a plan.
        model: A model in memory instead of `recipe.model`.
        progress: Whether progress bars are shown.
        **overrides: See `build`.

    Raises:
        ValueError: No plan can be made with these settings.
    """
    settings = recipe.bit_settings
    calibration = recipe.calibration
    arguments = dict(recipe.runtime) | overrides
    dataset = arguments.pop("dataset", calibration.dataset)
    plan = plan_bits(
        recipe.model if model is None else model,
        dataset,
        recipe.scheme,
        options=plan_choices(recipe),
        budget=settings["budget"],
        active_budget=settings.get("active_budget"),
        metric=settings["metric"],
        engine=_engine_name(recipe),
        export_format=recipe.formats[0],
        lm_head=settings["lm_head"],
        tokens=settings["tokens"],
        nsamples=calibration.nsamples,
        seqlen=calibration.seqlen,
        seed=calibration.seed,
        router_pattern=recipe.algorithm.get("router_pattern"),
        progress=progress,
        **_scheme_changes(recipe),
        **arguments,
    )
    return replace(plan, model=recipe.model, settings=plan_settings(recipe))


def run_layer_config(recipe: Recipe, plan: BitPlan) -> dict[str, Any]:
    """Return the `layer_config` of a run with a plan.

    A plan has what the recipe's own `layer_config` said when it was made. Other entries
    may only be for layers that the plan does not have, or say the same.

    Raises:
        ValueError: An entry, or `ignore_layers`, contradicts the plan.
    """
    planned = plan.planned_layers
    made = plan.settings.get("runtime", {})
    result: dict[str, Any] = dict(plan.layer_config)
    for name, entry in recipe.runtime.get("layer_config", {}).items():
        if made.get("layer_config", {}).get(name) == entry:
            continue
        layers = _matching(name, planned)
        for layer in layers:
            _refuse_other(f"layer_config.{name}={entry!r}", layer, entry, planned)
        if not layers:
            result[name] = entry
    ignored = recipe.runtime.get("ignore_layers", "")
    if ignored and made.get("ignore_layers") != ignored:
        for layer in (n for n in planned if is_ignored(n, ignored)):
            value = f"ignore_layers={ignored!r}"
            _refuse_other(value, layer, {"bits": 16}, planned)
    return result


def plan_settings(recipe: Recipe) -> dict[str, Any]:
    """Return all that decides a recipe's plan, as it is in a file."""
    runtime = {n: v for n, v in recipe.runtime.items() if n in _DECIDES}
    calibration = recipe.calibration
    settings = {
        "model": recipe.model,
        "scheme": recipe.scheme.upper(),
        "scheme_changes": _scheme_changes(recipe),
        "router_pattern": recipe.algorithm.get("router_pattern"),
        "formats": recipe.formats,
        "bits": recipe.bit_settings,
        "runtime": runtime,
        "calibration": {
            "dataset": calibration.dataset,
            "files": _digests(calibration.dataset),
            "nsamples": calibration.nsamples,
            "seqlen": calibration.seqlen,
            "seed": calibration.seed,
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _digests(dataset: str) -> dict[str, str]:
    """Return digests of the local files of a data set."""
    names = (part.partition(":")[0].strip() for part in dataset.split(","))
    digests = {}
    for name in names:
        if Path(name).is_file():
            with Path(name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _load(path: str) -> BitPlan:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"bits={path!r}: no such file; allowed is a plan that `vsraq plan` or "
            "BitPlan.save has written, or a mapping of settings"
        )
    return BitPlan.load(path)


def _kept(recipe: Recipe, *, warn: bool = False) -> BitPlan | None:
    """Return the plan in the output folder, if it was made with these settings."""
    path = plan_path(recipe)
    if not path.is_file():
        return None
    try:
        plan = BitPlan.load(path)
    except ValueError as error:
        if warn:
            logger.warning("vsraq: %s: a plan is made anew", error)
        return None
    wanted = plan_settings(recipe)
    names = sorted(n for n in wanted if plan.settings.get(n) != wanted[n])
    if config_digest(model_config(recipe)) != plan.config_digest:
        names.append("config of the model")
    if plan.versions != current_versions():
        names.append("version of a package")
    if names and warn:
        logger.warning(
            "vsraq: %s was made with another %s: a plan is made anew",
            path,
            ", ".join(names),
        )
    return None if names else plan


def _scheme_changes(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of the scheme that the recipe sets under `algorithm`."""
    names = set(QuantizationScheme.get_attributes())
    return {n: v for n, v in recipe.algorithm.items() if n in names}


def _engine_name(recipe: Recipe) -> str | None:
    name = recipe.bit_settings["engine"]
    return None if name == "none" else str(name)


def plan_choices(recipe: Recipe) -> list[str]:
    """Return the schemes to choose from: what the engine loads of all formats.

    Raises:
        ValueError: There is none, or one that is named is not loaded.
    """
    engine = get_engine(_engine_name(recipe))
    scheme = recipe.scheme.upper()
    _refuse_unloaded([scheme], recipe, engine)
    named = recipe.bit_settings.get("options")
    if named is not None:
        options = [str(name).upper() for name in named]
        _refuse_unloaded(options, recipe, engine)
        return options
    found = [default_options(scheme, engine, form) for form in recipe.formats]
    options = [name for name in found[0] if all(name in other for other in found)]
    if not options:
        raise ValueError(
            f"bits: beside {scheme} there is no scheme to choose from that "
            f"{engine.name} loads from format {recipe.format}; name some with "
            "bits.options, or take another engine or format"
        )
    return options


def _refuse_unloaded(names: list[str], recipe: Recipe, engine: Engine) -> None:
    default = scheme_fields(recipe.scheme)
    for name in names:
        for form in recipe.formats:
            reason = why_refused(scheme_fields(name), default, engine, form)
            if reason:
                raise ValueError(
                    f"bits: {name} is not allowed, because {reason}; take another "
                    "bits.engine, format or scheme"
                )


def _check_scheme(recipe: Recipe, plan: BitPlan) -> None:
    """Refuse a plan whose scheme has other fields, or that a format does not hold."""
    fields = preview_resolved_attrs(recipe.algorithm_config(), recipe.scheme)
    stored = {n: (plan.default[n], fields[n]) for n in plan.default if n in fields}
    runtime = plan.settings.get("runtime")
    if runtime is not None:  # a plan made in Python does not have them
        stored |= {
            name: (runtime.get(name), recipe.runtime.get(name))
            for name in ("quant_lm_head", "to_quant_block_names")
            if runtime.get(name) or recipe.runtime.get(name)
        }
    for name, (planned, given) in stored.items():
        if planned != given:
            raise ValueError(
                f"bits={recipe.bits!r}: the plan was made for {name}={planned!r}, the "
                f"recipe has {given!r}; allowed is the same, or make a new plan"
            )
    engine = get_engine(plan.engine)
    chosen = {unit.chosen for unit in plan.units} - {OWN}
    _refuse_unloaded(sorted(chosen), recipe, engine)


def _matching(name: str, planned: PlannedLayers) -> list[str]:
    """Return the planned layers that an entry of a `layer_config` is for."""
    layers = list(planned)
    if name in layers:
        return [name]
    pattern = to_pattern(name)
    return [layer for layer in layers if pattern.search(layer)]


def _refuse_other(
    value: str, layer: str, entry: str | Mapping[str, Any], planned: PlannedLayers
) -> None:
    """Refuse an entry that is not what was planned for a layer."""
    said = {"scheme": entry} if isinstance(entry, str) else dict(entry)
    scheme = said.pop("scheme", None)
    fields = {**scheme_fields(scheme), **said} if scheme else said
    there = planned[layer]
    known = ("bits",) if fields.get("bits") == 16 else _STORED
    other = [n for n in known if n in fields and fields[n] != there.get(n)]
    if other:
        has = ", ".join(f"{n}={there.get(n)!r}" for n in other)
        raise ValueError(
            f"runtime.{value}: the bit plan has {has} for {layer}; leave that out, or "
            "make a plan with it"
        )
