# SPDX-License-Identifier: Apache-2.0
"""AutoRound's own options are checked before a model is touched."""

import inspect
import math

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.config import QuantizationConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

import tiny
from vsraq import VSRAQConfig
from vsraq.autoround.option_types import SchemeOptions, SignRoundOptions, check_options

BAD = [
    ("lr", "fast"),
    ("lr", -1),
    ("lr", 0),
    ("lr", True),
    ("lr", math.nan),
    ("lr", 10**400),
    ("minmax_lr", math.inf),
    ("minmax_lr", "1e-3"),
    ("bits", "four"),
    ("bits", 0),
    ("bits", 4.0),
    ("bits", True),
    ("iters", True),
    ("iters", "many"),
    ("iters", -1),
    ("iters", 1.5),
    ("iters", None),
    ("iters", 10**30),
    ("enable_adam", "no"),
    ("enable_adam", 1),
    ("enable_alg_ext", None),
    ("enable_minmax_tuning", "yes"),
    ("momentum", "0.9"),
    ("momentum", 1),
    ("momentum", -0.1),
    ("nblocks", 0),
    ("nblocks", True),
    ("gradient_accumulate_steps", 0),
    ("dynamic_max_gap", -2),
    ("group_size", -2),
    ("group_size", [128, 128]),
    ("group_size", "128"),
    ("sym", "yes"),
    ("sym", 1),
    ("act_bits", "16"),
    ("act_dynamic", "true"),
    ("data_type", 4),
    ("data_type", "int3.5"),
    ("data_type", "integer"),
    ("act_data_type", "nvfloat"),
    ("super_bits", 0),
    ("super_group_size", -1),
    ("rotation_config", "hadamard"),
    ("lr_scheduler", "cosine"),
    ("lr_scheduler", 3),
    ("optimizer", "Adamw"),
    ("optimizer", "Tensor"),
    ("optimizer", 3),
    ("optimizer", "AdamW"),  # without enable_adam
    ("scheme", "W4A16"),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:20])
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*(allowed|no effect)") as refused:
        VSRAQConfig(**{name: value})
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=rf"^{name}="):
        check_options({name: value})


@pytest.mark.parametrize("name", ["router_weight", "auto_ratio"])
@pytest.mark.parametrize("value", [10**400, math.nan, math.inf])
def test_our_own_numbers_are_finite(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*allowed"):
        VSRAQConfig(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": None, "minmax_lr": None, "lr_scheduler": None, "optimizer": None},
        {"lr": 1, "minmax_lr": 5e-3, "momentum": 0, "dynamic_max_gap": -1},
        {"enable_adam": True, "optimizer": "AdamW"},
        {"enable_adam": True, "optimizer": torch.optim.SGD},
        {"bits": 3, "group_size": -1, "sym": False, "data_type": "int"},
        {"bits": 4, "group_size": 16, "data_type": "nv_fp", "act_bits": 16},
        {"data_type": "mx_fp4", "act_data_type": "mx_fp_rceil"},
        {"bits": 8, "data_type": "fp", "group_size": (128, 128), "act_dynamic": True},
        {"scheme": QuantizationScheme()},
    ],
    ids=str,
)
def test_what_autoround_takes_is_taken(options):
    config = VSRAQConfig(**options)
    assert all(getattr(config, name) == options[name] for name in options)


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_every_scheme_of_autoround_is_allowed(name):
    check_options(PRESET_SCHEMES[name].to_dict())


def test_momentum_has_no_effect_on_adam():
    with pytest.raises(ValueError, match=r"momentum=0.9: it has no effect"):
        VSRAQConfig(enable_adam=True, momentum=0.9)


def test_every_option_of_autoround_has_a_row():
    """A new option of AutoRound must get a type and a range here."""
    keywords = set()
    for owner in (SignRoundConfig, QuantizationConfig):
        parameters = inspect.signature(owner.__init__).parameters.values()
        keywords |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    scheme = set(QuantizationScheme.get_attributes())
    assert set(SchemeOptions.model_fields) == scheme
    assert set(SignRoundOptions.model_fields) == keywords | scheme


def test_defaults_are_autorounds():
    parameters = inspect.signature(SignRoundConfig.__init__).parameters
    for name, field in SignRoundOptions.model_fields.items():
        if name in parameters:
            assert field.default == parameters[name].default


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", "fast"), ("iters", True), ("momentum", "0.9"), ("group_size", "128")],
)
def test_options_given_to_autoround_are_checked_too(option, value):
    """AutoRound sets them on a configuration that it has built already."""
    model = tiny.tiny_model("solar_open")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"{option}={value!r}"):
        AutoRound(
            model,
            tokenizer=tiny.tiny_tokenizer(),
            alg_configs="vsraq",
            dataset=tiny.calibration(),
            **{option: value},
        )
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_a_missing_token_mask(tmp_path):
    missing = tmp_path / "mask.safetensors"
    with pytest.raises(FileNotFoundError, match=r"token_mask=.*no such file"):
        VSRAQConfig(objective="sra", token_mask=missing)
