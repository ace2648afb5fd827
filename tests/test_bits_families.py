# SPDX-License-Identifier: Apache-2.0
"""Plans of every family that AutoRound runs."""

import re

import pytest
import torch

import families
import tiny
from family_table import WITH_IMAGES, read
from prepared import arguments, resolve
from vsraq.autoround.plan_bits import plan_bits
from vsraq.checkpoint import load_model

# one of each kind: run with every `pytest`, the others with --full
SOME = [
    "nemotron_h",  # one mixer per layer
    "gpt_oss",  # experts that AutoRound replaces
    "lfm2_moe",  # convolutions
    f"qwen3_vl_moe{WITH_IMAGES}",
]
# The text of its two decoders is not in one list of blocks.
TWO_DECODERS = f"dots3_note{WITH_IMAGES}"


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        working = [name for name, row in read().items() if row.works]
        working = [name for name in working if name not in (TWO_DECODERS, *REFUSED)]
        metafunc.parametrize("family", working if every else SOME)
    if "refused" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        metafunc.parametrize("refused", REFUSED if every else ["glm_moe_dsa"])


_HAND_ON = (
    NotImplementedError,
    "blocks cannot be run one by one.* ValueError: not enough",
)
# What cannot be planned, and why.
REFUSED = {
    "glm_moe_dsa": _HAND_ON,  # what the indexer has chosen
    f"glm5_next{WITH_IMAGES}": _HAND_ON,
    "zaya": _HAND_ON,  # the residual
    # text never reaches these
    f"ernie4_5_vl_moe{WITH_IMAGES}": (RuntimeError, r"vision_moe\.gate .* not called"),
}


# AutoRound 0.16.1 fails with any layer_config: it renames keys with a wrong pattern.
NO_LAYER_CONFIG = {
    f"{name}{WITH_IMAGES}"
    for name in ("deepseek_ocr2", "kimi_k25", "minimax_m3_vl", "unlimited_ocr")
}


def model(family):
    name = family.removesuffix(WITH_IMAGES)
    made = families.tiny_family(name, multimodal=True if name != family else None)
    for kind in ("image", "video", "audio"):
        # one that the small vocabulary has, and no text
        if getattr(made.config, f"{kind}_token_id", None) is not None:
            setattr(made.config, f"{kind}_token_id", 0)
    return made


def plan(family, **kwargs):
    options = {"budget": "10%", "options": ["W8A16"]} | kwargs
    return plan_bits(
        model(family),
        tiny.calibration(2),
        tokens=64,
        **arguments(group_size=32),
        **options,
    )


def test_a_plan(family):
    found = plan(family)
    assert found.tokens == 64
    assert 0 < found.planned.kl < found.uniform.kl
    assert found.uniform.bytes < found.planned.bytes <= 1.1 * found.uniform.bytes
    for unit in found.units:
        costs = unit.candidates.values()
        assert all(0 <= c.kl < 100 and 0 <= c.routing <= 1 for c in costs)
        assert unit.candidates["W8A16"].bytes > unit.candidates["W4A16"].bytes
    options = {"group_size": 32, "layer_config": found.layer_config}
    if family in NO_LAYER_CONFIG:
        with pytest.raises(re.error, match="invalid group reference"):
            resolve(model(family), "W4A16", "auto_round", **options)
        return
    again = resolve(model(family), "W4A16", "auto_round", **options)
    for unit in found.units:
        bits = {"W4A16": 4, "W8A16": 8, "BF16": 16}[unit.chosen]
        assert {again[layer]["bits"] for layer in unit.layers} == {bits}


def test_the_same_plan_again():
    plans = [plan("olmoe", budget="3%", lm_head=True) for _ in range(2)]
    assert plans[0] == plans[1]
    assert "lm_head" in {unit.name for unit in plans[0].units}


@pytest.mark.usefixtures("bfloat16")
def test_a_plan_of_a_model_on_disk(tmp_path):
    source = tiny.save("solar_open", tmp_path / "model")
    options = arguments(group_size=32, options=["W8A16", "BF16"], tokens=64)
    plans = [
        plan_bits(given, tiny.calibration(2), "W4A16", budget="20%", **options)
        for given in (str(source), load_model(source, dtype=torch.bfloat16))
    ]
    assert {unit.chosen for unit in plans[0].units} > {"W4A16"}
    assert plans[0] == plans[1]


def test_what_cannot_be_planned(refused):
    kind, reason = REFUSED[refused]
    with pytest.raises(kind, match=reason):
        plan(refused)


def test_routers_that_text_never_reaches_are_left_out_by_a_pattern():
    family = f"ernie4_5_vl_moe{WITH_IMAGES}"
    found = plan(family, router_pattern=r"text_moe\.gate")
    assert 0 < found.planned.kl < found.uniform.kl


def test_two_decoders_are_refused():
    with pytest.raises(NotImplementedError, match="routers are not in one list of"):
        plan(TWO_DECODERS)
