# SPDX-License-Identifier: Apache-2.0
"""The next router's logits, from memory and from disk, through real runs."""

import shutil

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.block_runner import _BLOCK_OUTPUT_REGISTRY
from auto_round.algorithms.transforms.spinquant.preprocessor import SpinQuantConfig

import tiny
from reference import logits_of
from test_autoround import same, tuned, weights
from test_capture import hook_count
from tiny import block_lines
from vsraq import VSRAQConfig
from vsraq.autoround import VSRAQQuantizer, next_router
from vsraq.autoround.next_router import find_next_router, load_without_experts
from vsraq.checkpoint import load_model
from vsraq.ranks import RankedLogits
from vsraq.routers import find_routers


def both(**kwargs):
    options = {"iters": 2, "router_weight": 1.0, "next_router_weight": 1.0}
    return VSRAQConfig(objective="router_kl", **options | kwargs)


@pytest.mark.parametrize("family", ["solar_open", "glm4_moe", "nemotron_h", "gpt_oss"])
def test_targets_are_what_the_next_block_itself_captures(family, quantize, terms):
    """Computed one or two blocks ahead, or by hooks in AutoRound's own forward."""
    quantize(tiny.tiny_model(family), both(), amp=False)
    own = [t["router"] for _, t in terms if "router" in t]
    ahead = [(name, t["next router"]) for name, t in terms if "next router" in t]
    assert len(ahead) == tiny.BLOCKS[family] - 1
    routers = find_routers(tiny.tiny_model(family))
    for name, term in ahead:
        index = int(name.rpartition(".")[2])
        position = next(
            i for i, r in enumerate(routers) if int(r.name.split(".")[2]) > index
        )
        (expected,) = own[position].fp_targets.values()
        (actual,) = term.fp_targets.values()
        assert len(actual) == len(expected) == 8
        for a, e in zip(actual, expected, strict=True):
            assert isinstance(a, RankedLogits)
            torch.testing.assert_close(logits_of(a), logits_of(e), atol=1e-4, rtol=1e-4)


def test_the_input_of_a_router_as_objective(quantize, terms, vsraq_log):
    """Own and next compare hidden states, and re-fitting still has its logits."""
    config = VSRAQConfig(
        iters=20,
        objective="input_mse",
        router_weight=1.0,
        next_router_weight=1.0,
        realign_routers=True,
    )
    quantize(tiny.tiny_model("solar_open"), config, amp=False)
    (own, ahead), (after,) = (list(t.values()) for _, t in terms)
    hidden = tiny.CONFIGS["solar_open"]().hidden_size
    for target, expected in zip(
        ahead.fp_targets["mlp.gate"], after.fp_targets["mlp.gate"], strict=True
    ):
        assert target.shape == (tiny.SEQLEN, hidden)
        torch.testing.assert_close(target, expected, atol=1e-4, rtol=1e-4)
    assert own.fp_targets["mlp.gate"][0].shape == (tiny.SEQLEN, hidden)
    first, last = block_lines(vsraq_log)
    assert float(first["z1"]) < float(first["z0"])
    assert float(first["n1"]) < float(first["n0"])
    assert last["n0"] is None
    assert sum("held-out logit error" in m for m in vsraq_log) == 2


def test_the_next_router_reaches_the_experts(quantize, vsraq_log):
    config = VSRAQConfig(
        iters=20, router_weight=0, next_router_weight=10.0, objective="top3k_mse"
    )
    _, model = quantize(tiny.tiny_model("solar_open"), config)
    (line,) = block_lines(vsraq_log)
    assert line["block"] == "model.layers.0"
    assert line["reached"] is None
    assert (line["next_reached"], line["next_quantized"]) == ("31", "31")
    assert float(line["n1"]) < float(line["n0"])
    plain = tuned(quantize, VSRAQConfig(iters=20, **tiny.PLAIN))
    expert = "model.layers.0.mlp.experts.0.down_proj"
    assert not torch.equal(plain[expert], weights(model)[expert])
    assert any("no MoE router in the 0 blocks after it" in m for m in vsraq_log)


def test_a_hybrid_is_reached_where_its_own_router_reaches_nothing(quantize, vsraq_log):
    """Mamba and attention before a MoE layer, and the experts of the one before."""
    config = VSRAQConfig(iters=2, router_weight=0.1, next_router_weight=0.1)
    quantize(tiny.tiny_model("nemotron_h"), config)
    mamba, moe, attention, last = block_lines(vsraq_log)
    assert (mamba["reached"], attention["reached"]) == (None, None)
    assert int(mamba["next_reached"]) > 0
    assert (attention["next_reached"], attention["next_quantized"]) == ("4", "4")
    assert (moe["reached"], moe["next_reached"]) == ("0", moe["next_quantized"])
    assert (last["reached"], last["next_reached"]) == ("0", None)


def test_the_papers_plain_setting_on_a_hybrid_warns_before_the_first_block(
    quantize, vsraq_log
):
    quantize(tiny.tiny_model("nemotron_h"), VSRAQConfig(iters=1, router_weight=0.1))
    assert "the own-router loss tunes nothing" in vsraq_log[0]
    assert 'next_router_weight="auto"' in vsraq_log[0]


def test_a_term_that_reaches_nothing_does_not_choose_the_best_iteration(
    quantize, vsraq_log
):
    """It differs by micro-batch, of which an iteration sees one."""
    run = {"family": "nemotron_h", "batch_size": 2}
    plain = tuned(quantize, VSRAQConfig(iters=30, **tiny.PLAIN), **run)
    aligned = tuned(quantize, VSRAQConfig(iters=30, router_weight=1e6), **run)
    assert {line["reached"] for line in block_lines(vsraq_log)} == {"0"}
    assert same(aligned, plain)


@pytest.mark.parametrize(("lookahead", "blocks"), [(1, [1]), (2, [0, 1])])
def test_the_lookahead_is_limited(lookahead, blocks, quantize, vsraq_log):
    """Mamba, attention, MoE: the router is two blocks behind the first."""
    kinds = ["linear_attention", "full_attention", "moe"]
    model = tiny.tiny_model("nemotron_h", layers_block_type=kinds)
    config = VSRAQConfig(
        iters=1, router_weight=0, next_router_weight=0.1, lookahead=lookahead
    )
    quantize(model, config)
    reached = [line["block"] for line in block_lines(vsraq_log)]
    assert reached == [f"model.layers.{index}" for index in blocks]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulate_steps": 2},
        {"nblocks": 2},  # blocks 0 and 1 together, and block 2 behind them
        {"enable_norm_bias_tuning": True},
        {"enable_minmax_tuning": False},
        {"enable_quanted_input": False},
    ],
    ids=str,
)
def test_in_the_variants_of_autorounds_loop(options, quantize, vsraq_log):
    own = {"iters": 3, "not_use_best_mse": True, **options}
    weights = {"next_router_weight": "auto", "objective": "top3k_mse"}
    with_term = tuned(quantize, VSRAQConfig(**own, **weights), family="glm4_moe")
    first = block_lines(vsraq_log)[0]
    assert float(first["next_weight"]) > 0
    assert first["next_reached"] == first["next_quantized"]
    plain = VSRAQConfig(**own, **tiny.PLAIN)
    assert not same(with_term, tuned(quantize, plain, family="glm4_moe"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
def test_the_default_recipe_under_torch_compile(quantize, vsraq_log):
    """The next block runs outside of AutoRound's compiled function."""
    options = {"iters": 3, "not_use_best_mse": True}
    tuned(quantize, VSRAQConfig(**options), enable_torch_compile=True)
    compiled = block_lines(vsraq_log)
    vsraq_log.clear()
    tuned(quantize, VSRAQConfig(**options))
    for line, eager in zip(compiled, block_lines(vsraq_log), strict=True):
        for name in ("reached", "next_reached"):
            assert line[name] == eager[name]
        for name in ("z1", "weight"):
            assert float(line[name]) == pytest.approx(float(eager[name]), rel=0.2)


def test_finding_the_next_router():
    routers = find_routers(tiny.tiny_model("solar_open"))
    names = ["model.layers.0", "model.layers.1"]
    blocks, router = find_next_router(names, routers, 2)
    assert (blocks, router.name) == (("model.layers.0",), "mlp.gate")
    blocks, router = find_next_router(["elsewhere", *names], routers, 2)
    assert blocks == ("elsewhere", "model.layers.0")
    assert find_next_router(["elsewhere", *names], routers, 1) is None
    assert find_next_router([], routers, 2) is None


# ── where the next block's tensors are ────────────────────────────────────────


@pytest.mark.usefixtures("bfloat16")
def test_a_streamed_model_gives_the_same_weights(quantize, tmp_path):
    source = tiny.save("solar_open", tmp_path / "model")
    config = {
        "iters": 3,
        "router_weight": 1.0,
        "next_router_weight": 1.0,
        "not_use_best_mse": True,  # the best may be the first, which nothing has moved
    }
    run, streamed = quantize(str(source), VSRAQConfig(**config))
    assert run.model_context._disk_stream_index is not None
    _, kept = quantize(load_model(source), VSRAQConfig(**config))
    assert same(weights(streamed), weights(kept))
    without = VSRAQConfig(**config | {"next_router_weight": 0})
    _, plain = quantize(load_model(source), without)
    assert not same(weights(plain), weights(kept))  # so the term did something


@pytest.mark.usefixtures("bfloat16")
def test_a_streamed_block_is_loaded_without_its_experts(
    quantize, tmp_path, monkeypatch
):
    loaded = []
    load = load_without_experts

    def spy(model, name, *args):
        before = {n for n, p in model.get_submodule(name).named_parameters()}
        assert all(p.is_meta for p in model.get_submodule(name).parameters())
        copy = load(model, name, *args)
        # AutoRound's own block is as it was, and AutoRound loads it when it is due
        assert all(p.is_meta for p in model.get_submodule(name).parameters())
        loaded.append((name, before, dict(copy.named_parameters())))
        return copy

    monkeypatch.setattr("vsraq.autoround.next_router.load_without_experts", spy)
    source = tiny.save("solar_open", tmp_path / "model")
    quantize(str(source), VSRAQConfig(iters=1, next_router_weight=1.0))
    ((name, before, after),) = loaded
    assert name == "model.layers.1"
    missing = before - after.keys()
    assert missing
    assert all(".experts." in tensor for tensor in missing)
    assert not any(p.is_meta or p.requires_grad for p in after.values())


def prepared():
    """A run that AutoRound has set up, its experts as layers of their own."""
    run = AutoRound(
        tiny.tiny_model("solar_open"),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=1),
        dataset=tiny.calibration(),
        **tiny.RUN,
    )
    run.post_init()
    model = run.model_context.model
    return run, model, find_routers(model)


def test_a_block_that_autoround_has_put_on_disk():
    """`low_cpu_mem_usage` of a patched model: its blocks wait in files, emptied."""
    run, model, routers = prepared()
    name = "model.layers.1"
    block = model.get_submodule(name)
    arguments = (name, routers, run._offloader, torch.bfloat16, "cpu")
    expected = load_without_experts(model, *arguments).state_dict()
    in_memory = {n: p.data_ptr() for n, p in block.named_parameters()}
    assert all(
        t.data_ptr() == in_memory.get(n) for n, t in expected.items() if n in in_memory
    )
    expected = {n: t.clone() for n, t in expected.items()}
    run._offloader.enabled = True
    run._offloader.offload(model, name)
    assert all(p.numel() == 0 for p in block.parameters())
    actual = load_without_experts(model, *arguments).state_dict()
    assert all(p.numel() == 0 for p in block.parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[n], expected[n]) for n in expected)
    run._offloader.reload(model, name)  # AutoRound's copy is still there
    assert all(p.numel() > 0 for p in block.parameters())


def test_a_block_that_is_nowhere_is_refused():
    run, model, routers = prepared()
    model.model.layers[1].self_attn.to("meta")
    with pytest.raises(RuntimeError, match=r"self_attn.q_proj.weight.* neither in mem"):
        load_without_experts(
            model, "model.layers.1", routers, run._offloader, torch.bfloat16, "cpu"
        )


# ── what it refuses, and what it leaves behind ────────────────────────────────


def test_experts_before_the_router_are_refused(quantize):
    class ExpertsFirst(type(tiny.tiny_model("solar_open").model.layers[0].mlp)):
        def forward(self, hidden_states):
            self.experts(hidden_states, None, None)
            return super().forward(hidden_states)

    model = tiny.tiny_model("solar_open")
    model.model.layers[1].mlp.__class__ = ExpertsFirst
    with pytest.raises(NotImplementedError, match="experts before its router"):
        quantize(model, both())


def test_no_hook_is_left_when_the_look_ahead_fails(quantize, monkeypatch):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:
            raise RuntimeError("planted")
        return router_input(*args, **kwargs)

    router_input = next_router.router_input
    monkeypatch.setattr(next_router, "router_input", failing)
    model = tiny.tiny_model("solar_open")
    with pytest.raises(RuntimeError, match="planted") as error:
        quantize(model, both(iters=4))
    del error
    assert hook_count(model) == 0


def test_a_next_block_that_is_not_rotated_yet_is_refused(quantize, monkeypatch):
    monkeypatch.setattr(VSRAQQuantizer, "quantize_block", None)
    rotation = SpinQuantConfig(trainable_rotation=False, layerwise=True)
    with pytest.raises(NotImplementedError, match="the next block is not rotated yet"):
        quantize(tiny.tiny_model("solar_open"), [rotation, both()], amp=False)


def test_blocks_with_arguments_of_their_own_are_refused(quantize, monkeypatch):
    """AutoRound says so of Gemma 4."""
    prepare_run = VSRAQQuantizer.prepare_run

    def variable(self, composer=None):
        self.run.orchestrator.has_variable_block_shape = True
        prepare_run(self, composer)

    monkeypatch.setattr(VSRAQQuantizer, "prepare_run", variable)
    monkeypatch.setattr(VSRAQQuantizer, "quantize_block", None)
    with pytest.raises(NotImplementedError, match="takes arguments of its own"):
        quantize(tiny.tiny_model("solar_open"), both())


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(quantize, monkeypatch):
    """As AutoRound registers it for GLM with DSA; before the first block is tuned."""
    outputs = ["hidden_states", "prev_topk_indices"]
    monkeypatch.setitem(_BLOCK_OUTPUT_REGISTRY, "SolarOpenDecoderLayer", outputs)
    monkeypatch.setattr(VSRAQQuantizer, "quantize_block", None)
    with pytest.raises(NotImplementedError, match="more than its hidden states"):
        quantize(tiny.tiny_model("solar_open"), both())
