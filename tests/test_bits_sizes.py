# SPDX-License-Identifier: Apache-2.0
"""Bytes of a plan against the files of real exports, and what these are worth."""

from pathlib import Path

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from safetensors import safe_open

import tiny
from prepared import UNQUANTIZED, arguments, prepare
from vsraq.autoround.planning import scheme_fields
from vsraq.bits.sizes import layer_bytes, plain_bytes, unit_bytes
from vsraq.checkpoint import load_model, verify

L0, L1 = "model.layers.0", "model.layers.1"
# every number of bits, some layers in full precision
INT = {
    f"{L0}.self_attn.q_proj": {"bits": 8},
    f"{L0}.self_attn.k_proj": {"bits": 8},
    f"{L0}.self_attn.v_proj": {"bits": 8},
    f"{L0}.self_attn.o_proj": {"bits": 5},
    f"{L1}.self_attn.o_proj": {"bits": 6},
    f"{L0}.mlp.experts": {"bits": 3},
    f"{L1}.mlp.experts": {"bits": 2, "group_size": 16},
    f"{L0}.mlp.shared_experts": {"bits": 16},
}
HEAD = {"lm_head": {"bits": 8}}
FLOAT = {
    f"{L0}.self_attn.o_proj": UNQUANTIZED,
    f"{L0}.mlp.experts": UNQUANTIZED,
}
MX = FLOAT | {
    f"{L1}.mlp.experts": {"bits": 8, "act_bits": 8},
    f"{L1}.self_attn.o_proj": {"bits": 8, "act_bits": 8},
}
FOUR_BITS = {name: f for name, f in INT.items() if f["bits"] in (3, 16)}
# name -> scheme, format, exceptions, further arguments
CASES = {
    "int": ("W4A16", "auto_round", INT | HEAD, {"group_size": 32}),
    "int-compressed": ("W4A16", "llm_compressor", INT | HEAD, {"group_size": 32}),
    "int-gptq": ("W4A16", "auto_gptq", FOUR_BITS | HEAD, {"group_size": 32}),
    "int-asymmetric": (
        "W4A16",
        "auto_round",
        FOUR_BITS,
        {"group_size": 32, "sym": False},
    ),
    "nvfp4": ("NVFP4", "auto_round", FLOAT, {}),
    "nvfp4-compressed": ("NVFP4", "llm_compressor", FLOAT, {}),
    "mxfp": ("MXFP4", "auto_round", MX, {}),
    "mxfp-compressed": ("MXFP4", "llm_compressor", MX, {}),
}
MORE = {
    # AutoRound cannot stream a model whose output projection is quantized
    "int-streamed": ("W4A16", "auto_round", INT, {"group_size": 32}),
    "awq": ("W4A16", "auto_awq", {}, {"group_size": 32}),
    "int-compressed-asymmetric": (
        "W4A16",
        "llm_compressor",
        {f"{L0}.mlp.experts": {"bits": 3}},
        {"group_size": 32, "sym": False},
    ),
    "int8": ("INT8_W8A8", "llm_compressor", {}, {}),
    "rows": ("W4A16", "auto_round", HEAD, {"group_size": -1}),
}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("case", [*CASES, *MORE] if full else CASES)


def stored_bytes(folder):
    """Bytes of all tensors in the files of a checkpoint."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]
        total += sum(t.numel() * t.element_size() for t in tensors)
    return total


def predicted_bytes(source, case):
    scheme, form, layer_config, options = (CASES | MORE)[case]
    found = prepare(source, scheme, form, layer_config=layer_config, **options)
    layers = {n: f for n, f in found.all_layers.items() if f["bits"] < 16}
    weights = unit_bytes(found.module, layers, form, found.widths)
    return plain_bytes(found.module, layers, found.widths) + weights


def export(source, case, folder, streams=False):
    scheme, form, layer_config, options = (CASES | MORE)[case]
    run = AutoRound(
        source,
        scheme=scheme,
        # AutoRound does not stream if it only rounds
        alg_configs=SignRoundConfig(iters=1)
        if streams
        else RTNConfig(disable_opt_rtn=True),
        dataset=tiny.calibration(),
        layer_config=layer_config,
        **arguments(**options),
    )
    if streams:
        tuned, saved = run.quantize_and_save(str(folder), format=form)
        assert run.model_context._disk_stream_index is not None
        return tuned, Path(saved)
    tuned, _ = run.quantize()
    _, saved = run.save_quantized(
        str(folder), format=form, inplace=False, return_folders=True
    )
    return tuned, Path(saved if isinstance(saved, str) else saved[0])


@pytest.mark.usefixtures("bfloat16")
def test_an_export_has_the_bytes_and_verifies(case, tmp_path):
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    predicted = predicted_bytes(tiny.in_bfloat16(tiny.tiny_model("solar_open")), case)
    tuned, folder = export(model, case, tmp_path / "out")
    assert stored_bytes(folder) == predicted
    result = verify(folder, tuned)
    assert result.compared_weights == result.quantized_layers > 0
    if (CASES | MORE)[case][1] == "auto_round":
        # scales of inputs that were seen are not those of the tuned model
        tolerance = 0.2 if case == "nvfp4" else 0.01
        check_reloaded(load_model(folder), tuned.float(), tolerance)


@torch.no_grad()
def check_reloaded(loaded, tuned, tolerance):
    """Every layer makes of its inputs what the tuned one makes of them."""
    checked = set()

    def compare(name):
        def hook(_module, args, output):
            expected = tuned.get_submodule(name)(args[0].float())
            error = (output.float() - expected).norm() / expected.norm()
            assert error < tolerance, name
            checked.add(name)

        return hook

    linear = [n for n, m in tuned.named_modules() if isinstance(m, torch.nn.Linear)]
    # where inputs are rounded, the tuned layer is inside of what rounds them
    names = [name.removesuffix(".orig_layer") for name in linear]
    for name in names:
        loaded.get_submodule(name).register_forward_hook(compare(name))
    loaded(torch.cat(tiny.calibration()))
    assert checked == set(names)


@pytest.mark.usefixtures("bfloat16")
def test_a_model_on_disk_has_the_same_bytes(tmp_path):
    source = tiny.save("solar_open", tmp_path / "model")
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    predicted = predicted_bytes(str(source), "int-streamed")
    assert predicted == predicted_bytes(model, "int-streamed")
    _, folder = export(str(source), "int-streamed", tmp_path / "out", streams=True)
    assert stored_bytes(folder) == predicted


def test_shared_and_unsaved_tensors():
    """A tied weight counts once; what `save_pretrained` leaves out does not."""
    model = tiny.tiny_model("qwen3_moe", tie_word_embeddings=True).bfloat16()
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    query = model.model.layers[0].self_attn.q_proj
    whole = plain_bytes(model, [])
    assert whole == 2 * sum(p.numel() for p in model.parameters())
    without = plain_bytes(model, ["model.layers.0.self_attn.q_proj"])
    assert whole - without == 2 * query.weight.numel()


def test_a_scheme_that_cannot_be_verified_is_refused():
    fields = scheme_fields("W4A16") | {"act_bits": 8, "act_data_type": "int-streamed"}
    with pytest.raises(ValueError, match="scheme int of 4 bits in format auto_round"):
        layer_bytes(fields, 64, 64, "auto_round")
