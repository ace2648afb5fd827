# SPDX-License-Identifier: Apache-2.0
"""AutoRound's schemes, options and formats, each with both router losses inside."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.transforms.awq.config import AWQConfig
from auto_round.algorithms.transforms.hadamard.config import RotationConfig

import tiny
from reference import logits_of
from test_autoround import same, weights
from tiny import block_lines
from vsraq import VSRAQConfig

QKV = {"smooth_layer": "input_layernorm$", "balance_layers": ["q_proj$", "k_proj$"]}
QKV["balance_layers"].append("v_proj$")
INPLACE = {"backend": "inplace", "hadamard_type": "inplace_hadamard", "block_size": 32}


@dataclass
class Case:
    """A run: what it is called, and what it differs in from the plain one."""

    name: str
    scheme: Any = "W4A16"
    config: dict = field(default_factory=dict)  # of VSRAQConfig
    run: dict = field(default_factory=dict)  # of AutoRound
    before: list = field(default_factory=list)  # algorithms before ours
    export: str | None = None
    family: str = "solar_open"
    reached: tuple = (("4", "31"), ("4", None))  # own and next router, by block
    fails: str = ""  # what AutoRound itself says
    often: bool = False  # also without --full

    def __str__(self):
        return self.name


def schemes(*names):
    return [Case(name, scheme=name, often=name == "MXFP4") for name in names]


def options(**values):
    return [Case(f"{k}={v}", config={k: v}) for k, v in values.items()]


def formats(*names, **kwargs):
    return [Case(f"export {name}", export=name, **kwargs) for name in names]


CASES = [
    *schemes("W4A16", "W3A16", "W2A16", "W8A16", "MXFP4", "MXFP8", "NVFP4"),
    *schemes("FP8_STATIC", "FPW8A16", "INT8_W8A8", "MXINT4", "GGUF:Q4_0"),
    Case("asymmetric", run={"sym": False}, often=True),
    Case("a group per channel", run={"group_size": -1}),
    Case("groups of 32", run={"group_size": 32}),
    # the samples that are looked at before the first step route nothing to one expert
    Case(
        "enable_alg_ext=True",
        config={"enable_alg_ext": True},
        reached=(("4", "28"), ("4", None)),
    ),
    *options(enable_adam=True, enable_minmax_tuning=False),
    *options(enable_norm_bias_tuning=True),
    *options(gradient_accumulate_steps=2, enable_quanted_input=False),
    Case("the best iteration", config={"not_use_best_mse": False, "iters": 20}),
    Case(
        "an early stop",
        config={"not_use_best_mse": False, "dynamic_max_gap": 5, "iters": 20},
    ),
    Case("nblocks=2", config={"nblocks": 2}, reached=(("35", None),)),
    Case("a batch of 3 of 8 samples", run={"batch_size": 3}, often=True),
    Case("low_gpu_mem_usage", run={"low_gpu_mem_usage": True}),
    Case(
        "mixed bits, and a layer in full precision",
        run={"layer_config": {"o_proj": {"bits": 8}, "q_proj": {"bits": 16}}},
        reached=(("3", "30"), ("3", None)),
    ),
    Case(
        "two block groups",
        run={"to_quant_block_names": [["model.layers.0"], ["model.layers.1"]]},
    ),
    Case(
        "one of two blocks",
        run={"to_quant_block_names": "model.layers.0"},
        reached=(("4", "31"),),
    ),
    Case("torch.compile", run={"enable_torch_compile": True}),
    Case("AWQ", before=[lambda: AWQConfig(mappings=[QKV])], often=True),
    Case("QuaRot", before=["quarot"], often=True),
    Case("Hadamard", "MXFP4", before=["hadamard"]),
    *formats("auto_round", "auto_gptq"),
    *formats("auto_awq", "llm_compressor", run={"group_size": 32}),
    *formats("llm_compressor", scheme="NVFP4"),
    Case("AutoScheme", scheme=None, often=True),
    # what AutoRound 0.16.1 itself cannot do here, with its words
    Case("FP8_BLOCK", "FP8_BLOCK", fails=r"shape '\[128, 128\]' is invalid for input"),
    Case(
        "Hadamard in place",
        before=[lambda: RotationConfig(**INPLACE)],
        family="qwen3_moe",
        fails="'Qwen3MoeSparseMoeBlock' object has no attribute 'up_proj'",
    ),
    *formats("gguf:q4_k_m", scheme="GGUF:Q4_K_M", fails="Repo id must use alphanum"),
]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = CASES
        if not metafunc.config.getoption("--full"):
            cases = [case for case in CASES if case.often]
        metafunc.parametrize("case", cases, ids=str)


def run(case, folder, config):
    folder.mkdir(exist_ok=True)
    scheme = case.scheme
    arguments = {"dataset": tiny.calibration()} | tiny.RUN | case.run
    if scheme is None:
        text = tiny.save_text(folder / "text.jsonl")
        arguments |= {"dataset": text, "low_cpu_mem_usage": False}
        scheme = AutoScheme(
            avg_bits=3.5,
            options="W2A16G32,W4A16G32",
            nsamples=4,
            seqlen=tiny.SEQLEN,
            batch_size=4,
            dataset=text,
            low_gpu_mem_usage=False,
        )
    before = [member() if callable(member) else member for member in case.before]
    torch.manual_seed(0)  # AutoRound does not seed everything
    autoround = AutoRound(
        tiny.tiny_model(case.family),
        tokenizer=tiny.tiny_tokenizer(),
        scheme=scheme,
        alg_configs=[*before, config] if before else config,
        **arguments,
    )
    if case.export is None:
        autoround.quantize()
    else:
        autoround.quantize_and_save(str(folder), format=case.export, inplace=False)
    return weights(autoround.model_context.model)


def test_both_losses_are_active(case, tmp_path, vsraq_log):
    """They reach what they should, and the weights are others than without them."""
    common = {"iters": 3, "not_use_best_mse": True} | case.config
    aligned = VSRAQConfig(router_weight=10.0, next_router_weight=10.0, **common)
    if case.fails:
        for config in (SignRoundConfig(**common), aligned):
            with pytest.raises(Exception, match=case.fails):
                run(case, tmp_path, config)
        return
    tuned = run(case, tmp_path / "aligned", aligned)
    reached = [
        (line["reached"], line["next_reached"]) for line in block_lines(vsraq_log)
    ]
    assert tuple(reached) == case.reached
    config = VSRAQConfig(**tiny.PLAIN, **common)
    plain = run(case, tmp_path / "plain", config)
    assert not same(tuned, plain)


def targets(terms):
    return [
        torch.cat([logits_of(target) for target in own])
        for _, by_label in terms
        for own in by_label["router"].fp_targets.values()
    ]


@pytest.mark.parametrize("before", ["quarot", AWQConfig(mappings=[QKV])])
def test_reference_logits_survive_what_moves_the_routers_input(before, quantize, terms):
    """Rotated or scaled hidden states, with routers that were moved along."""
    config = {"iters": 1, "router_weight": 1.0, "objective": "router_kl"}
    quantize(tiny.tiny_model("solar_open"), VSRAQConfig(**config), amp=False)
    expected = targets(terms)
    terms.clear()
    algorithms = [before, VSRAQConfig(**config)]
    quantize(tiny.tiny_model("solar_open"), algorithms, amp=False)
    for actual, own in zip(targets(terms), expected, strict=True):
        torch.testing.assert_close(actual, own, atol=1e-3, rtol=1e-3)


def test_awq_that_moves_a_routers_input_only_is_refused(quantize):
    """AutoRound's mapping for unknown families scales the norm that routers read."""
    message = r"awq: it scales the output of model\.layers\.0\.post_attention_layernorm"
    config = VSRAQConfig(iters=1, router_weight=1.0)
    with pytest.raises(ValueError, match=message):
        quantize(tiny.tiny_model("solar_open"), ["awq", config])
