# SPDX-License-Identifier: Apache-2.0
"""One YAML file, one reproducible run.

    model: upstage/Solar-Open-100B
    scheme: W4A16
    output: out/solar
    format: auto_round
    algorithm: {objective: vsraq, router_weight: 0.01}
    calibration: {nsamples: 512, seqlen: 2048}
    runtime: {low_gpu_mem_usage: true}

Every key is checked before a model is touched. Keys under `algorithm` are the
arguments of `VSRAQConfig` (or of AutoRound's `SignRoundConfig` with
`method: auto_round`), fields of the scheme such as `group_size` included; those under
`runtime` go to `auto_round.AutoRound` as they are.
"""

import inspect
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.schemes import QuantizationScheme

from vsraq.autoround import VSRAQConfig
from vsraq.autoround.option_types import check_options
from vsraq.autoround.preflight import Plan, check_before
from vsraq.autoround.recipe_keys import (
    CalibrationKeys,
    Method,
    RecipeKeys,
    check_runtime,
    check_scheme,
)
from vsraq.autoround.select_tokens import selection_of
from vsraq.autoround.token_selection import TokenSelection
from vsraq.checkpoint import check_formats
from vsraq.options import OPTIONS, Threshold
from vsraq.strict import check_values, refuse_unknown
from vsraq.tokens import TokenMask
from vsraq.yaml_text import parse_yaml, read_text, write_yaml

logger = logging.getLogger("autoround.vsraq")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that AutoRound tunes on.

    Attributes:
        dataset: A data set that AutoRound knows, or the path of a local file, with
            AutoRound's options after colons.
        nsamples: Samples.
        seqlen: Tokens per sample; shorter ones are dropped.
        batch_size: Samples per tuning step.
        seed: Of sampling and tuning.
    """

    dataset: str = "NeelNanda/pile-10k"
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    seed: int = 42

    def __post_init__(self) -> None:
        check_values(CalibrationKeys, asdict(self), "calibration")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated run.

    Attributes:
        model: A model id or the path of a checkpoint.
        scheme: AutoRound's name of a scheme, such as W4A16 or NVFP4.
        output: Folder of the export.
        format: AutoRound's export format; several with commas between them.
        method: "vsraq", or "auto_round" for the same run without router alignment.
        algorithm: Arguments of the method's configuration.
        calibration: The calibration text.
        runtime: Further arguments of `auto_round.AutoRound`.

    Raises:
        ValueError: A value is not allowed.
    """

    model: str
    scheme: str
    output: str
    format: str = "auto_round"
    method: Method = "vsraq"
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    runtime: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sections = {"algorithm": dict(self.algorithm), "runtime": dict(self.runtime)}
        check_values(RecipeKeys, vars(self) | sections | {"calibration": {}})
        check_formats(self.format)
        check_runtime(self.runtime)
        refuse_unknown(self.algorithm, _arguments(self._config_class), "algorithm")
        check_options(self.algorithm)
        try:
            config = self.algorithm_config()
        except TypeError as error:
            raise ValueError(f"algorithm: {error}") from error
        check_scheme(self.scheme, config)

    @property
    def _config_class(self) -> type[SignRoundConfig]:
        return VSRAQConfig if self.method == "vsraq" else SignRoundConfig

    def algorithm_config(self) -> SignRoundConfig:
        """Build the configuration object that goes to AutoRound as `alg_configs`.

        Raises:
            ValueError: A value under `algorithm` is not allowed.
        """
        config: SignRoundConfig = self._config_class(**self.algorithm)
        return config

    def resolved(self) -> dict[str, Any]:
        """Return every setting with its final value, as `parse_recipe` reads it."""
        plain = asdict(self)
        config = self.algorithm_config()
        options = config.alignment.plain() if isinstance(config, VSRAQConfig) else {}
        names = _arguments(self._config_class).difference(OPTIONS)
        values = {name: getattr(config, name, None) for name in names} | options
        plain["algorithm"] = {
            name: value if isinstance(value, str | int | float | dict) else str(value)
            for name, value in sorted(values.items())
            if value is not None
        }
        return plain


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML file and apply `key=value` overrides.

    Args:
        path: The file.
        overrides: Such as `algorithm.router_weight=0.1`; values are YAML.

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a mapping, a key is unknown (the message names the
            nearest known one), or a value is not allowed.
    """
    data = parse_yaml(read_text(path))
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: holds a {type(data).__name__}; allowed is a mapping of keys"
        )
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(
                f"override {override!r}: allowed is key=value, such as "
                "algorithm.router_weight=0.1"
            )
        *sections, name = key.strip().split(".")
        target = data
        for section in sections:
            target[section] = target.get(section) or {}
            target = target[section]
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {section} is not a section")
        target[name] = parse_yaml(value)
    return parse_recipe(data)


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Turn a mapping, as YAML gives it, into a recipe.

    Raises:
        ValueError: A key is unknown or missing, or a value is not allowed.
    """
    values = dict(data)
    for section in ("algorithm", "calibration", "runtime"):
        below = values.get(section)
        if below is None:  # a key with nothing below it
            values[section] = {}
        elif isinstance(below, Mapping):
            values[section] = dict(below)
    check_values(RecipeKeys, values)
    check_values(CalibrationKeys, values["calibration"], "calibration")
    for section, name in (("", "model"), ("", "output"), ("algorithm", "token_mask")):
        target = values[section] if section else values
        if isinstance(target.get(name), str):
            target[name] = os.path.expanduser(target[name])
    calibration = Calibration(**values["calibration"])
    files = [os.path.expanduser(part) for part in calibration.dataset.split(",")]
    values["calibration"] = replace(calibration, dataset=",".join(files))
    return Recipe(**values)


def build(
    recipe: Recipe,
    model: Any = None,
    config: SignRoundConfig | None = None,
    **overrides: Any,
) -> AutoRound:
    """Build the AutoRound run of a recipe.

    Args:
        recipe: The recipe.
        model: A model in memory instead of `recipe.model`.
        config: Another configuration than `recipe.algorithm_config()`.
        **overrides: Arguments of `auto_round.AutoRound` that YAML cannot hold, such as
            a tokenizer or calibration tensors.

    Returns:
        AutoRound's run, ready for `quantize()` or `quantize_and_save()`.
    """
    arguments = asdict(recipe.calibration) | dict(recipe.runtime) | overrides
    return AutoRound(
        recipe.model if model is None else model,
        scheme=recipe.scheme,
        alg_configs=recipe.algorithm_config() if config is None else config,
        **arguments,
    )


def check(recipe: Recipe) -> Plan:
    """Check what can be known before the work of `run` and `select_tokens` begins.

    Raises:
        FileNotFoundError: The model, a data set's file or the token mask is missing.
        ValueError: The output cannot be written, the model is unknown or not a mixture
            of experts, or there is too little room or calibration text.
    """
    return check_before(recipe)


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
    autoround = build(recipe, config=config)
    # as `run` does: a format may change what is quantized, and how
    selection = selection_of(
        lambda: autoround.quantize_and_save(recipe.output, format=recipe.format)
    )
    path = mask_path(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = replace(selection.mask, model=recipe.model, scheme=_rounding(recipe))
    mask.save(path)
    return selection


def _rounding(recipe: Recipe) -> str:
    """Describe all that decides how a recipe rounds the model."""
    fields_of_scheme = set(QuantizationScheme.get_attributes())
    changes = {k: v for k, v in recipe.algorithm.items() if k in fields_of_scheme}
    layers = ("ignore_layers", "layer_config", "quant_lm_head", "to_quant_block_names")
    changes |= {k: v for k, v in recipe.runtime.items() if k in layers}
    rounding = f"{recipe.scheme} for {recipe.format}"
    return f"{rounding} {changes}" if changes else rounding


def _threshold(config: SignRoundConfig) -> Threshold | None:
    """Return the thresholds of a run that selects tokens itself, else None."""
    return config.alignment.threshold if isinstance(config, VSRAQConfig) else None


def _reusable_mask(recipe: Recipe, config: SignRoundConfig) -> Path | None:
    """Return the mask that `select_tokens` wrote, if it was made for this run."""
    path = mask_path(recipe)
    threshold = _threshold(config)
    if threshold is None or not path.is_file():
        return None
    mask = TokenMask.load(path)
    made = (mask.model, mask.scheme, mask.tau, mask.shift_threshold)
    thresholds = (threshold.tau, threshold.shift_threshold)
    wanted = (recipe.model, _rounding(recipe), *thresholds)
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


def run(recipe: Recipe) -> list[Path]:
    """Quantize, export, and write the resolved recipe beside each export.

    A mask that `select_tokens` has written for this recipe is used.

    Returns:
        The folders of the exports, one per format.

    Raises:
        ValueError: That mask was made for other calibration tokens.
    """
    config = recipe.algorithm_config()
    mask = _reusable_mask(recipe, config)
    if mask is not None:
        config.token_mask, config.token_selection = mask, True
    autoround = build(recipe, config=config)
    _, folders = autoround.quantize_and_save(recipe.output, format=recipe.format)
    paths = [Path(f) for f in ([folders] if isinstance(folders, str) else folders)]
    for path in paths:
        write_resolved(recipe, path)
    return paths


def write_resolved(recipe: Recipe, folder: Path) -> Path:
    """Write `vsraq_recipe.yaml` into a folder and return its path.

    It can be run again as it is; its comments hold the versions that made the export.
    """
    packages = ("vsraq", "auto-round", "torch", "transformers")
    versions = "".join(f"# {name} {version(name)}\n" for name in packages)
    path = folder / "vsraq_recipe.yaml"
    path.write_text(versions + write_yaml(recipe.resolved()), encoding="utf-8")
    return path


def _arguments(config_class: type) -> frozenset[str]:
    """List keyword arguments of the configuration, fields of the scheme included."""
    names = set(QuantizationScheme.get_attributes())
    for owner in config_class.__mro__:
        init = owner.__dict__.get("__init__")
        if init is not None and issubclass(owner, SignRoundConfig):
            parameters = inspect.signature(init).parameters
            names |= {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    return frozenset(names)
