# SPDX-License-Identifier: Apache-2.0
"""Measured damage as a method of AutoRound's AutoScheme."""

import pytest
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.auto_scheme import AUTO_SCHEME_METHODS
from auto_round.auto_scheme.utils import compute_layer_bits

import tiny
import vsraq
from routing import DATASET, register_windows
from vsraq.autoround.auto_scheme import _check_average
from vsraq.checkpoint import load_model, verify

OPTIONS = "W3A16G32,W4A16G32,W8A16G32"


def scheme(avg_bits=4.0, **arguments):
    register_windows(torch.cat(tiny.calibration(8)))
    defaults = {
        "options": OPTIONS,
        "method": "vsraq",
        "nsamples": 8,
        "seqlen": tiny.SEQLEN,
        "dataset": DATASET,
        "device_map": "cpu",
        "ignore_scale_zp_bits": True,
    }
    return AutoScheme(avg_bits=avg_bits, **defaults | arguments)


def prepared(family, auto_scheme, **arguments):
    run = AutoRound(
        tiny.tiny_model(family),
        tokenizer=tiny.tiny_tokenizer(),
        scheme=auto_scheme,
        alg_configs=vsraq.VSRAQConfig(iters=1),
        dataset=DATASET,
        **tiny.RUN | arguments,
    )
    run.post_init()
    return run


def mean_bits(run, *, with_scales=False):
    layers = {n: m for n, m in run.model_context.model.named_modules()}
    chosen = {n: c for n, c in run.layer_config.items() if c["in_blocks"]}
    bits = sum(compute_layer_bits(layers[n], not with_scales)[0] for n in chosen)
    return bits / sum(layers[n].weight.numel() for n in chosen)


def test_importing_vsraq_registers_the_method():
    assert "vsraq" in AUTO_SCHEME_METHODS


def test_a_run_with_the_method_exports_what_it_chose(tmp_path):
    run = prepared("solar_open", scheme())
    bits = {n: c["bits"] for n, c in run.layer_config.items()}
    assert mean_bits(run) <= 4.0
    assert {3, 4, 8} >= set(bits.values()) > {4}
    for layer in range(2):
        block = f"model.layers.{layer}"
        qkv = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        experts = [n for n in bits if n.startswith(f"{block}.mlp.experts.")]
        assert len({bits[n] for n in qkv}) == len({bits[n] for n in experts}) == 1
    tuned, _ = run.quantize()
    _, folder = run.save_quantized(
        str(tmp_path), format="auto_round", inplace=False, return_folders=True
    )
    found = verify(folder, tuned)
    assert found.compared_weights == len(bits)
    ids = tiny.calibration(1)[0]
    with torch.no_grad():
        q_logits = load_model(folder, dtype=torch.float32)(ids).logits
        tuned_logits = tuned.float()(ids).logits
    # the loader computes in float16, and a token may sit between two experts
    difference = (q_logits.float() - tuned_logits).abs().mean()
    assert difference < 0.01 * tuned_logits.abs().mean()


def test_scales_count_as_in_auto_scheme():
    run = prepared("olmoe", scheme(5.0, ignore_scale_zp_bits=False))
    assert mean_bits(run) < mean_bits(run, with_scales=True) <= 5.0


def test_layers_that_the_user_fixed_stay_and_count():
    fixed = {"model.layers.0.self_attn.o_proj": {"bits": 8, "group_size": 32}}
    run = prepared("olmoe", scheme(), layer_config=fixed)
    layer = run.layer_config["model.layers.0.self_attn.o_proj"]
    assert layer["bits"] == 8
    assert mean_bits(run) <= 4.0


def test_shared_layers_share_a_scheme():
    shared = [["q_proj", "k_proj", "v_proj", "o_proj"]]
    run = prepared("olmoe", scheme(5.0, shared_layers=shared))
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn."
        bits = {c["bits"] for n, c in run.layer_config.items() if attention in n}
        assert len(bits) == 1


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="no MoE router"):
        prepared("llama", scheme())


def test_a_hybrid_that_auto_scheme_breaks_is_refused():
    with pytest.raises(RuntimeError, match="removed its group_size"):
        prepared("nemotron_h", scheme(6.0))


def test_a_mean_that_no_choice_has_is_refused():
    _check_average(4.0, 800.0, weights=200, base="W4")
    with pytest.raises(ValueError, match=r"avg_bits=3.9: .* the mean is 4; .* than W4"):
        _check_average(3.9, 800.0, weights=200, base="W4")
    with pytest.raises(ValueError, match=r"the mean is 2.6667; allowed is that"):
        _check_average(2.6666, 800.0, weights=300, base="W4")
    _check_average(2.6667, 800.0, weights=300, base="W4")
