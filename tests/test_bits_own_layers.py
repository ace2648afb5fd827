# SPDX-License-Identifier: Apache-2.0
"""Plans of models whose layers or routers the user has named."""

import pytest

import families
import tiny
from prepared import arguments, prepare, resolve
from vsraq.autoround import plan_bits
from vsraq.autoround.prepared_model import PreparedModel
from vsraq.bits.sizes import plain_bytes, unit_bytes
from vsraq.recipe import inspect, parse_recipe
from vsraq.routers import find_routers

L0 = "model.layers.0"


def plan_of(model, **options):
    known = {"options": ["W8A16"], "budget": "5%", "engine": "vllm", "tokens": 64}
    return plan_bits(
        model, tiny.calibration(), "W4A16", **arguments(group_size=32) | known | options
    )


def test_a_pattern_for_some_routers_is_no_pattern_for_experts(tmp_path):
    """`router_pattern` may be for the routers that are aligned; all have experts."""
    pattern = r"layers\.1\.mlp\.gate"
    model = tiny.tiny_model("solar_open")
    assert len(find_routers(model, router_pattern=pattern)) == 1
    every = find_routers(model, router_pattern=pattern, others=True)
    assert every == find_routers(model)
    found = PreparedModel.of(
        model, "W4A16", "auto_round", arguments(group_size=32), pattern
    )
    assert found.routers == every
    assert found.model.routers == find_routers(model, router_pattern=pattern)

    source = tiny.save("solar_open", tmp_path / "model")
    recipe = {
        "model": str(source),
        "scheme": "W4A16",
        "output": str(tmp_path / "out"),
        "algorithm": {"group_size": 32},
        "bits": {"budget": "5%", "options": ["W8A16"]},
        "calibration": {"dataset": tiny.save_text(tmp_path / "text.jsonl")},
    }
    looked = [inspect(parse_recipe(recipe))]
    recipe["algorithm"]["router_pattern"] = pattern
    looked += [inspect(parse_recipe(recipe))]
    assert [len(found.routers) for found in looked] == [2, 1]
    assert looked[0].units == looked[1].units
    assert f"{L0}.mlp.experts" in {unit.name for unit in looked[1].units}
    assert looked[0].export_bytes == looked[1].export_bytes


def test_the_head_starts_from_what_the_user_says_of_it():
    plan = plan_of(
        tiny.tiny_model("solar_open"),
        lm_head=True,
        layer_config={"lm_head": {"bits": 8}},
        budget="-1%",
    )
    head = plan.units[-1]
    assert (head.name, head.base) == ("lm_head", "W8A16")
    assert plan.planned_layers["lm_head"]["bits"] == int(head.chosen[1])
    assert plan.bytes <= 0.99 * plan.uniform.bytes
    layer = {"lm_head": {"bits": 8}}
    found = prepare(tiny.tiny_model("solar_open"), group_size=32, layer_config=layer)
    layers = {n: f for n, f in found.all_layers.items() if f["bits"] < 16}
    assert plan.uniform.bytes == plain_bytes(found.module, layers) + unit_bytes(
        found.module, layers, "auto_round"
    )


@pytest.mark.parametrize(
    ("ignored", "layer", "beside"),
    [
        ("q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.q_proj"),
        (
            "layers.1.mlp.experts.5.down_proj",
            "layers.1.mlp.experts.0.down_proj",
            "layers.1.mlp.experts.5.down_proj",
        ),
        ("shared_experts.up_proj", "shared_experts.gate_proj", "up_proj"),
    ],
)
def test_what_an_engine_loads_as_one_is_whole(ignored, layer, beside):
    message = rf"{layer}: vllm loads it as one with .*{beside}, which stays in 16 bits"
    with pytest.raises(ValueError, match=message):
        plan_of(tiny.tiny_model("solar_open"), ignore_layers=ignored)


def test_layers_of_images_that_stay_in_16_bits():
    """The run quantizes them without an entry, so the plan has one."""
    named = {
        "layer_config": {"visual.blocks.0": {"bits": 16}},
        "ignore_layers": "visual.blocks.1",
        "quant_nontext_module": True,
    }
    source = families.tiny_family("qwen3_vl_moe", multimodal=True)
    plan = plan_of(source, engine=None, **named)
    model = families.tiny_family("qwen3_vl_moe", multimodal=True)
    layers = resolve(
        model,
        "W4A16",
        "auto_round",
        group_size=32,
        quant_nontext_module=True,
        layer_config=plan.layer_config,
    )
    bits = {n: f["bits"] for n, f in layers.items() if "visual.blocks" in n}
    for name, expected in (("blocks.0.", {16}), ("blocks.1.", {16})):
        assert {b for n, b in bits.items() if name in n} == expected
