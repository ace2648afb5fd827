# SPDX-License-Identifier: Apache-2.0
"""The keys of a recipe: their types, and what AutoRound knows of their values."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from auto_round.data_type.utils import get_quant_func
from auto_round.scheme_entry import eager_validate_scheme, preview_resolved_attrs
from auto_round.schemes import PRESET_SCHEMES
from auto_round.utils.model import convert_dtype_str2torch
from pydantic import AfterValidator, Field

from vsraq.autoround.option_types import SchemeOptions
from vsraq.bits.budget import budget_bytes
from vsraq.bits.engines import ENGINES
from vsraq.strict import StrictModel, check_values, did_you_mean

Method: TypeAlias = Literal["vsraq", "auto_round"]

# GGUF schemes change the format, BF16 tunes nothing
SCHEMES = tuple(
    name for name in PRESET_SCHEMES if not name.startswith("GGUF:") and name != "BF16"
)

METRICS = ("kl", "routing")
ENGINE_NAMES = (*ENGINES, "none")

_DEVICE = re.compile(
    r"auto|tp|\d+|(cpu|cuda|hpu|mps|npu|xpu)(:\d+)?"  # a device
    r"|[\w.*]+:(\d+|(cpu|cuda|hpu|mps|npu|xpu)(:\d+)?)"  # or layers and theirs
)


def _known_scheme(name: str) -> str:
    if name.upper() not in SCHEMES:
        raise ValueError(f"{name} is unknown")
    return name


def _devices(device_map: str | int) -> str | int:
    if isinstance(device_map, int):
        if device_map < 0:
            raise ValueError("negative")
        return device_map
    parts = device_map.split(",")
    if not all(_DEVICE.fullmatch(part.strip()) for part in parts):
        raise ValueError("no devices")
    return device_map


def _dtype(name: str) -> str:
    if name == "int8":
        raise ValueError("no dtype of a model")
    convert_dtype_str2torch(name)
    return name


def _layer_config(layers: dict[str, Any]) -> dict[str, Any]:
    for layer, options in layers.items():
        if isinstance(options, str):
            _known_scheme(options)
        else:
            SchemeOfLayer.model_validate(options)
        if not layer:
            raise ValueError("an empty name")
    return layers


def _budget(value: str | int) -> str | int:
    budget_bytes("budget", value, 1.0)
    return value


def _metric(value: str | dict[str, float]) -> str | dict[str, float]:
    weights = {value: 1.0} if isinstance(value, str) else value
    if not weights.keys() <= set(METRICS) or not any(weights.values()):
        raise ValueError("no weights of metrics")
    if min(weights.values()) < 0:
        raise ValueError("negative")
    return value


def _engine(name: str) -> str:
    if name not in ENGINE_NAMES:
        raise ValueError(f"{name} is unknown")
    return name


def _options(names: list[str]) -> list[str]:
    upper = [name.upper() for name in names]
    if not set(upper) <= {*SCHEMES, "BF16"} or len(set(upper)) < len(upper):
        raise ValueError("unknown, or twice")
    return names


_Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
_Names = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f,]+(,[^\x00-\x1f\x7f,]+)*$")]
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Scheme = Annotated[str, AfterValidator(_known_scheme)]

_TEXT = "a str of printable characters"
_COUNT = "an int >= 1"
_SWITCH = "a bool, true or false"
_SECTION = "a mapping of keys"
_ONE_OF_SCHEMES = f"one of {', '.join(SCHEMES)}"
_BUDGET = 'a share of the export\'s bytes with one scheme, such as "3%" or "-1%"'


class SchemeOfLayer(SchemeOptions):
    """The keys that one layer may have instead of the recipe's scheme."""

    scheme: _Scheme | None = Field(None, description=_ONE_OF_SCHEMES)
    scale_dtype: Annotated[str, AfterValidator(_dtype)] | None = None


class BitsKeys(StrictModel):
    """The keys of `bits`, which go to `vsraq.plan_bits`."""

    budget: Annotated[str | int, AfterValidator(_budget)] = Field(
        "0%", description=f"{_BUDGET}, or a number of bytes"
    )
    active_budget: Annotated[str | int, AfterValidator(_budget)] | None = Field(
        None, description=f"{_BUDGET}, or a number of bytes"
    )
    # a recipe is for an export that is served
    engine: Annotated[str, AfterValidator(_engine)] = Field(
        "vllm", description=f"one of {', '.join(ENGINE_NAMES)}"
    )
    metric: Annotated[str | dict[str, float], AfterValidator(_metric)] = Field(
        "kl", description="kl, routing, or a mapping of both to weights >= 0"
    )
    options: (
        Annotated[list[str], Field(min_length=1), AfterValidator(_options)] | None
    ) = Field(
        None,
        description=f"a list of schemes, each once, of {', '.join(SCHEMES)}, BF16",
    )
    lm_head: bool = Field(False, description=_SWITCH)
    tokens: _Count = Field(4096, description=_COUNT)


class RecipeKeys(StrictModel):
    """The keys at the top of a recipe."""

    model: _Text = Field(description=_TEXT)
    scheme: _Text = Field(description=_TEXT)
    output: _Text = Field(description=_TEXT)
    format: _Names = Field("auto_round", description=_TEXT)
    method: Method = Field("vsraq", description="vsraq or auto_round")
    algorithm: dict[str, Any] = Field(default_factory=dict, description=_SECTION)
    calibration: dict[str, Any] = Field(default_factory=dict, description=_SECTION)
    runtime: dict[str, Any] = Field(default_factory=dict, description=_SECTION)
    bits: _Text | dict[str, Any] = Field(
        "", description="the path of a bit plan, or a mapping of keys"
    )
    callbacks: dict[str, Any] = Field(default_factory=dict, description=_SECTION)


class CallbacksKeys(StrictModel):
    """The keys of `callbacks`."""

    tensorboard: _Text = Field("", description="a str: a folder for event files")
    wandb: _Text = Field("", description="a str: the name of a project")


class CalibrationKeys(StrictModel):
    """The keys of `calibration`."""

    dataset: _Names = Field("", description="a str: a data set's name or a file")
    nsamples: _Count = Field(1, description=_COUNT)
    seqlen: _Count = Field(1, description=_COUNT)
    batch_size: _Count = Field(1, description=_COUNT)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="an int from 0 to 2**32 - 1"
    )


class RuntimeKeys(StrictModel):
    """The keys of `runtime`, which go to `auto_round.AutoRound`."""

    amp: bool = Field(True, description=_SWITCH)
    device_map: Annotated[str | int, AfterValidator(_devices)] = Field(
        0, description='an int >= 0, "auto", a device such as cuda:0, or several: "0,1"'
    )
    enable_deterministic_algorithms: bool = Field(False, description=_SWITCH)
    enable_torch_compile: bool = Field(False, description=_SWITCH)
    ignore_layers: _Names = Field("", description="a str: names of layers, with commas")
    layer_config: Annotated[
        dict[str, str | dict[str, Any]], AfterValidator(_layer_config)
    ] = Field(
        default_factory=dict,
        description="a mapping of layers' names to a scheme's name or to fields of a "
        f"scheme ({', '.join(SchemeOptions.model_fields)})",
    )
    low_cpu_mem_usage: bool = Field(True, description=_SWITCH)
    low_gpu_mem_usage: bool = Field(False, description=_SWITCH)
    model_dtype: Annotated[str, AfterValidator(_dtype)] = Field(
        "auto", description="auto, float32, float16 or bfloat16"
    )
    quant_lm_head: bool = Field(False, description=_SWITCH)
    to_quant_block_names: _Names = Field(
        "", description="a str: names of blocks, with commas"
    )
    trust_remote_code: bool = Field(False, description=_SWITCH)


def check_scheme(name: str, config: Any) -> None:
    """Check a scheme with what a configuration changes in it, by AutoRound's rules.

    Args:
        name: AutoRound's name of the scheme.
        config: The run's `SignRoundConfig`.

    Raises:
        ValueError: The name is unknown, or the fields do not go together.
    """
    if name.upper() not in SCHEMES:
        raise ValueError(
            f"scheme={name!r}: unknown{did_you_mean(name.upper(), SCHEMES)} Allowed "
            f"are {', '.join(SCHEMES)}"
        )
    try:
        eager_validate_scheme(config, name)
        fields = preview_resolved_attrs(config, name)
        if fields["bits"] < 16:
            get_quant_func(
                fields["data_type"],
                fields["bits"],
                fields["sym"],
                group_size=fields["group_size"],
                iters=1,
            )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(
            f"scheme={name!r} with what is set under algorithm: "
            f"{' '.join(str(error).split())}"
        ) from error


def check_runtime(runtime: Mapping[str, Any]) -> None:
    """Check the arguments that go to AutoRound as they are.

    Raises:
        ValueError: A key is unknown, or a value is not allowed.
    """
    check_values(RuntimeKeys, runtime, "runtime")


def check_bits(bits: str | Mapping[str, Any]) -> None:
    """Check the settings of a bit plan, if it is not the path of one.

    Raises:
        ValueError: A key is unknown, or a value is not allowed.
    """
    if not isinstance(bits, str):
        check_values(BitsKeys, bits, "bits")
        if None in bits.values():
            names = ", ".join(f"bits.{n}" for n, v in bits.items() if v is None)
            raise ValueError(f"{names}: no value; leave it out for the default")
