# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from auto_round.data_type.nvfp import ref_nvfp4_quant
from safetensors.torch import load_file, save_file

import tiny
from vsraq import VSRAQConfig
from vsraq.checkpoint import Checkpoint, CheckpointError, load_model, verify
from vsraq.cli import main

# its fixtures are made once per process
pytestmark = pytest.mark.xdist_group("test_checkpoint")

LAYER = "model.layers.0"
EXPERT = f"{LAYER}.mlp.experts.3.up_proj"
ATTENTION = f"{LAYER}.self_attn.q_proj"
ROUTER = f"{LAYER}.mlp.gate"
LAYERS = 2 * (4 + 3 * tiny.EXPERTS + 3)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Name -> (folder, tuned model, folder of the original), from two real runs."""
    from auto_round import AutoRound

    root = tmp_path_factory.mktemp("exports")
    source = tiny.save("solar_open", root / "source")
    found = {}
    for scheme, formats in (
        ("W4A16", "auto_round"),
        ("W3A16", "auto_round"),
        ("NVFP4", "auto_round,llm_compressor"),
    ):
        autoround = AutoRound(
            tiny.in_bfloat16(tiny.tiny_model("solar_open")),
            tiny.tiny_tokenizer(),
            scheme=scheme,
            alg_configs=VSRAQConfig(iters=3, router_weight=1.0),
            dataset=tiny.calibration(),
            **tiny.RUN,
            # an int scheme's group of 128 would be wider than these layers
            **({} if scheme == "NVFP4" else {"group_size": 32}),
        )
        tuned, _ = autoround.quantize()
        _, saved = autoround.save_quantized(
            str(root / scheme), format=formats, inplace=False, return_folders=True
        )
        saved = [saved] if isinstance(saved, str) else saved
        for name, folder in zip(formats.split(","), saved, strict=True):
            found[f"{scheme}-{name}"] = (Path(folder), tuned, source)
    return found


NAMES = ["W4A16-auto_round", "W3A16-auto_round"]
NAMES += ["NVFP4-auto_round", "NVFP4-llm_compressor"]
every_export = pytest.mark.parametrize("name", NAMES)


@every_export
def test_a_good_export_holds_the_tuned_weights_bit_for_bit(name, exports):
    folder, tuned, _ = exports[name]
    result = verify(folder, tuned)
    assert result.kind == ("nvfp4" if name.startswith("NVFP4") else "int")
    assert result.quantized_layers == result.compared_weights == LAYERS
    assert (result.routers, result.experts) == (2, 2 * tiny.EXPERTS)


@every_export
def test_a_full_precision_reference_in_memory_and_on_disk(name, exports):
    folder, _, source = exports[name]
    from_disk = verify(folder, source)
    assert from_disk.compared_weights == 0
    assert from_disk.quantized_layers == LAYERS
    in_memory = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    assert verify(folder, in_memory) == from_disk


def planted(exports, name, tmp_path, edit, *, on_disk=False):
    folder, tuned, source = exports[name]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    edit(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        verify(broken, source if on_disk else tuned)
    return error.value.faults


def drop(*starts):
    def edit(tensors):
        for name in [n for n in tensors if n.startswith(starts)]:
            del tensors[name]

    return edit


def replace(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name].clone())

    return edit


def first_to(value):
    def change(tensor):
        numbers = tensor.float()
        numbers.view(-1)[0] = value
        return numbers.to(tensor.dtype)

    return change


def unquantize(tensors):
    drop(f"{EXPERT}.")(tensors)
    tensors[f"{EXPERT}.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)


both_references = pytest.mark.parametrize("on_disk", [False, True])


@every_export
@both_references
def test_a_projection_that_every_expert_misses(name, on_disk, exports, tmp_path):
    def edit(tensors):
        for tensor in [n for n in tensors if ".experts." in n and ".down_proj." in n]:
            del tensors[tensor]

    faults = planted(exports, name, tmp_path, edit, on_disk=on_disk)
    assert f"{LAYER}: expert 0 misses down_proj" in faults


@every_export
@both_references
def test_a_missing_expert(name, on_disk, exports, tmp_path):
    edit = drop(f"{LAYER}.mlp.experts.3.")
    faults = planted(exports, name, tmp_path, edit, on_disk=on_disk)
    assert f"{LAYER}: expert 3 misses down_proj, gate_proj, up_proj" in faults


@every_export
@both_references
def test_a_missing_layer(name, on_disk, exports, tmp_path):
    faults = planted(exports, name, tmp_path, drop(f"{ATTENTION}."), on_disk=on_disk)
    assert faults == (f"{ATTENTION}: neither a quantized nor a plain weight is there",)


@every_export
def test_a_layer_left_in_full_precision(name, exports, tmp_path):
    faults = planted(exports, name, tmp_path, unquantize)
    assert f"{EXPERT}: expected quantized, but stored in full precision" in faults


@every_export
def test_a_missing_router(name, exports, tmp_path):
    faults = planted(exports, name, tmp_path, drop(f"{ROUTER}."))
    assert set(faults) == {
        f"{ROUTER}.weight: missing",
        f"{ROUTER}.e_score_correction_bias: missing",
    }


@every_export
def test_a_changed_router(name, exports, tmp_path):
    for tensor in ("weight", "e_score_correction_bias"):
        edit = replace(f"{ROUTER}.{tensor}", first_to(7.0))
        faults = planted(exports, name, tmp_path / tensor, edit)
        (fault,) = faults
        assert fault.startswith(f"{ROUTER}.{tensor}: differs from the reference's")


@every_export
def test_a_router_rounded_to_bfloat16(name, exports, tmp_path):
    edit = replace(f"{ROUTER}.e_score_correction_bias", lambda t: t.bfloat16())
    (fault,) = planted(exports, name, tmp_path, edit, on_disk=True)
    assert "(torch.bfloat16 here, torch.float32 there)" in fault


@every_export
def test_a_router_in_low_precision(name, exports, tmp_path):
    edit = replace(f"{ROUTER}.weight", lambda t: t.to(torch.float8_e4m3fn))
    (fault,) = planted(exports, name, tmp_path, edit)
    assert "float8_e4m3fn is not full precision" in fault


def test_a_quantized_router(exports, tmp_path):
    def edit(tensors):
        for suffix in ("qweight", "qzeros", "scales"):
            tensors[f"{ROUTER}.{suffix}"] = tensors[f"{ATTENTION}.{suffix}"].clone()

    faults = planted(exports, "W4A16-auto_round", tmp_path, edit)
    assert f"{ROUTER}: the router is quantized" in faults


SCALES = [("W4A16-auto_round", f"{EXPERT}.scales")]
SCALES += [
    (name, f"{EXPERT}.{scale}")
    for name in ("NVFP4-auto_round", "NVFP4-llm_compressor")
    for scale in ("weight_scale", "weight_global_scale", "input_global_scale")
]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_scales_that_are_zero_not_finite_or_missing(name, scale, exports, tmp_path):
    faults = planted(exports, name, tmp_path / "z", replace(scale, first_to(0.0)))
    assert any(f.startswith(f"{scale}: 1 of ") and "zero" in f for f in faults)
    faults = planted(exports, name, tmp_path / "n", replace(scale, first_to(torch.nan)))
    assert f"{scale}: has a non-finite scale" in faults
    faults = planted(exports, name, tmp_path / "m", drop(scale))
    assert f"{scale}: missing" in faults


@every_export
def test_wrong_levels(name, exports, tmp_path):
    packed = "weight_packed" if name.startswith("NVFP4") else "qweight"
    edit = replace(f"{EXPERT}.{packed}", lambda t: t ^ torch.ones_like(t))
    (fault,) = planted(exports, name, tmp_path, edit)
    assert f"{EXPERT}: dequantized weight differs from the tuned one" in fault


@every_export
def test_one_scale_off_by_an_eighth(name, exports, tmp_path):
    scale = "weight_scale" if name.startswith("NVFP4") else "scales"

    def change(tensor):
        return (tensor.float() * 1.125).to(tensor.dtype)

    (fault,) = planted(exports, name, tmp_path, replace(f"{EXPERT}.{scale}", change))
    assert fault.startswith(f"{EXPERT}: dequantized weight differs")


def swap_experts(tensors):
    for name in [n for n in tensors if ".experts.3." in n]:
        other = name.replace(".experts.3.", ".experts.5.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def random_levels(tensors):
    for name in [n for n in tensors if n.endswith((".qweight", ".weight_packed"))]:
        info = torch.iinfo(tensors[name].dtype)
        tensors[name] = torch.randint(
            info.min, info.max, tensors[name].shape, dtype=tensors[name].dtype
        )


def half_of_the_outputs(tensors):
    for name in [n for n in tensors if n.startswith(f"{EXPERT}.")]:
        axis = 0 if name.endswith(("weight_packed", "weight_scale")) else -1
        if tensors[name].ndim == 2:
            half = tensors[name].chunk(2, dim=axis)[0]
            tensors[name] = half.contiguous()


def scales_times(factor):
    def edit(tensors):
        for name in [n for n in tensors if n.endswith(("scales", "weight_scale"))]:
            scaled = tensors[name].float() * factor
            tensors[name] = scaled.to(tensors[name].dtype)

    return edit


NORM = f"{LAYER}.input_layernorm.weight"
# what stands in no quantized layer and no router, and what does not fit the original
AGAINST_THE_ORIGINAL = {
    "final norm": (drop("model.norm."), "model.norm.weight"),
    "output head": (drop("lm_head."), "lm_head.weight"),
    "embedding": (drop("model.embed_tokens."), "model.embed_tokens.weight"),
    "layer norm": (drop(NORM), NORM),
    "NaN in a norm": (replace(NORM, lambda t: t * torch.nan), NORM),
    "another norm": (replace(NORM, lambda t: t * 1.5), NORM),
    "a tensor too many": (
        lambda tensors: tensors.update(surplus=torch.ones(2)),
        "surplus",
    ),
    "two experts swapped": (swap_experts, f"{LAYER}.mlp.experts.3."),
    "random levels": (random_levels, EXPERT),
    "scales times 2": (scales_times(2.0), EXPERT),
    "half of the outputs": (half_of_the_outputs, EXPERT),
}


@every_export
@pytest.mark.parametrize("fault", AGAINST_THE_ORIGINAL)
def test_faults_that_the_original_shows(name, fault, exports, tmp_path):
    """Nobody has the tuned model; the original alone must show them."""
    edit, where = AGAINST_THE_ORIGINAL[fault]
    faults = planted(exports, name, tmp_path, edit, on_disk=True)
    assert any(line.startswith(where) for line in faults), faults[:3]


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(
    "change", [{"bits": 2}, {"group_size": 16}, {"sym": False}], ids=str
)
def test_a_config_that_lies(name, change, exports, tmp_path):
    folder, _, source = exports[name]
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] |= change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        verify(broken, source)


def test_files_count_as_the_index_names_them(exports, tmp_path):
    folder, _, source = exports["W4A16-auto_round"]
    stray = shutil.copytree(folder, tmp_path / "stray")
    save_file({"x": torch.ones(1)}, stray / "model-shard-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-shard-00002\.safetensors"):
        verify(stray, source)
    cut = shutil.copytree(folder, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        verify(cut, source)


def test_the_error_shows_the_first_faults_and_counts_the_rest(exports, tmp_path):
    folder, tuned, _ = exports["W4A16-auto_round"]
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    drop(f"{LAYER}.")(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"has \d+ fault\(s\)(.|\n)*more"
    ) as error:
        verify(broken, tuned)
    assert len(error.value.faults) > 20


def in_full_precision(source, layer):
    return load_file(source / "model.safetensors")[f"{layer}.weight"]


def test_a_layer_that_the_export_declares_full_precision(exports, tmp_path):
    folder, _, source = exports["W4A16-auto_round"]
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    tensors = load_file(mixed / "model.safetensors")
    drop(f"{ATTENTION}.")(tensors)
    tensors[f"{ATTENTION}.weight"] = in_full_precision(source, ATTENTION)
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((mixed / "config.json").read_text())
    config["quantization_config"]["extra_config"][ATTENTION] = {"bits": 16}
    (mixed / "config.json").write_text(json.dumps(config))
    result = verify(mixed, source)
    assert result.full_precision_layers == 1
    assert result.quantized_layers == LAYERS - 1


def test_a_group_that_does_not_divide_its_layer(exports, tmp_path):
    folder, tuned, _ = exports["W4A16-auto_round"]
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"group_size 128 does not divide its 32"):
        verify(broken, tuned)


def test_a_missing_shard(exports, tmp_path):
    folder, tuned, _ = exports["W4A16-auto_round"]
    broken = shutil.copytree(folder, tmp_path / "broken")
    index = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names second.safetensors, not there"):
        verify(broken, tuned)


def test_a_reference_that_cannot_be_one(exports, tmp_path):
    folder, _, _ = exports["W4A16-auto_round"]
    with pytest.raises(ValueError, match="no MoE router"):
        verify(folder, tiny.tiny_model("llama"))
    with pytest.raises(FileNotFoundError, match="neither a folder nor a model in"):
        verify(folder, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (
            "packing_format",
            "auto_round:auto_awq",
            CheckpointError,
            r"qweight: shape .* ask for",
        ),
        (
            "data_type",
            "mx_int",
            ValueError,
            r"data_type='mx_int'.*allowed are exports",
        ),
    ],
)
def test_a_format_other_than_the_declared_one(
    key, value, error, message, exports, tmp_path
):
    folder, tuned, _ = exports["W4A16-auto_round"]
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"][key] = value
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        verify(other, tuned)


def test_what_is_not_an_export(exports, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json there"):
        verify(tmp_path, tmp_path)
    source = exports["W4A16-auto_round"][2]
    with pytest.raises(ValueError, match="has no quantization_config"):
        verify(source, source)


def test_dequantized_weights_are_near_the_original(exports):
    original = tiny.tiny_model("solar_open").state_dict()[f"{ATTENTION}.weight"]
    errors = {}
    for name in NAMES:
        with Checkpoint(exports[name][0]) as export:
            weight = export.dequantize(ATTENTION)
        errors[name] = ((weight - original).norm() / original.norm()).item()
    assert errors["W4A16-auto_round"] < 0.12
    assert errors["NVFP4-auto_round"] < 0.15
    assert errors["W4A16-auto_round"] < errors["W3A16-auto_round"] < 0.3


def logits(model):
    with torch.no_grad():
        return model(torch.cat(tiny.calibration(samples=2))).logits


@pytest.mark.parametrize("name", ["W4A16-auto_round", "NVFP4-auto_round"])
def test_a_loaded_layer_computes_with_the_dequantized_weight(name, exports):
    folder, _, _ = exports[name]
    layer = load_model(folder, dtype=torch.float32).get_submodule(ATTENTION)
    inputs = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    with Checkpoint(folder) as export:
        weight = export.dequantize(ATTENTION)
        if name.startswith("NVFP4"):  # activations as its arithmetic rounds them
            scale = export[f"{ATTENTION}.input_global_scale"]
            rounded, _ = ref_nvfp4_quant(inputs.view(-1, 16), scale)
            inputs_seen = rounded.view_as(inputs)
        else:
            inputs_seen = inputs
    with torch.no_grad():
        loaded = layer(inputs)
    expected = inputs_seen @ weight.t()
    assert ((loaded - expected).norm() / expected.norm()).item() < 0.005


def test_loading_an_export_does_not_break_later_models(exports):
    """AutoRound's loader switches the fusing of experts off for the process."""
    folder, _, source = exports["W4A16-auto_round"]
    before = logits(load_model(source, dtype=torch.float32))
    load_model(folder)
    assert torch.equal(logits(load_model(source, dtype=torch.float32)), before)


def test_the_format_that_transformers_loads_wrongly_is_refused(exports):
    folder, _, _ = exports["NVFP4-llm_compressor"]
    with pytest.raises(ValueError, match=r"#48371.*serve this one with vLLM"):
        load_model(folder)


def test_transformers_still_loads_that_format_wrongly(exports):
    """The reason of the refusal; when this fails, drop the refusal."""
    from transformers import AutoModelForCausalLM

    folder, _, _ = exports["NVFP4-llm_compressor"]
    wrong = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with Checkpoint(folder) as export:
        right = export.dequantize(EXPERT)
    experts = wrong.get_submodule(f"{LAYER}.mlp.experts")
    loaded = experts.gate_up_proj[3].chunk(2, dim=0)[1]
    ratio = (loaded.float().norm() / right.norm()).item()
    assert not 0.5 < ratio < 2


@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_line_shows_progress_on_a_terminal(
    terminal, exports, capsys, monkeypatch
):
    folder, _, source = exports["W4A16-auto_round"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["verify", str(folder), "--reference", str(source)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Verification(")
    assert ("verify: 100%" in captured.err) == terminal
