# SPDX-License-Identifier: Apache-2.0
"""Every kind of fault, planted into an export of every format, is found and named."""

import pytest
import torch
from safetensors.torch import save_file

import exports
from vsraq.checkpoint import Checkpoint, CheckpointError, verify
from vsraq.checkpoint.formats.format import some_outputs

# its fixtures are made once per process
pytestmark = pytest.mark.xdist_group("test_verify_faults")

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
OTHER = "model.layers.1.mlp.experts.5.up_proj"
LEVELS = (".qweight", ".weight_packed", ".weight")
SCALES = ("scales", "weight_scale")
INTEGERS = ("W2", "W3", "W4", "W8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exports.make(tmp_path_factory.mktemp("faults"), exports.RUNS)


every_format = pytest.mark.parametrize("name", exports.NAMES)


@every_format
def test_a_good_export_passes(name, made):
    folder, tuned, source = made[name]
    against_source, against_tuned = verify(folder, source), verify(folder, tuned)
    assert against_source.quantized_layers == against_tuned.compared_weights > 50
    expected = 4 if name.startswith("W4-mixed") else 1
    assert against_source.full_precision_layers == expected - 1
    # norms, embedding, head, and what is left in full precision
    assert against_source.full_precision_tensors == 6 + expected


@every_format
def test_some_outputs_of_a_layer_are_those_of_the_whole(name, made):
    """Large layers go through in pieces of their outputs."""
    with Checkpoint(made[name][0]) as export:
        for layer in (EXPERT, "model.layers.0.self_attn.k_proj"):
            scheme = export.schemes(layer)
            whole = export.dequantize(layer)
            layout = scheme.format.layout(scheme, *whole.shape)
            tensors = {suffix: export[f"{layer}.{suffix}"] for suffix in layout}
            outputs = len(whole)
            for start in range(0, outputs, 32):
                some = some_outputs(tensors, layout, start, start + 32, outputs)
                part = scheme.format.dequantize(some, scheme)
                assert torch.equal(part, whole[start : start + 32])


def levels_of(broken, layer):
    return next(layer + end for end in LEVELS if layer + end in broken.tensors)


def scales_of(broken):
    return [n for n in broken.tensors if n.endswith(SCALES)]


def drop(*names):
    def plant(broken):
        for name in names:
            del broken.tensors[name]

    return plant


def swap_experts(broken):
    for name in [n for n in broken.tensors if n.startswith(EXPERT)]:
        other = name.replace(EXPERT, OTHER)
        a, b = broken.tensors[name], broken.tensors[other]
        broken.tensors[name], broken.tensors[other] = b, a


def random_levels(broken):
    for layer in {n.rpartition(".")[0] for n in scales_of(broken)}:
        name = levels_of(broken, layer)
        broken.tensors[name] = exports.random_like(broken.tensors[name])


def scale_by(factor):
    def plant(broken):
        for name in scales_of(broken):
            scale = broken.tensors[name]
            if scale.dtype == torch.uint8:  # exponents
                shift = 7 if abs(factor) > 1 else 0
                broken.tensors[name] = scale + shift
            else:
                broken.tensors[name] = (scale.float() * factor).to(scale.dtype)

    return plant


def half_of(pick):
    def plant(broken):
        name = pick(broken)
        tensor = broken.tensors[name]
        dim = -1 if name.endswith(("qweight", "scales")) else 0
        broken.tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] // 2).clone()

    return plant


def nan_norm(broken):
    broken.tensors["model.norm.weight"][3] = torch.nan


def another_router_bias(broken):
    broken.tensors["model.layers.0.mlp.gate.e_score_correction_bias"].zero_()


def unnamed_tensor(broken):
    broken.tensors["model.layers.0.mlp.spare.weight"] = torch.zeros(2, 2)


FAULTS = {
    "final norm": (drop("model.norm.weight"), "model.norm.weight: missing"),
    "head": (drop("lm_head.weight"), "lm_head.weight: missing"),
    "embedding": (drop("model.embed_tokens.weight"), "embed_tokens.weight: missing"),
    "layer norm": (
        drop("model.layers.1.input_layernorm.weight"),
        "model.layers.1.input_layernorm.weight: missing",
    ),
    "NaN in a norm": (nan_norm, "model.norm.weight: not finite"),
    "router's bias": (another_router_bias, "e_score_correction_bias: differs"),
    "experts swapped": (swap_experts, f"{EXPERT}: "),
    "random levels": (random_levels, f"{EXPERT}: "),
    "scales x -100": (scale_by(-100), f"{EXPERT}: "),
    "half of the levels": (half_of(lambda b: levels_of(b, EXPERT)), f"{EXPERT}."),
    "half of the scales": (
        half_of(lambda b: next(n for n in scales_of(b) if n.startswith(EXPERT))),
        f"{EXPERT}.",
    ),
    "one more tensor": (unnamed_tensor, "spare.weight: belongs to nothing"),
}


def faults_of(broken, source):
    with pytest.raises(CheckpointError) as error:
        verify(broken.save(), source)
    return error.value.faults


@every_format
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(name, fault, made, tmp_path):
    folder, _, source = made[name]
    broken = exports.Broken(folder, tmp_path / "broken")
    plant, expected = FAULTS[fault]
    plant(broken)
    assert any(expected in found for found in faults_of(broken, source))


@pytest.mark.parametrize("name", ["FP8-llm_compressor", "INT8-llm_compressor"])
def test_scales_per_output_may_be_flat_in_some_layers(name, made, tmp_path):
    folder, tuned, source = made[name]
    broken = exports.Broken(folder, tmp_path / "flat")
    scale = f"{EXPERT}.weight_scale"
    broken.tensors[scale] = broken.tensors[scale].flatten()
    flat = broken.save()
    assert verify(flat, source).quantized_layers == 62
    assert verify(flat, tuned).compared_weights == 62


def test_a_weight_shape_that_is_a_number(made, tmp_path):
    folder, _, source = made["W4-llm_compressor"]
    broken = exports.Broken(folder, tmp_path / "broken")
    broken.tensors[f"{EXPERT}.weight_shape"] = torch.tensor(64)
    (fault,) = faults_of(broken, source)
    assert fault.startswith(f"{EXPERT}.weight_shape: shape ()")


# exponents know no tenth, and 2 bits shrink weights by about as much
@pytest.mark.parametrize(
    "name", [n for n in exports.NAMES if n[:2] not in ("W2", "MX")]
)
def test_scales_a_tenth_too_large(name, made, tmp_path):
    """What tells them apart is the slope."""
    folder, _, source = made[name]
    broken = exports.Broken(folder, tmp_path / "broken")
    scale_by(1.15 if name.startswith("NVFP4") else 1.1)(broken)
    assert faults_of(broken, source)


def weights_of(quantization):
    """What the config says of the weights, wherever it says so."""
    if "config_groups" in quantization:
        return [group["weights"] for group in quantization["config_groups"].values()]
    return [quantization]


CONFIG = {"bits": "num_bits", "group_size": "group_size", "sym": "symmetric"}


@pytest.mark.parametrize("name", [n for n in exports.NAMES if n.startswith(INTEGERS)])
@pytest.mark.parametrize("key", CONFIG)
def test_a_config_that_says_something_else(name, key, made, tmp_path):
    folder, _, source = made[name]
    broken = exports.Broken(folder, tmp_path / "broken")
    for said in weights_of(broken.quantization):
        own = key if key in said else CONFIG[key]
        other = {"bits": 2 if said[own] != 2 else 4, "group_size": 16}
        said[own] = not said[own] if key == "sym" else other[key]
        if key == "group_size" and name.startswith("W4-mixed"):
            said[own] = 64
    assert faults_of(broken, source)


# ── files and the index ───────────────────────────────────────────────────────


@pytest.fixture
def broken(made, tmp_path):
    return exports.Broken(made["W4-auto_round"][0], tmp_path / "broken")


@pytest.fixture
def source(made):
    return made["W4-auto_round"][2]


def split_expert(broken):
    """Move an expert into a file of its own."""
    own = {n: broken.tensors.pop(n) for n in list(broken.tensors) if EXPERT in n}
    save_file(own, broken.path / "second.safetensors", metadata={"format": "pt"})
    return own


def test_an_expert_in_a_file_that_the_index_does_not_name(broken, source):
    split_expert(broken)
    broken.set_index(dict.fromkeys(broken.tensors, "model.safetensors"))
    found = faults_of(broken, source)
    assert any(f.startswith("second.safetensors: ") for f in found)
    assert "model.layers.1: expert 3 misses up_proj" in found


def test_a_second_file_without_an_index(broken, source):
    split_expert(broken)
    found = faults_of(broken, source)
    assert any(f.startswith("second.safetensors: ") for f in found)


def test_an_index_that_lacks_an_expert(broken, source):
    owner = {n: "model.safetensors" for n in broken.tensors if EXPERT not in n}
    broken.set_index(owner)
    found = faults_of(broken, source)
    assert any(f.startswith(f"{EXPERT}.qweight: in model.safetensors") for f in found)
    assert "model.layers.1: expert 3 misses up_proj" in found


def test_an_index_that_names_what_is_not_there(broken, source):
    owner = dict.fromkeys([*broken.tensors, "ghost"], "model.safetensors")
    broken.set_index(owner)
    found = faults_of(broken, source)
    assert found == (
        "ghost: model.safetensors.index.json says model.safetensors, which lacks it",
    )


def test_a_good_index(broken, source):
    own = split_expert(broken)
    owner = dict.fromkeys(broken.tensors, "model.safetensors")
    broken.set_index(owner | dict.fromkeys(own, "second.safetensors"))
    assert verify(broken.save(), source).quantized_layers == 62


@pytest.mark.parametrize("size", [0, 5, 100, 50_000])
def test_a_truncated_file(size, broken, source):
    with broken.file.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        verify(broken.path, source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\x00", "[" * 100_000])
def test_a_file_that_is_no_json(name, text, broken, source):
    (broken.path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        verify(broken.path, source)


def test_a_truncated_reference(broken, made, tmp_path):
    other = exports.Broken(made["W4-auto_round"][2], tmp_path / "reference")
    with other.file.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        verify(broken.path, other.path)


# ── routers by their digests ──────────────────────────────────────────────────

ROUTER = "model.layers.0.mlp.gate.weight"


def with_record(broken, digests):
    broken.config["vsraq"] = {"realign_routers": True, "router_digests": digests}


def re_fitted(broken):
    from vsraq.checkpoint.moe import digest

    broken.tensors[ROUTER] *= 1.01
    return digest(broken.tensors[ROUTER])


def test_a_re_fitted_router_with_its_digest(broken, source):
    with_record(broken, {ROUTER: re_fitted(broken)})
    assert verify(broken.save(), source).realigned_routers == 1


def test_a_re_fitted_router_without_a_digest_of_its_own(broken, source):
    re_fitted(broken)
    with_record(broken, {"model.layers.1.mlp.gate.weight": "sha256:0"})
    found = faults_of(broken, source)
    assert any(f.startswith(f"{ROUTER}: differs") for f in found)


def test_a_router_that_was_put_back(broken, source):
    """Equal to the original, but the record says that it was re-fitted."""
    original = broken.tensors[ROUTER].clone()
    digest = re_fitted(broken)
    broken.tensors[ROUTER] = original
    with_record(broken, {ROUTER: digest})
    (fault,) = faults_of(broken, source)
    assert fault.startswith(f"{ROUTER}: not the router that was re-fitted")


# ── our decoders against a library's ──────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["W4-llm_compressor", "W4-asym-ct-llm_compressor", "W4-mixed-llm_compressor"],
)
def test_integers_as_compressed_tensors_reads_them(name, made):
    from compressed_tensors.compressors.pack_quantized.helpers import (
        unpack_from_int32,
    )

    with Checkpoint(made[name][0]) as export:
        for layer in (EXPERT, "model.layers.0.self_attn.q_proj"):
            scheme = export.schemes(layer)
            shape = torch.Size(export[f"{layer}.weight_shape"].tolist())
            packed = export[f"{layer}.weight_packed"]
            levels = unpack_from_int32(packed, scheme.bits, shape).float()
            scale = export[f"{layer}.weight_scale"].float()
            if not scheme.sym:
                zeros = unpack_from_int32(
                    export[f"{layer}.weight_zero_point"],
                    scheme.bits,
                    torch.Size(scale.shape),
                    packed_dim=0,
                )
                levels -= zeros.float().repeat_interleave(scheme.group_size, 1)
            expected = levels * scale.repeat_interleave(scheme.group_size, 1)
            assert torch.equal(export.dequantize(layer), expected)
