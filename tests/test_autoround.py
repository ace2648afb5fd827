# SPDX-License-Identifier: Apache-2.0
"""The plug-in inside real AutoRound runs on tiny models."""

import shutil

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.utils.device_manager import get_ar_device
from torch import nn

import families
import tiny
from test_capture import hook_count
from tiny import block_lines
from vsraq import Objective, VSRAQConfig
from vsraq.autoround import VSRAQQuantizer
from vsraq.checkpoint import load_model
from vsraq.losses import topk_mse


def weights(model):
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def tuned(quantize, config, family="solar_open", scheme="W4A16", **kwargs):
    _, model = quantize(tiny.tiny_model(family), config, scheme, **kwargs)
    return weights(model)


# ── equal to AutoRound where it must be, different where it should ─────────────


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_weight_zero_is_autoround_bit_for_bit(quantize, scheme):
    plain = tuned(quantize, SignRoundConfig(iters=4), scheme=scheme)
    zero = tuned(quantize, VSRAQConfig(iters=4, **tiny.PLAIN), scheme=scheme)
    assert same(plain, zero)
    few = tuned(quantize, SignRoundConfig(iters=1), scheme=scheme)
    assert not same(plain, few)  # so the iterations did change something


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_router_loss_falls(quantize, scheme, vsraq_log):
    config = VSRAQConfig(iters=20, router_weight=10.0, objective="top3k_mse")
    aligned = tuned(quantize, config, scheme=scheme)
    lines = block_lines(vsraq_log)
    assert [line["block"] for line in lines] == ["model.layers.0", "model.layers.1"]
    for line in lines:
        assert float(line["z1"]) < float(line["z0"])
        # q, k, v and o stand before the router; 8 experts and a shared one behind
        assert (line["reached"], line["quantized"]) == ("4", str(4 + 3 * 9))
    plain = tuned(quantize, SignRoundConfig(iters=20), scheme=scheme)
    assert not same(plain, aligned)


def test_the_registered_name_is_enough(quantize, vsraq_log):
    by_name = tuned(quantize, "vsraq", iters=2)
    assert block_lines(vsraq_log)
    assert same(by_name, tuned(quantize, VSRAQConfig(iters=2)))


def test_options_given_to_autoround_directly(quantize):
    direct = tuned(quantize, "vsraq", iters=3, objective="topk_mse", router_weight=5.0)
    config = VSRAQConfig(iters=3, objective="topk_mse", router_weight=5.0)
    assert same(direct, tuned(quantize, config))


def test_a_bad_option_given_to_autoround_directly_is_refused():
    model = tiny.tiny_model("solar_open")
    with pytest.raises(ValueError, match="router_weight=-1"):
        AutoRound(model, tiny.tiny_tokenizer(), alg_configs="vsraq", router_weight=-1)


def test_an_objective_of_your_own(quantize):
    own = VSRAQConfig(iters=3, router_weight=5.0, objective=Objective("mine", topk_mse))
    named = VSRAQConfig(iters=3, router_weight=5.0, objective="topk_mse")
    assert same(tuned(quantize, own), tuned(quantize, named))


def test_the_same_seed_gives_the_same_weights(quantize):
    config = {"iters": 3, "router_weight": 1.0}
    first = tuned(quantize, VSRAQConfig(**config))
    assert same(first, tuned(quantize, VSRAQConfig(**config)))


# ── variants of AutoRound's loop ──────────────────────────────────────────────


@pytest.mark.parametrize("option", ["enable_adam", "enable_alg_ext"])
def test_variants_compose(quantize, option, vsraq_log):
    plain = tuned(quantize, SignRoundConfig(iters=4, **{option: True}))
    zero = tuned(quantize, VSRAQConfig(iters=4, **tiny.PLAIN, **{option: True}))
    assert same(plain, zero)
    aligned = tuned(quantize, VSRAQConfig(iters=4, router_weight=10, **{option: True}))
    assert not same(plain, aligned)
    assert len(block_lines(vsraq_log)) == 2


def test_gradient_accumulation_keeps_the_ratio(quantize, monkeypatch):
    """AutoRound sums the error of 4 x 2 samples where it averages that of 8."""
    step = VSRAQQuantizer._step
    gradients = []

    def spy(self, scaler, optimizer, lr_schedule):
        rounding = optimizer.param_groups[0]["params"]
        gradients.append(torch.cat([p.grad.flatten() for p in rounding]))
        step(self, scaler, optimizer, lr_schedule)

    monkeypatch.setattr(VSRAQQuantizer, "_step", spy)

    def first_gradients(router_weight, batch_size, steps):
        gradients.clear()
        config = VSRAQConfig(
            iters=1,
            objective="top3k_mse",
            router_weight=router_weight,
            gradient_accumulate_steps=steps,
        )
        tuned(quantize, config, batch_size=batch_size, amp=False)
        return gradients[0]

    at_once = first_gradients(20.0, 8, 1)
    accumulated = first_gradients(20.0, 2, 4)
    without = first_gradients(1e-9, 2, 4)
    elements = 8 * tiny.SEQLEN * 64
    close = {"rtol": 1e-3, "atol": 1e-3 * at_once.abs().mean().item()}
    torch.testing.assert_close(accumulated / elements, at_once, **close)
    assert not torch.allclose(without / elements, at_once, **close)


def padded(token):
    """Samples whose second half is one token; 0 is the tokenizer's padding."""
    samples = [ids.clone() for ids in tiny.calibration()]
    for ids in samples:
        ids[:, tiny.SEQLEN // 2 :] = token
    return samples


def test_padding_counts_in_neither_loss(quantize):
    """Valid tokens never see the padding behind them, so its embedding is free."""

    def weights_with_embedding(token, value):
        model = tiny.tiny_model("solar_open")
        with torch.no_grad():
            model.model.embed_tokens.weight[token] = value
        config = VSRAQConfig(iters=4, router_weight=10.0, not_use_best_mse=True)
        return weights(quantize(model, config, dataset=padded(token))[1])

    assert same(weights_with_embedding(0, 0.1), weights_with_embedding(0, -0.5))
    assert not same(weights_with_embedding(9, 0.1), weights_with_embedding(9, -0.5))


def test_two_blocks_at_once_have_two_routers(quantize, vsraq_log):
    tuned(quantize, VSRAQConfig(iters=3, router_weight=1.0, nblocks=2))
    (line,) = block_lines(vsraq_log)
    assert line["block"] == "model.layers.0+model.layers.1"
    # the second router also sees the first block's experts
    assert int(line["reached"]) == 4 + 3 * 9 + 4
    assert int(line["quantized"]) == 2 * (4 + 3 * 9)


def test_early_stop_and_last_parameters(quantize, vsraq_log):
    tuned(quantize, VSRAQConfig(iters=5, router_weight=1.0, not_use_best_mse=True))
    assert [line["best"] for line in block_lines(vsraq_log)] == ["4", "4"]
    vsraq_log.clear()
    tuned(quantize, VSRAQConfig(iters=30, router_weight=1.0, dynamic_max_gap=2))
    assert len(block_lines(vsraq_log)) == 2


# ── blocks and models without routers ─────────────────────────────────────────


def test_a_dense_block_is_a_plain_reconstruction_step(quantize, vsraq_log):
    last = {"iters": 3, "not_use_best_mse": True}
    config = VSRAQConfig(router_weight=10.0, **last)
    aligned = tuned(quantize, config, family="glm4_moe")
    lines = block_lines(vsraq_log)
    assert [line["block"] for line in lines] == ["model.layers.1", "model.layers.2"]
    plain = tuned(quantize, SignRoundConfig(**last), family="glm4_moe")

    def of_block(index, layers):
        return {n: w for n, w in layers.items() if f"layers.{index}." in n}

    assert same(of_block(0, plain), of_block(0, aligned))
    assert not same(of_block(1, plain), of_block(1, aligned))


def test_a_dense_model_is_refused(quantize):
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM: .* no MoE router"):
        tuned(quantize, VSRAQConfig(iters=2), family="llama")


# ── faults ────────────────────────────────────────────────────────────────────


class _FailsAt(nn.Module):
    """A norm of the model that raises at its n-th call."""

    def __init__(self, norm, call, error):
        super().__init__()
        self.norm, self.left, self.error = norm, call, error

    def forward(self, hidden_states):
        self.left -= 1
        if self.left == 0:
            raise self.error("planted")
        return self.norm(hidden_states)


def compiles():
    """Whether torch.compile works, which eager mode switches off."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()  # it compiles one function a few times only
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(compiled)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(1, 14))
def test_no_hook_is_left_after_an_exception(quantize, call, error):
    """Whichever pass of the second block fails: calibration, reference, tuning.

    A notebook keeps the traceback, and with it every object of the failed run.
    """
    model = tiny.tiny_model("solar_open")
    block = model.model.layers[1]
    norm = _FailsAt(block.post_attention_layernorm, call, error)
    block.post_attention_layernorm = norm
    config = VSRAQConfig(
        iters=4,
        router_weight=1.0,
        next_router_weight=1.0,
        realign_routers=True,
        token_selection={"tau": 0.0},
    )
    with pytest.raises(error, match="planted") as kept:
        quantize(model, config)
    assert kept.tb is not None
    assert hook_count(model) == 0
    assert compiles()


def test_no_hook_is_left_after_a_run(quantize):
    _, model = quantize(tiny.tiny_model("solar_open"), VSRAQConfig(iters=2))
    assert hook_count(model) == 0


def test_a_bypassed_router_is_an_error(quantize):
    model = tiny.tiny_model("solar_open")
    gate = model.model.layers[1].mlp.gate
    # the block calls forward() itself, as some remote code does: no hook fires
    gate.__class__ = type("Bypassed", (type(gate),), {"__call__": type(gate).forward})
    with pytest.raises(RuntimeError, match=r"block model.layers.1: no full-precision"):
        quantize(model, VSRAQConfig(iters=2, router_weight=1.0))
    with pytest.raises(NotImplementedError, match="without calling that"):
        quantize(model, VSRAQConfig(iters=2, next_router_weight=1.0))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("self_attn.o_proj", r"block model.layers.1: router \S+ has non-finite"),
        ("mlp.shared_experts.down_proj", r"block model.layers.1, iteration 0: loss is"),
    ],
)
def test_a_non_finite_loss_names_its_block(quantize, target, message):
    model = tiny.tiny_model("solar_open")
    layer = model.model.layers[1].get_submodule(target)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=message):
        quantize(model, VSRAQConfig(iters=2, router_weight=1.0))


def test_a_router_to_be_quantized_is_refused():
    run = AutoRound(
        tiny.tiny_model("solar_open"),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=2),
        dataset=tiny.calibration(),
        **tiny.RUN,
    )
    run.post_init()
    gate = run.model_context.model.model.layers[1].mlp.gate
    gate.bits, gate.act_bits = 4, 16
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate: it is among the layers"):
        run.quantize()


def test_an_objective_that_reads_more_experts_than_there_are(quantize):
    objective = {"name": "router_kl", "top_m": tiny.EXPERTS + 1}
    config = VSRAQConfig(iters=2, objective=objective)
    with pytest.raises(ValueError, match=rf"reads {tiny.EXPERTS + 1} ranks of router"):
        tuned(quantize, config)


def test_masked_tokens_do_not_shift_the_ratio(quantize, monkeypatch):
    """AutoRound's mean counts masked elements in its denominator; ours follows."""
    shares = []
    get_loss = VSRAQQuantizer._get_loss

    def spy(self, *args, **kwargs):
        loss = get_loss(self, *args, **kwargs)
        running = self.tuning.curves.running
        mask = args[5]
        share = sum(m.sum().item() for m in mask) / sum(m.numel() for m in mask)
        shares.append(share)
        expected = running["reconstruction"] + 10.0 * share * running["router"]
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        return loss

    monkeypatch.setattr(VSRAQQuantizer, "_get_loss", spy)
    tuned(quantize, VSRAQConfig(iters=1, router_weight=10.0), dataset=padded(0))
    assert set(shares) == {0.5}


# ── refused configurations ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"iters": 0}, r"iters=0: .*use AutoRound's RTN"),
        ({"iters": -5}, r"iters=-5: allowed is an int >= 1"),
        ({"router_weight": -0.1}, r"router_weight=-0.1: allowed is a finite number"),
        ({"router_weight": float("nan")}, r"router_weight=nan"),
        ({"router_weight": "heavy"}, r"router_weight='heavy'"),
        ({"objective": "vsrag"}, r"objective='vsrag'.*Did you mean 'vsraq'"),
        ({"objective": {"name": "topk_mse", "alpha": 0.3}}, r"no such hyper-param"),
        ({"objective": {"name": "vsraq", "alpha": 1.3}}, r"alpha=1.3"),
        ({"objective": {"alpha": 0.3}}, r"it has no name"),
        ({"iters": "many"}, r"iters='many': allowed is an int"),
        ({"nblocks": 0}, r"nblocks=0"),
        ({"gradient_accumulate_steps": 0}, r"gradient_accumulate_steps=0"),
        ({"enable_lfq": True}, r"enable_lfq=True: .*drops the router loss"),
        ({"enable_adam": True, "enable_alg_ext": True}, r"allowed is one of them"),
    ],
)
def test_refused_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VSRAQConfig(**kwargs)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="router_wieght"):
        VSRAQConfig(router_wieght=1.0)


def test_every_hyperparameter_reaches_its_objective():
    every = {
        "boundary": 2,
        "alpha": 0.1,
        "gamma": 2.0,
        "eps": 0.01,
        "rank_margin": 0.5,
        "rank_weight": 0.2,
        "margin_weight": 0.3,
    }
    for objective, own in [
        ("vsraq", every),
        ("topk_mse", {"multiplier": "all"}),
        ("rank", {"margin": 0.5}),
        ("router_kl", {"top_m": 4}),
    ]:
        config = VSRAQConfig(objective={"name": objective, **own})
        assert dict(config.alignment.own_objective.hyperparameters) == own


# ── other ways in ─────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("bfloat16")
def test_a_path_is_streamed_and_gives_the_same_weights(quantize, tmp_path):
    """`quantize()` on a checkpoint that is read from disk block by block."""
    source = tiny.save("solar_open", tmp_path / "model")
    config = {"iters": 3, "router_weight": 10.0, "not_use_best_mse": True}
    run, model = quantize(str(source), VSRAQConfig(**config))
    assert run.model_context._disk_stream_index is not None
    _, expected = quantize(load_model(source), VSRAQConfig(**config))
    assert same(weights(model), weights(expected))


def block_run(block, config):
    """AutoRound's API for one block, as llm-compressor drives it."""
    model = tiny.tiny_model("solar_open")
    run = AutoRound(
        model,
        tiny.tiny_tokenizer(),
        scheme="W4A16",
        alg_configs=config,
        **tiny.RUN,
        to_quant_block_names=block,
    )
    run.post_init()
    model = run.model_context.model
    hidden = model.model.embed_tokens(torch.cat(tiny.calibration())).detach()
    position = torch.arange(tiny.SEQLEN).unsqueeze(0)
    embeddings = model.model.rotary_emb(hidden, position)
    inputs = [
        (((h,), {"position_embeddings": embeddings, "attention_mask": None}),)
        for h in hidden.split(1)
    ]
    return run, model.get_submodule(block), inputs


def test_a_stream_in_two_precisions_is_refused(quantize, tmp_path, monkeypatch):
    """A CPU without bfloat16 instructions; loaded as a whole, the model runs."""
    monkeypatch.setattr(get_ar_device("cpu"), "_bf16_supported", False)
    source = str(tiny.save("solar_open", tmp_path / "model"))
    config = VSRAQConfig(iters=1)
    with pytest.raises(ValueError, match=r"stored in 16 bits, .* AR_DISABLE_META_LOAD"):
        quantize(source, config)
    monkeypatch.setenv("AR_DISABLE_META_LOAD", "1")
    quantize(source, config)


@pytest.mark.usefixtures("bfloat16")
def test_single_blocks_with_and_without_a_reference_output(vsraq_log):
    block = "model.layers.0"
    results = []
    for given in (False, True):
        config = VSRAQConfig(iters=3, router_weight=10.0)
        run, module, inputs = block_run(block, config)
        reference = None
        if given:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                reference = [
                    module.bfloat16()(args[0].bfloat16(), **kwargs)
                    for ((args, kwargs),) in inputs
                ]
        run.quantize_block(module, inputs, reference_output=reference)
        results.append(weights(module))
        assert hook_count(module) == 0
    lines = block_lines(vsraq_log)
    assert [line["block"] for line in lines] == [block, block]
    assert lines[0]["z0"] == lines[1]["z0"]  # the same full-precision targets


def test_single_blocks_are_checked_too(vsraq_log):
    """llm-compressor's way does not prepare a run, and needs its checks too."""
    block = "model.layers.0"
    run, module, inputs = block_run(block, VSRAQConfig(iters=1))
    run.quantize_block(module, inputs)
    assert "2 routers; router_weight=auto" in vsraq_log[0]
    (line,) = block_lines(vsraq_log)
    assert float(line["weight"]) > 0
    assert float(line["next_weight"]) > 0
    assert sum("held-out logit error" in m for m in vsraq_log) == 1


def test_single_blocks_cannot_select_tokens():
    block = "model.layers.0"
    run, module, inputs = block_run(block, VSRAQConfig(iters=1, token_selection=True))
    with pytest.raises(NotImplementedError, match="single blocks do not tell which"):
        run.quantize_block(module, inputs)


def test_a_reference_output_for_quantized_inputs_is_refused():
    """Full-precision logits cannot be derived from the quantized stream."""
    config = VSRAQConfig(iters=3, router_weight=10.0)
    run, module, inputs = block_run("model.layers.0", config)
    hidden = [args[0].bfloat16() for ((args, _),) in inputs]
    with pytest.raises(RuntimeError, match=r"reference_output=None"):
        run.quantize_block(module, inputs, q_input=hidden, reference_output=hidden)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
def test_the_router_term_survives_torch_compile(quantize, vsraq_log):
    config = {"iters": 3, "router_weight": 10.0, "not_use_best_mse": True}
    eager = tuned(quantize, VSRAQConfig(**config))
    compiled = tuned(quantize, VSRAQConfig(**config), enable_torch_compile=True)
    plain = {**config, **tiny.PLAIN}
    without = tuned(quantize, VSRAQConfig(**plain), enable_torch_compile=True)
    lines = block_lines(vsraq_log)
    assert len(lines) == 4
    assert all(line["reached"] == "4" for line in lines)
    for line, other in zip(lines[:2], lines[2:], strict=True):
        assert float(other["z0"]) == pytest.approx(float(line["z0"]), rel=0.2)
    layer = "model.layers.0.self_attn.v_proj"

    def distance(a, b):
        return (a[layer].float() - b[layer].float()).abs().mean().item()

    assert distance(compiled, eager) < distance(compiled, without)


def test_a_pattern_aligns_some_routers_only(quantize, vsraq_log):
    pattern = r"self_attention\.experts\.router\.layer"
    config = VSRAQConfig(iters=2, router_weight=1.0, router_pattern=pattern)
    quantize(families.tiny_family("jetmoe"), config)
    assert any(m.startswith("vsraq: 3 routers;") for m in vsraq_log)


def test_a_pattern_that_finds_others_in_a_block_ends_the_run(quantize):
    pattern = r"model\.layers\.\d\.mlp\.gate"
    config = VSRAQConfig(iters=1, router_weight=1.0, router_pattern=pattern)
    message = "block model.layers.0: it has 0 routers, the model 1 in it"
    with pytest.raises(RuntimeError, match=message):
        quantize(tiny.tiny_model("solar_open"), config)


def test_a_pattern_must_be_one():
    with pytest.raises(ValueError, match=r"router_pattern='\(': allowed is a regular"):
        VSRAQConfig(router_weight=1.0, router_pattern="(")
