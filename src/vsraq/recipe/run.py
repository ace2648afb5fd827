# SPDX-License-Identifier: Apache-2.0
"""Run a recipe: build AutoRound's run, quantize, export, or select tokens only."""

import copy
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.schemes import QuantizationScheme

from vsraq.autoround import VSRAQConfig
from vsraq.autoround.plain_run import watch_plain_run
from vsraq.autoround.select_tokens import selection_of
from vsraq.autoround.token_selection import TokenSelection
from vsraq.bits import BitPlan
from vsraq.callbacks import Callback
from vsraq.checkpoint.planned import PLAN_FILE
from vsraq.options import Threshold
from vsraq.recipe.bits import bit_plan, run_layer_config
from vsraq.recipe.callbacks import make_callbacks
from vsraq.recipe.recipe import Recipe
from vsraq.resume.output_folder import export_folders
from vsraq.run_record.file import add_recipe
from vsraq.tokens import TokenMask
from vsraq.yaml_text import write_yaml

logger = logging.getLogger("autoround.vsraq")


def build(
    recipe: Recipe,
    model: Any = None,
    config: SignRoundConfig | None = None,
    plan: BitPlan | None = None,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> AutoRound:
    """Build the AutoRound run of a recipe.

    Args:
        recipe: The recipe.
        model: A model in memory instead of `recipe.model`.
        config: Another configuration than `recipe.algorithm_config()`.
        plan: The recipe's bit plan, if it has been made already; see `bit_plan`.
        callbacks: Hear of the run, besides those that the recipe names.
        **overrides: Arguments of `auto_round.AutoRound` that YAML cannot hold, such as
            a tokenizer or calibration tensors.

    Returns:
        AutoRound's run, ready for `quantize()` or `quantize_and_save()`.
    """
    arguments = asdict(recipe.calibration) | dict(recipe.runtime) | overrides
    if plan is None:
        plan = bit_plan(recipe, model, **overrides)
    if plan is not None:
        arguments["layer_config"] = run_layer_config(recipe, plan)
    config = recipe.algorithm_config() if config is None else config
    callbacks = [*make_callbacks(recipe.callbacks), *callbacks]
    if isinstance(config, VSRAQConfig):
        config = copy.copy(config)  # the caller may use it again
        config.callbacks = [*config.callbacks, *callbacks]
    run = AutoRound(
        recipe.model if model is None else model,
        scheme=recipe.scheme,
        alg_configs=config,
        **arguments,
    )
    if not isinstance(config, VSRAQConfig):
        watch_plain_run(run, callbacks)
    return run


def mask_path(recipe: Recipe) -> Path:
    """Return where `select_tokens` writes the mask and `run` looks for it."""
    return Path(recipe.output) / "token_mask.safetensors"


def refuse_without_token_selection(recipe: Recipe) -> None:
    """Refuse a recipe that has no mask for `select_tokens` to write.

    Raises:
        ValueError: It selects no tokens, or names a mask.
    """
    if _threshold(recipe.algorithm_config()) is None:
        raise ValueError(
            "algorithm: this recipe selects no tokens, so there is no mask; allowed is "
            "one with objective: sra or token_selection: true, and without token_mask"
        )


def select_tokens(recipe: Recipe) -> TokenSelection:
    """Select the tokens of a recipe's run, write the mask, and tune nothing.

    Returns:
        The selected tokens; their mask is at `mask_path(recipe)`.

    Raises:
        ValueError: The recipe selects no tokens, or names a mask.
    """
    refuse_without_token_selection(recipe)
    config = recipe.algorithm_config()
    config.select_only = True
    plan = bit_plan(recipe)
    autoround = build(recipe, config=config, plan=plan)
    # as `run` does: a format may change what is quantized, and how
    selection = selection_of(
        lambda: autoround.quantize_and_save(recipe.output, format=recipe.format)
    )
    path = mask_path(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = replace(selection.mask, model=recipe.model, scheme=_rounding(recipe, plan))
    mask.save(path)
    return selection


def _rounding(recipe: Recipe, plan: BitPlan | None) -> str:
    """Describe all that decides how a recipe rounds the model."""
    fields_of_scheme = set(QuantizationScheme.get_attributes())
    changes = {k: v for k, v in recipe.algorithm.items() if k in fields_of_scheme}
    layers = ("ignore_layers", "layer_config", "quant_lm_head", "to_quant_block_names")
    changes |= {k: v for k, v in recipe.runtime.items() if k in layers}
    if plan is not None:
        entries = json.dumps(plan.layer_config, sort_keys=True)
        changes["bits"] = hashlib.sha256(entries.encode()).hexdigest()[:16]
    rounding = f"{recipe.scheme} for {recipe.format}"
    return f"{rounding} {changes}" if changes else rounding


def _threshold(config: SignRoundConfig) -> Threshold | None:
    """Return the thresholds of a run that selects tokens itself, else None."""
    return config.alignment.threshold if isinstance(config, VSRAQConfig) else None


def _reusable_mask(
    recipe: Recipe, config: SignRoundConfig, plan: BitPlan | None
) -> Path | None:
    """Return the mask that `select_tokens` wrote, if it was made for this run."""
    path = mask_path(recipe)
    threshold = _threshold(config)
    if threshold is None or not path.is_file():
        return None
    mask = TokenMask.load(path)
    made = (mask.model, mask.scheme, mask.tau, mask.shift_threshold)
    thresholds = (threshold.tau, threshold.shift_threshold)
    wanted = (recipe.model, _rounding(recipe, plan), *thresholds)
    if made != wanted:
        logger.warning(
            "vsraq: %s was made with model, scheme, tau, shift_threshold = %s, this "
            "run has %s: tokens are selected anew",
            path,
            made,
            wanted,
        )
        return None
    logger.info("vsraq: tokens were selected before, in %s", path)
    return path


def run(
    recipe: Recipe, *, progress: bool = False, callbacks: Sequence[Callback] = ()
) -> list[Path]:
    """Quantize, export, and write the resolved recipe beside each export.

    A mask that `select_tokens` has written for this recipe is used. A bit plan is made
    first, or that of a killed run is used, and kept beside each export.

    Args:
        recipe: The recipe.
        progress: Whether a bit plan shows progress bars.
        callbacks: Hear of the run, besides those that the recipe names.

    Returns:
        The folders of the exports, one per format.

    Raises:
        ValueError: That mask was made for other calibration tokens, or the bit plan for
            another model or other settings.
    """
    started = time.monotonic()
    plan = bit_plan(recipe, progress=progress)
    planning = time.monotonic() - started if recipe.bit_settings else None
    config = recipe.algorithm_config()
    mask = _reusable_mask(recipe, config, plan)
    if mask is not None:
        config.token_mask, config.token_selection = mask, True
    autoround = build(recipe, config=config, plan=plan, callbacks=callbacks)
    _, folders = autoround.quantize_and_save(recipe.output, format=recipe.format)
    paths = export_folders(folders)
    for path in paths:
        write_resolved(recipe, path, plan)
        add_recipe(path, recipe.model, recipe.scheme, recipe.resolved(), planning)
    return paths


def write_resolved(recipe: Recipe, folder: Path, plan: BitPlan | None = None) -> Path:
    """Write `vsraq_recipe.yaml` into a folder and return its path.

    It can be run again as it is; its comments hold the versions that made the export.
    A bit plan is written beside it, and the recipe names that file, which is looked up
    beside the recipe: made anew on another machine or with other versions, a plan may
    differ. The file says how it was made.

    Args:
        recipe: The recipe.
        folder: Where the export is.
        plan: The bit plan of its run.
    """
    if plan is None:
        (folder / PLAN_FILE).unlink(missing_ok=True)  # of a run that was killed
    else:
        plan.save(folder / PLAN_FILE)
        every = run_layer_config(recipe, plan)
        others = {n: e for n, e in every.items() if n not in plan.layer_config}
        runtime = dict(recipe.runtime) | {"layer_config": others}
        if not others:
            del runtime["layer_config"]
        recipe = replace(recipe, bits=PLAN_FILE, runtime=runtime)
    packages = ("vsraq", "auto-round", "torch", "transformers")
    versions = "".join(f"# {name} {version(name)}\n" for name in packages)
    path = folder / "vsraq_recipe.yaml"
    path.write_text(versions + write_yaml(recipe.resolved()), encoding="utf-8")
    return path
