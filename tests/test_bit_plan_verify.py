# SPDX-License-Identifier: Apache-2.0
"""The bit plan beside an export: `verify` finds layers that are not as planned."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from auto_round import AutoRound

import tiny
from vsraq.autoround import plan_bits
from vsraq.bits import BitPlan
from vsraq.checkpoint import CheckpointError, load_model, verify
from vsraq.checkpoint.bounds import Sums, judge
from vsraq.checkpoint.planned import (
    PLAN_FILE,
    PlannedLayers,
    config_digest,
    plan_digest,
)

RUN = {"device_map": "cpu", "enable_torch_compile": False}


def make_plan(family="solar_open", scheme="W4A16", **options):
    """A plan of a tiny model, and what the model was when it was made."""
    arguments = {"tokens": 64, "budget": "3%", "group_size": 32} | options
    if scheme != "W4A16":
        del arguments["group_size"]
    return plan_bits(
        tiny.in_bfloat16(tiny.tiny_model(family)),
        tiny.calibration(),
        scheme,
        tokenizer=tiny.tiny_tokenizer(),
        **RUN,
        **arguments,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan, an export that was made with it, and its original."""
    root = tmp_path_factory.mktemp("planned")
    source = tiny.save("solar_open", root / "source")
    plan = make_plan(options=["W3A16", "W8A16"], budget="2%")
    run = AutoRound(
        tiny.in_bfloat16(tiny.tiny_model("solar_open")),
        tiny.tiny_tokenizer(),
        scheme="W4A16",
        group_size=32,
        dataset=tiny.calibration(),
        iters=1,
        layer_config=plan.layer_config,
        **tiny.RUN,
    )
    tuned, _ = run.quantize()
    _, saved = run.save_quantized(
        str(root / "out"),
        format="auto_round,llm_compressor",
        inplace=False,
        return_folders=True,
    )
    for folder in saved:
        plan.save(f"{folder}/{PLAN_FILE}")
    return plan, saved, source, tuned


def test_planned_exports_are_verified(planned):
    plan, saved, source, tuned = planned
    layers = sum(len(unit.layers) for unit in plan.units)
    assert {unit.chosen for unit in plan.units} > {"W4A16"}
    for folder in saved:
        for reference in (source, tuned):
            found = verify(folder, reference)
            assert found.planned_layers == layers == found.quantized_layers


def test_the_bytes_are_those_of_the_files(planned):
    plan, saved, _, _ = planned
    data = (Path(saved[0]) / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == plan.bytes


def faults(folder, source, change):
    content = json.loads((folder / PLAN_FILE).read_text())
    change(content)
    content["digest"] = plan_digest(content)
    (folder / PLAN_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        verify(folder, source)
    return caught.value.faults


@pytest.fixture
def copy(planned, tmp_path):
    folder = Path(shutil.copytree(planned[1][0], tmp_path / "copy"))
    return folder, planned[2]


def test_a_layer_that_is_not_as_planned(copy):
    layer = "model.layers.0.self_attn.o_proj"
    for fields, said in (
        ({"bits": 2}, "planned 2 bits, group size 32, symmetric; the export has"),
        ({"bits": 16}, "planned 16 bits; the export has"),
        ({"bits": 8, "group_size": 64}, "planned 8 bits, group size 64"),
        ({"bits": 4, "sym": False}, "planned 4 bits, group size 32, asymmetric"),
    ):
        (fault,) = faults(
            *copy, lambda plan, f=fields: plan["layer_config"].update({layer: f})
        )
        assert fault.startswith(f"{layer}: {said}")


def test_experts_that_are_not_as_planned(copy):
    name = "model.layers.1.mlp.experts"
    found = faults(*copy, lambda p: p.update(layer_config={name: {"bits": 6}}))
    assert sum(fault.startswith(f"{name}.") for fault in found) == 3 * tiny.EXPERTS


def test_a_planned_layer_that_is_not_there(copy):
    def change(plan):
        plan["units"][0]["layers"].append("model.layers.9.mlp.up_proj")

    (fault,) = faults(*copy, change)
    assert fault == (
        "model.layers.9.mlp.up_proj: planned 4 bits, group size 32, symmetric; it is "
        "not there"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"format": "vsraq bit plan 0"},
        {"units": 3},
        {"default": {}},
        {"layer_config": {"(": {"bits": 8}}},
        {"layer_config": {"a": 3}},
    ],
    ids=str,
)
def test_a_broken_plan_is_a_fault(change, copy):
    (fault,) = faults(*copy, lambda plan: plan.update(change))
    assert fault.startswith(f"{PLAN_FILE}: no bit plan (")


def test_a_plan_that_is_no_json_or_of_another_model(copy):
    folder, source = copy
    (fault,) = faults(folder, source, lambda p: p.update(config_digest="sha256:0"))
    assert "it was made for a model with another config" in fault
    content = json.loads((folder / PLAN_FILE).read_text())
    content["tokens"] += 1
    (folder / PLAN_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="it was changed after it was written"):
        verify(folder, source)
    (folder / PLAN_FILE).write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="no bit plan"):
        verify(folder, source)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "deepseek_v3", "gpt_oss"])
def test_copies_of_a_config_have_one_digest(family, tmp_path):
    model = tiny.tiny_model(family)
    tiny.in_bfloat16(model).save_pretrained(tmp_path)
    again = type(model.config).from_pretrained(tmp_path)
    assert config_digest(again) == config_digest(model.config)
    again.hidden_size += 1
    assert config_digest(again) != config_digest(model.config)


def test_entries_are_looked_up_as_autoround_does():
    entries = {
        "model.layers.1.mlp.experts": {"bits": 8},
        "model.layers.2.mlp.shared_expert.": {"bits": 6},
        "model.layers.1.self_attn.(q_proj|k_proj|qkv_proj)": {"bits": 5},
        "model.layers.3.mlp.experts.*down_proj": {"bits": 3},
        "model.layers.1.self_attn.q_proj": {"bits": 2},  # patterns win
    }
    planned = PlannedLayers({"bits": 4, "sym": True}, entries, ())
    for layer, bits in {
        "model.layers.1.mlp.experts.7.up_proj": 8,
        "model.layers.11.mlp.experts.7.up_proj": 4,
        "model.layers.2.mlp.shared_expert.up_proj": 6,
        "model.layers.2.mlp.shared_expert_gate": 4,
        "model.layers.1.self_attn.q_proj": 5,
        "model.layers.1.self_attn.v_proj": 4,
        "model.layers.3.mlp.experts.0.down_proj": 3,
        "model.layers.3.mlp.experts.0.up_proj": 4,
    }.items():
        assert planned[layer] == {"bits": bits, "sym": True}, layer


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_clipped_weights_are_the_originals_at_every_width(bits, group):
    """AutoRound clips groups by some per cent: many steps of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 64, 4, group, generator=generator)
    share = 0.08 * torch.rand(2, 64, 4, 1, generator=generator)
    levels = 2 ** (bits - 1)
    scale = (1 - share) * weight.abs().amax(-1, keepdim=True) / levels
    shift = torch.rand(weight.shape, generator=generator) - 0.5
    number = (weight / scale + shift).round().clamp(-levels, levels - 1)
    sums = Sums.of(weight.flatten(-2), (number * scale).flatten(-2), 4)
    assert judge(sums, 1 / levels, one_scale=False).suspects() == []
    other = (number * scale).flatten(-2).roll(1, -1)
    sums = Sums.of(weight.flatten(-2), other, 4)
    assert judge(sums, 1 / levels, one_scale=False).suspects() == [0, 1]


def test_a_plan_is_read_as_it_was_written(planned, tmp_path):
    plan = planned[0]
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == plan


def edited(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    return json.dumps(content, indent=1).encode()


CHANGES = {
    "another choice": lambda c: c["units"][0].update(chosen="W3A16"),
    "no candidate": lambda c: c["units"][0].update(candidates={}),
    "no entries": lambda c: c.update(layer_config=None),
    "no damage": lambda c: c["units"][0]["candidates"]["W4A16"].update(kl=None),
    "no units": lambda c: c.update(units=[]),
    "no engine": lambda c: c.update(engine="vlm"),
    "no digest": lambda c: c.pop("digest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_that_was_changed_is_refused(planned, tmp_path, change):
    path = tmp_path / "plan.json"
    planned[0].save(path)
    path.write_bytes(edited(path, CHANGES[change]))
    with pytest.raises(ValueError, match=r"plan.json': no bit plan \("):
        BitPlan.load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10**5, b"", b"[]", b"3"])
def test_what_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan.json': no bit plan \("):
        BitPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("engine", "export_format"), [(None, "auto_round"), ("vllm", "llm_compressor")]
)
def test_float_layers_of_two_kinds_are_verified(tmp_path, engine, export_format):
    source = tiny.save("solar_open", tmp_path / "source")
    plan = make_plan(scheme="NVFP4", engine=engine, export_format=export_format)
    assert "MXFP8" in {unit.chosen for unit in plan.units}
    run = AutoRound(
        tiny.in_bfloat16(tiny.tiny_model("solar_open")),
        tiny.tiny_tokenizer(),
        scheme="NVFP4",
        dataset=tiny.calibration(),
        iters=1,
        layer_config=plan.layer_config,
        **tiny.RUN,
    )
    _, folder = run.quantize_and_save(str(tmp_path / "out"), format=export_format)
    plan.save(f"{folder}/{PLAN_FILE}")
    found = verify(folder, source)
    layers = sum(len(unit.layers) for unit in plan.units)
    assert found.planned_layers == layers
    if export_format == "llm_compressor":  # experts in NVFP4
        with pytest.raises(ValueError, match="transformers loads NVFP4 experts"):
            load_model(folder)
        return
    exported, loaded = load_model(folder), load_model(source)
    ids = tiny.calibration()[0][None]
    with torch.no_grad():
        q_logits, fp_logits = exported(ids).logits, loaded(ids).logits
    assert 0 < (q_logits - fp_logits).norm() / fp_logits.norm() < 0.5
