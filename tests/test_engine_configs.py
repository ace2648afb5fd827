# SPDX-License-Identifier: Apache-2.0
"""The config.json of real exports, read by the rules of serving engines.

`vsraq.bits.engines` names the files that the rules were read in. Here they meet what an
export says of itself, and its tensors. No engine is run.
"""

import re
from contextlib import suppress

import pytest

import exports
from vsraq.bits.engines import ENGINES, FUSED
from vsraq.checkpoint import Checkpoint

# What both engines' parsers of AutoRound's own format allow.
# vllm/model_executor/layers/quantization/inc/inc.py
# sglang/srt/layers/quantization/auto_round.py
PACKING = {"auto_round:auto_gptq", "auto_round:auto_awq"}
BACKENDS = {"auto", "gptq", "gptq:marlin", "awq", "awq:marlin", "marlin"}
MATCHES = {"vllm": re.search, "sglang": re.fullmatch}
SPECIAL = set(r"*+?^$()[]{}|" + "\\")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of an export -> its quantization config, and its layers."""
    found = {}
    runs = exports.make(tmp_path_factory.mktemp("exports"), ["W4", "NVFP4"])
    for name, (folder, _, _) in runs.items():
        with Checkpoint(folder) as checkpoint:
            config = checkpoint.config["quantization_config"]
            found[name] = config, layers_of(checkpoint)
    return found


def layers_of(names):
    """Name -> the last parts of its tensors' names, of layers of matrices."""
    found = {}
    for name in names:
        module, _, part = name.rpartition(".")
        found.setdefault(module, set()).add(part)
    weights = {"weight", "qweight", "weight_packed"}
    others = re.compile(r"norm|embed_tokens")
    return {n: p for n, p in found.items() if p & weights and not others.search(n)}


def said(quantization, name, engine):
    """Bits that an engine gives a layer: exact names, then patterns, then blocks."""
    entries = quantization.get("extra_config") or {}
    if name in entries:
        return entries[name].get("bits", 16 if ENGINES[engine].needs_other_bits else 4)
    for pattern, entry in entries.items():
        if SPECIAL & set(pattern):
            with suppress(re.error):
                if MATCHES[engine](pattern, name):
                    return entry.get("bits", quantization["bits"])
    blocks = quantization.get("block_name_to_quantize")
    names = blocks.split(",") if isinstance(blocks, str) else blocks
    inside = name != "lm_head" if not names else name.startswith(tuple(names))
    return quantization["bits"] if inside else 16


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_w4a16_is_what_engines_parse(engine, made):
    quantization, layers = made["W4-auto_round"]
    assert quantization["quant_method"] in ("auto-round", "auto_round")
    assert quantization["packing_format"] in PACKING
    assert quantization.get("backend", "auto") in BACKENDS
    assert quantization["data_type"] == "int"
    assert isinstance(quantization["group_size"], int)
    assert ENGINES[engine].why_not(quantization, "auto_round") == ""
    for name, parts in layers.items():
        expected = 4 if "qweight" in parts else 16
        # routers are no linear layers of a quantized kind in any engine
        if not name.endswith("mlp.gate"):
            assert said(quantization, name, engine) == expected, name
    same_in_fused(layers, "qweight")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_nvfp4_is_what_engines_parse(engine, made):
    """vllm/.../compressed_tensors/utils.py; sglang has the same file."""
    quantization, layers = made["NVFP4-llm_compressor"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "nvfp4-pack-quantized"
    for group in quantization["config_groups"].values():
        assert group["targets"] == ["Linear"]
        for part in ("weights", "input_activations"):
            scheme = group[part]
            assert (scheme["num_bits"], scheme["type"]) == (4, "float")
            assert (scheme["group_size"], scheme["symmetric"]) == (16, True)
            assert scheme["strategy"] == "tensor_group"
    fields = {"data_type": "nv_fp", "bits": 4, "group_size": 16, "sym": True}
    assert ENGINES[engine].why_not(fields, "llm_compressor") == ""
    assert ENGINES["vllm"].why_not(fields, "auto_round")
    for name, parts in layers.items():
        ignored = any(
            re.match(entry[3:], name) if entry.startswith("re:") else entry == name
            for entry in quantization["ignore"]
        )
        assert ignored == ("weight_packed" not in parts), name
        if not ignored:
            assert parts >= {"weight_scale", "weight_global_scale"}
            assert "input_global_scale" in parts
    same_in_fused(layers, "weight_packed")


def same_in_fused(layers, packed):
    """All layers that engines load as one are quantized, or none; experts, too."""
    fused = {}
    for name, parts in layers.items():
        parent, _, last = name.rpartition(".")
        whole = next((w for w, members in FUSED.items() if last in members), last)
        key = re.sub(r"experts\.\d+", "experts", f"{parent}.{whole}")
        fused.setdefault(key, set()).add(packed in parts)
    assert [key for key, found in fused.items() if len(found) > 1] == []
    assert any(found == {True} for found in fused.values())
