# SPDX-License-Identifier: Apache-2.0
"""One YAML file, one reproducible run.

    model: upstage/Solar-Open-100B
    scheme: W4A16
    output: out/solar
    format: auto_round
    algorithm: {objective: vsraq, router_weight: 0.01}
    calibration: {nsamples: 512, seqlen: 2048}
    runtime: {low_gpu_mem_usage: true}
    bits: {budget: 3%}

Every key is checked before a model is touched. Keys under `algorithm` are the
arguments of `VSRAQConfig` (or of AutoRound's `SignRoundConfig` with
`method: auto_round`), fields of the scheme such as `group_size` included; those under
`runtime` go to `auto_round.AutoRound` as they are, and those under `bits` to
`vsraq.plan_bits`; `bits: plan.json` takes a plan that was made before.
"""

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.compressors.utils import check_need_act_calibration
from auto_round.scheme_entry import preview_resolved_attrs
from auto_round.schemes import QuantizationScheme

from vsraq.autoround import VSRAQConfig
from vsraq.autoround.option_types import check_options
from vsraq.checkpoint import check_formats
from vsraq.options import OPTIONS, refuse_misplaced
from vsraq.recipe.keys import (
    BitsKeys,
    CalibrationKeys,
    CallbacksKeys,
    Method,
    RecipeKeys,
    check_bits,
    check_runtime,
    check_scheme,
)
from vsraq.strict import check_values, refuse_unknown
from vsraq.yaml_text import parse_yaml, read_text


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
        bits: The path of a bit plan, or the settings to make one with; None for one
            scheme in all layers.
        callbacks: What hears of the run: a folder for `tensorboard`, a project for
            `wandb`.

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
    bits: str | Mapping[str, Any] | None = None
    callbacks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sections = {
            name: dict(getattr(self, name))
            for name in ("algorithm", "runtime", "callbacks")
        }
        values = vars(self) | sections | {"calibration": {}}
        if self.bits is None:
            del values["bits"]
        elif not isinstance(self.bits, str):
            values["bits"] = dict(self.bits)
        check_values(RecipeKeys, values)
        check_formats(self.format)
        check_runtime(self.runtime)
        check_values(CallbacksKeys, self.callbacks, "callbacks")
        if self.method == "vsraq":
            refuse_misplaced(self.algorithm)
        refuse_unknown(
            self.algorithm, config_arguments(self._config_class), "algorithm"
        )
        check_options(self.algorithm)
        try:
            config = self.algorithm_config()
        except TypeError as error:
            raise ValueError(f"algorithm: {error}") from error
        check_scheme(self.scheme, config)
        if self.bits is not None:
            check_bits(self.bits)
            self._refuse_useless_bits()

    def _refuse_useless_bits(self) -> None:
        settings = self.bit_settings
        if self.scheme.upper() in (o.upper() for o in settings.get("options", ())):
            raise ValueError(
                f"bits.options={settings['options']!r}: {self.scheme} is the recipe's "
                "scheme, which every unit may have; leave it out"
            )
        if settings.get("lm_head") and self.runtime.get("quant_lm_head"):
            raise ValueError(
                "bits.lm_head=True: runtime.quant_lm_head is set, too, which gives the "
                "output projection the recipe's scheme; leave one of them out"
            )

    @property
    def bit_settings(self) -> dict[str, Any]:
        """The settings of a bit plan with their defaults; empty without any."""
        if self.bits is None or isinstance(self.bits, str):
            return {}
        known = BitsKeys.model_fields
        defaults = {n: f.default for n, f in known.items() if f.default is not None}
        return defaults | dict(self.bits)

    @property
    def formats(self) -> tuple[str, ...]:
        """AutoRound's names of the export formats."""
        return tuple(name.strip().lower() for name in self.format.split(","))

    @property
    def tunes(self) -> bool:
        """Whether there is anything to tune: AutoRound rounds to nearest without."""
        return self.algorithm_config().iters > 0

    @property
    def needs_samples(self) -> bool:
        """Whether AutoRound runs the model: to tune, or for static ranges of inputs."""
        if self.tunes:
            return True
        fields = preview_resolved_attrs(self.algorithm_config(), self.scheme)
        return check_need_act_calibration(
            fields["act_dynamic"], fields["act_data_type"], fields["act_bits"] or 16
        )

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
        if not self.callbacks:
            del plain["callbacks"]
        if self.bits is None:
            del plain["bits"]
        elif not isinstance(self.bits, str):
            plain["bits"] = self.bit_settings
        config = self.algorithm_config()
        options = config.alignment.plain() if isinstance(config, VSRAQConfig) else {}
        names = config_arguments(self._config_class).difference(OPTIONS)
        values = {name: getattr(config, name, None) for name in names} | options
        plain["algorithm"] = {
            name: value if isinstance(value, str | int | float | dict) else str(value)
            for name, value in sorted(values.items())
            if value is not None
        }
        return plain


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML file and apply `key=value` overrides.

    A bit plan that the file names is looked up beside the file, then from the current
    folder.

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
    if isinstance(data.get("bits"), str):
        beside = Path(path).parent / os.path.expanduser(data["bits"])
        if beside.is_file():
            data["bits"] = str(beside)
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
    for section in ("algorithm", "calibration", "runtime", "callbacks"):
        below = values.get(section)
        if below is None:  # a key with nothing below it
            values[section] = {}
        elif isinstance(below, Mapping):
            values[section] = dict(below)
    if isinstance(values.get("bits"), Mapping):
        values["bits"] = dict(values["bits"])
    check_values(RecipeKeys, values)
    check_values(CalibrationKeys, values["calibration"], "calibration")
    paths = (
        *(("", "model"), ("", "output"), ("", "bits")),
        *(("algorithm", "token_mask"), ("callbacks", "tensorboard")),
    )
    for section, name in paths:
        target = values[section] if section else values
        if isinstance(target.get(name), str):
            target[name] = os.path.expanduser(target[name])
    calibration = Calibration(**values["calibration"])
    files = [os.path.expanduser(part) for part in calibration.dataset.split(",")]
    values["calibration"] = replace(calibration, dataset=",".join(files))
    return Recipe(**values)


def config_arguments(config_class: type) -> frozenset[str]:
    """Keyword arguments of the configuration, fields of the scheme included."""
    names = set(QuantizationScheme.get_attributes())
    for owner in config_class.__mro__:
        init = owner.__dict__.get("__init__")
        if init is not None and issubclass(owner, SignRoundConfig):
            parameters = inspect.signature(init).parameters
            names |= {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    return frozenset(names - {"callbacks"})  # a section of its own
