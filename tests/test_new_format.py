# SPDX-License-Identifier: Apache-2.0
"""A new export format is a class and a row of the table, as CONTRIBUTING says.

compressed-tensors knows MXFP6, which AutoRound does not export: it writes the
checkpoint, and transformers loads it.
"""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file

import exports
import tiny
from vsraq.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_formats,
    formats,
    load_model,
    verify,
)
from vsraq.checkpoint.formats.decode import e8m0, scale_blocks, unpack_last
from vsraq.checkpoint.formats.format import UINT8, Format, Scheme, TensorSpec

PACKING = "mxfp6-pack-quantized"
ATTENTION = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
POSITIVE = [m / 8 for m in range(8)]
POSITIVE += [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
E2M3 = torch.tensor(POSITIVE + [-value for value in POSITIVE])


class MXFP6(Format):
    """E2M3 values in blocks of 32 with powers of two as scales."""

    kind = "mxfp6"
    exports = ("mxfp6",)
    compressed_tensors = (PACKING, "float")
    suffixes = frozenset({"weight_packed", "weight_scale"})

    def layout(self, scheme, out_features, in_features):
        groups = scheme.groups(in_features)
        packed = (out_features, in_features * 6 // 8)
        return {
            "weight_packed": TensorSpec(packed, UINT8, -2),
            "weight_scale": TensorSpec(
                (out_features, groups), UINT8, -2, is_scale=True
            ),
        }

    def dequantize(self, tensors, scheme):
        values = E2M3[unpack_last(tensors["weight_packed"], 6).int()]
        return scale_blocks(values, e8m0(tensors["weight_scale"]))

    def step(self, scheme):
        return 1 / 16  # 1/4 between 2 and 4, the smallest largest value of a group


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of an export and of its original."""
    root = tmp_path_factory.mktemp("new_format")
    source = tiny.save("solar_open", root / "source")
    scheme = preset_name_to_scheme("MXFP6A16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(PACKING)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        largest = tensor.float().unflatten(-1, (-1, 32)).abs().amax(-1)
        state = {"weight": tensor, "weight_scale": largest.log2().floor().sub(2).exp2()}
        layer = name.removesuffix("weight")
        for suffix, stored in compressor.compress(state, scheme).items():
            tensors[layer + suffix] = stored
    export = root / "export"
    export.mkdir()
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=PACKING,
        quantization_status="compressed",
        ignore=["lm_head", r"re:.*\.mlp\.gate$"],
    ).model_dump(mode="json")
    (export / "config.json").write_text(json.dumps(config))
    return export, source


@pytest.fixture
def new_row(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, MXFP6()))


def test_a_format_without_a_row_is_refused(made):
    with pytest.raises(ValueError, match=rf"format='{PACKING}'.* allowed are"):
        verify(*made)
    with pytest.raises(ValueError, match="'mxfp6' cannot be verified"):
        check_formats("mxfp6")


def test_a_format_with_a_row_is_verified_and_loaded(made, new_row):
    check_formats("mxfp6")
    result = verify(*made)
    layers = 2 * (4 + 3 * tiny.EXPERTS + 3)
    assert (result.kind, result.quantized_layers) == ("mxfp6", layers)
    model = load_model(made[0], dtype=torch.bfloat16)
    experts = model.get_submodule(EXPERT.rpartition(".3.")[0])
    with Checkpoint(made[0]) as export, torch.no_grad():
        model(torch.cat(tiny.calibration(samples=2)))  # what is packed is unpacked here
        attention = model.get_submodule(ATTENTION).weight
        assert torch.equal(attention.float(), export.dequantize(ATTENTION))
        up_proj = experts.gate_up_proj[3].chunk(2)[1]
        assert torch.equal(up_proj.float(), export.dequantize(EXPERT))


FAULTS = {
    "another scale": ("weight_scale", lambda t: t + 1, "not the original's"),
    "a NaN scale": ("weight_scale", lambda t: t.fill_(255), "non-finite scale"),
    "half of it": ("weight_packed", lambda t: t[:16].clone(), r"shape \(16, "),
    "a dtype": ("weight_packed", lambda t: t.short(), "dtype I16, allowed is U8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_format_with_a_row_are_named(fault, made, new_row, tmp_path):
    export, source = made
    broken = exports.Broken(export, tmp_path / "broken")
    suffix, change, expected = FAULTS[fault]
    name = f"{EXPERT}.{suffix}"
    broken.tensors[name] = change(broken.tensors[name])
    with pytest.raises(CheckpointError, match=expected) as error:
        verify(broken.save(), source)
    assert all(EXPERT in fault for fault in error.value.faults)


@pytest.mark.parametrize("form", formats.FORMATS, ids=lambda form: type(form).__name__)
def test_every_row_says_what_it_may_hold(form):
    """A tensor that `suffixes` does not name would belong to nothing."""
    for sym in (True, False):
        for static_inputs in (True, False):
            layout = form.layout(Scheme(form, 8, 32, sym, static_inputs), 64, 64)
            assert layout.keys() <= form.suffixes | {"weight"}
            assert form.suffixes & layout.keys()
    assert form.optional <= form.suffixes
