# SPDX-License-Identifier: Apache-2.0
"""Models that are published in FP8 with a scale per block, as DeepSeek-V3 is."""

import json

import pytest
import torch
from auto_round import AutoRound, AutoScheme
from safetensors.torch import load_file, save_file

import tiny
from prepared import arguments, prepare
from vsraq import VSRAQConfig
from vsraq.autoround import plan_bits
from vsraq.bits.sizes import plain_bytes, unit_bytes
from vsraq.checkpoint import verify
from vsraq.recipe import inspect, parse_recipe

BLOCK = 32
FP8 = torch.float8_e4m3fn
L0 = "model.layers.0"


def to_fp8(weight):
    """Numbers and a scale per block."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(FP8).max
    numbers = blocks / scales[:, None, :, None]
    return numbers.reshape(rows, columns).to(FP8), scales


def save(family, folder):
    """A checkpoint in FP8: all projections, but no router."""
    path = tiny.save(family, folder) / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "fmt": "e4m3",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def save_scaled(family, folder):
    """The same weights in bfloat16."""
    path = tiny.save(family, folder) / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            numbers, scales = to_fp8(tensor)
            each = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            tensors[name] = (numbers.float() * each).to(tensor.dtype)
            assert not torch.equal(tensors[name], tensor)
    save_file(tensors, path, {"format": "pt"})
    return str(folder)


def plan_of(model):
    return plan_bits(
        model,
        tiny.calibration(),
        "NVFP4",
        options=["BF16"],
        budget="40%",
        format="llm_compressor",
        engine=None,
        tokens=64,
        **arguments(),
    )


@pytest.mark.usefixtures("bfloat16")
def test_numbers_without_scales_are_refused(quantize, tmp_path, monkeypatch):
    """AutoRound would stream them; loaded as a whole, the model runs and verifies."""
    source = save("solar_open", tmp_path / "model")
    message = "stored in FP8, .* without their scales; set AR_DISABLE_META_LOAD=1"
    with pytest.raises(ValueError, match=message):
        quantize(source, VSRAQConfig(iters=1))
    with pytest.raises(ValueError, match=message):
        plan_of(source)
    with pytest.raises(ValueError, match=message):
        quantize(
            source,
            VSRAQConfig(iters=1),
            AutoScheme(avg_bits=5, options="W4A16,W8A16", method="vsraq"),
            dataset=tiny.save_text(tmp_path / "text.jsonl"),
        )
    recipe = parse_recipe({"model": source, "scheme": "W4A16", "output": "out"})
    with pytest.raises(ValueError, match=message):
        inspect(recipe)
    monkeypatch.setenv("AR_DISABLE_META_LOAD", "1")
    run = AutoRound(
        source,
        alg_configs=VSRAQConfig(iters=1),
        dataset=tiny.calibration(),
        **arguments(group_size=BLOCK),
    )
    _, folder = run.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    inspect(recipe)
    assert verify(folder, source).quantized_layers == 2 * (4 + 3 * 9)


@pytest.mark.usefixtures("bfloat16")
def test_a_plan_is_that_of_the_scaled_weights(tmp_path, monkeypatch):
    # what AutoRound has loaded before in this process decides whether it streams
    monkeypatch.setenv("AR_DISABLE_META_LOAD", "1")
    scaled = save_scaled("qwen3_moe", tmp_path / "scaled")
    # both before AutoRound puts another class in the place of the MoE layer's
    fp8 = save("qwen3_moe", tmp_path / "fp8")
    expected, actual = plan_of(scaled), plan_of(fp8)
    assert actual.bytes == expected.bytes > actual.uniform.bytes
    assert actual.units == expected.units


def test_layers_that_stay_in_fp8_count_as_they_are_exported():
    """On GPUs that compute in FP8, transformers does not scale them when it loads."""
    layers = [f"{L0}.self_attn.o_proj", f"{L0}.self_attn.q_proj"]
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))

    def sizes():
        found = prepare(model, "NVFP4", "llm_compressor")
        schemes = {
            layers[0]: found.all_layers[layers[0]],
            layers[1]: {**found.all_layers[layers[1]], "bits": 16},
        }
        weights = unit_bytes(found.module, schemes, "llm_compressor", found.widths)
        return plain_bytes(found.module, schemes, found.widths), weights

    expected = sizes()
    for name in layers:
        layer = model.get_submodule(name)
        numbers, scales = to_fp8(layer.weight.detach())
        layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
        layer.weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)
        layer.block_size = (BLOCK, BLOCK)
    assert sizes() == expected
