# SPDX-License-Identifier: Apache-2.0
"""The options of AutoRound's SignRound and of its schemes: types and ranges.

AutoRound 0.16.1 checks few of them, and late: a learning rate of "fast" ends a run in
its first block. Sources: `SignRoundConfig.__init__` and `QuantizationScheme`; a
contract test compares their keywords with this table.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from auto_round.data_type import QUANT_FUNC_WITH_DTYPE
from auto_round.schemes import QuantizationScheme
from auto_round.utils import SUPPORTED_DTYPES
from pydantic import AfterValidator, Field

from vsraq.strict import StrictModel, check_values

_MOST = 2**31 - 1


def _known_data_type(name: str) -> str:
    """Accept a data type, with or without bits after it, such as mx_fp4."""
    bases = {*SUPPORTED_DTYPES, "float", "bf16", "fp16"}
    if (
        name in QUANT_FUNC_WITH_DTYPE
        or name in bases
        or name.rstrip("0123456789") in (bases)
    ):
        return name
    raise ValueError(f"{name} is unknown")


def _bits(value: int) -> int:
    if 2 <= value <= 8 or value in (16, 32):
        return value
    raise ValueError(f"{value} bits are unknown")


def _has_step(value: object) -> object:
    if callable(getattr(value, "step", None)):
        return value
    raise ValueError("it has no step()")


def _optimizer(value: object) -> object:
    found = getattr(torch.optim, value, None) if isinstance(value, str) else value
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return value
    raise ValueError("it is no optimizer")


_Bits = Annotated[int, AfterValidator(_bits)]
_DataType = Annotated[str, AfterValidator(_known_data_type)]
_Positive = Annotated[int, Field(ge=1, le=_MOST)]
_GroupSize = Annotated[int, Field(ge=-1, le=_MOST)]
_Rate = Annotated[float, Field(gt=0)]

_BITS = "an int from 2 to 8, or 16 for none"
_DATA_TYPE = f"one of AutoRound's data types, such as {', '.join(SUPPORTED_DTYPES)}"
_GROUP = "an int >= 1, -1 (a group per channel) or 0 (one for the tensor)"
_SWITCH = "True or False"
_COUNT = "an int >= 1"
_RATE = "a finite number > 0, or None for AutoRound's own"


class SchemeOptions(StrictModel):
    """Fields of `auto_round.schemes.QuantizationScheme`; None is the scheme's own."""

    bits: _Bits | None = Field(None, description=_BITS)
    group_size: _GroupSize | tuple[_Positive, _Positive] | None = Field(
        None, description=f"{_GROUP}, or a tuple of two ints for FP8 blocks"
    )
    sym: bool | None = Field(None, description=_SWITCH)
    data_type: _DataType | None = Field(None, description=_DATA_TYPE)
    act_bits: _Bits | None = Field(None, description=_BITS)
    act_group_size: _GroupSize | None = Field(None, description=_GROUP)
    act_sym: bool | None = Field(None, description=_SWITCH)
    act_data_type: _DataType | None = Field(None, description=_DATA_TYPE)
    act_dynamic: bool | None = Field(None, description=_SWITCH)
    super_bits: _Bits | None = Field(None, description=_BITS)
    super_group_size: _Positive | None = Field(None, description=_COUNT)
    rotation_config: dict[str, Any] | None = Field(
        None, description="a mapping of AutoRound's rotation options"
    )


class SignRoundOptions(SchemeOptions):
    """Keywords of AutoRound's `SignRoundConfig`, those of its scheme included."""

    scheme: QuantizationScheme | None = Field(
        None, description="a QuantizationScheme; names go to AutoRound(scheme=...)"
    )
    iters: Annotated[int, Field(ge=0, le=_MOST)] = Field(200, description=_COUNT)
    lr: _Rate | None = Field(None, description=_RATE)
    minmax_lr: _Rate | None = Field(None, description=_RATE)
    lr_scheduler: Annotated[object, AfterValidator(_has_step)] | None = Field(
        None, description="a learning-rate scheduler of torch, or None"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="a number from 0 to below 1"
    )
    nblocks: _Positive = Field(1, description=_COUNT)
    enable_minmax_tuning: bool = Field(True, description=_SWITCH)
    enable_norm_bias_tuning: bool = Field(False, description=_SWITCH)
    gradient_accumulate_steps: _Positive = Field(1, description=_COUNT)
    enable_alg_ext: bool = Field(False, description=_SWITCH)
    not_use_best_mse: bool = Field(False, description=_SWITCH)
    dynamic_max_gap: Annotated[int, Field(ge=-1, le=_MOST)] = Field(
        -1, description="an int >= 1, or -1 for no limit"
    )
    enable_quanted_input: bool = Field(True, description=_SWITCH)
    optimizer: Annotated[object, AfterValidator(_optimizer)] | None = Field(
        None, description="the name of an optimizer of torch.optim, its class, or None"
    )
    enable_adam: bool = Field(False, description=_SWITCH)
    enable_lfq: bool = Field(False, description=_SWITCH)
    enable_neuqi: bool = Field(False, description=_SWITCH)


def check_options(options: Mapping[str, Any]) -> None:
    """Check options of AutoRound that a user has named; others are not checked.

    Args:
        options: Values by the keywords of `SignRoundConfig`.

    Raises:
        ValueError: A value is not allowed, or has no effect.
    """
    known = {k: v for k, v in options.items() if k in SignRoundOptions.model_fields}
    check_values(SignRoundOptions, known)
    if known.get("enable_adam", False):
        if known.get("momentum", 0) != 0:
            raise ValueError(
                f"momentum={known['momentum']!r}: it has no effect with "
                "enable_adam=True, because Adam has its own; leave one of them out"
            )
    elif known.get("optimizer") is not None:
        raise ValueError(
            f"optimizer={known['optimizer']!r}: it has no effect without "
            "enable_adam=True; pass that too, or leave optimizer out"
        )


def check_config_options(config: object) -> None:
    """Check the options of a configuration again: AutoRound sets some later.

    Raises:
        ValueError: A value is not allowed, or has no effect.
    """
    names = SignRoundOptions.model_fields
    check_options(
        {n: v for n in names if hasattr(config, n) for v in [getattr(config, n)]}
    )
