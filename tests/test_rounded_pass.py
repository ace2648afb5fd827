# SPDX-License-Identifier: Apache-2.0
"""Tokens selected inside real AutoRound runs, against whole models."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from transformers import GenerationConfig

import tiny
from test_autoround import same, weights
from test_capture import hook_count
from vsraq import VSRAQConfig
from vsraq.autoround import VSRAQQuantizer, rounded_pass
from vsraq.autoround.token_selection import select_tokens_of_run
from vsraq.capture import RouterCapture
from vsraq.checkpoint import load_model
from vsraq.metrics import routing_shift, sampled_jsd
from vsraq.routers import BoundRouter, find_routers
from vsraq.run_inside import run_inside
from vsraq.tokens import Sampling, hash_tokens
from vsraq.tokens.recorder import TokenRecorder
from vsraq.tokens.shift import output_shift


@pytest.fixture
def selecting(monkeypatch):
    """Select tokens where a run would: the selections of all runs, and the options."""
    selections, options = [], {}
    bind, prepare_run = VSRAQQuantizer.bind, VSRAQQuantizer.prepare_run

    def recording(self, orchestrator):
        bind(self, orchestrator)
        self.recorder = TokenRecorder(self.model)
        run_inside(orchestrator, "cache_data", lambda: self.recorder)

    def selecting(self, composer=None):
        prepare_run(self, composer=composer)
        ids = self.recorder.take()
        selections.append(
            select_tokens_of_run(self.run.orchestrator, composer, ids, **options)
        )

    monkeypatch.setattr(VSRAQQuantizer, "bind", recording)
    monkeypatch.setattr(VSRAQQuantizer, "prepare_run", selecting)
    return selections, options


def plain(**kwargs):
    return VSRAQConfig(**tiny.PLAIN, **{"iters": 1} | kwargs)


def padded(ids):
    """The mask that AutoRound gives samples of its own accord."""
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    return mask


def whole_model(model, samples, amp):
    """Output logits, and experts chosen by router, of all samples in batches of 4."""
    routers = find_routers(model)
    logits, chosen = [], {router.name: [] for router in routers}

    for batch in torch.cat(samples).split(4):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=amp),
            RouterCapture(model, routers, BoundRouter.select) as capture,
        ):
            out = model(batch, attention_mask=padded(batch), use_cache=False)
            logits += out.logits.unbind()
            for name, (experts,) in capture.take().items():
                chosen[name] += experts.split(batch.shape[1])
    return logits, chosen


def oracle(family, scheme, samples, amp, **kwargs):
    """Sampled-JSD and mean routing shift, (N, S) each, from whole forward passes."""
    run = AutoRound(
        tiny.tiny_model(family),
        tiny.tiny_tokenizer(),
        scheme=scheme,
        alg_configs=RTNConfig(disable_opt_rtn=True),
        dataset=samples,
        **tiny.RUN | {"amp": amp} | kwargs,
    )
    q_model, _ = run.quantize()
    fp_model = tiny.tiny_model(family)
    if amp:
        fp_model = tiny.in_bfloat16(fp_model)
    q_logits, q_chosen = whole_model(q_model.eval(), samples, amp)
    fp_logits, fp_chosen = whole_model(fp_model, samples, amp)
    changes = sampled_jsd(torch.stack(q_logits), torch.stack(fp_logits))
    shifts = [
        routing_shift(torch.stack(q_chosen[name]), torch.stack(fp_chosen[name]))
        for name in fp_chosen
    ]
    return changes, torch.stack(shifts).mean(0)


@pytest.fixture
def changes(monkeypatch):
    """Sampled-JSD of every run's tokens, (N, S)."""
    seen = []

    def spy(*args, **kwargs):
        values = output_shift(*args, **kwargs)
        seen.append(torch.stack(values))
        return values

    monkeypatch.setattr("vsraq.autoround.token_selection.output_shift", spy)
    return seen


def masks(selection):
    return torch.stack(selection.mask.masks)


def middle(values):
    """A threshold with half of the values above it, and none near it.

    The median itself is one of them, and rounding would decide on which side it is.
    """
    ordered = values.flatten().sort().values
    half = len(ordered) // 2
    return ordered[half - 1 : half + 1].mean().item()


# ── equal to whole models ─────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("solar_open", "W4A16"),
        ("solar_open", "NVFP4"),
        ("solar_open", "INT8"),
        ("solar_open", "MXFP4"),
        ("granitemoe", "W4A16"),
        ("glm4_moe", "W4A16"),
        ("gpt_oss", "W4A16"),
        ("qwen2_moe", "NVFP4"),
    ],
)
def test_equals_whole_models(family, scheme, quantize, selecting, changes):
    """Of the same model, and of the one that AutoRound's own RTN makes of it."""
    selections, options = selecting
    samples = tiny.calibration()
    expected, _ = oracle(family, scheme, samples, amp=False)
    options["tau"] = tau = middle(expected)
    quantize(tiny.tiny_model(family), plain(), scheme, amp=False)
    (selection,), (actual,) = selections, changes
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(masks(selection), expected > tau)
    assert selection.mask.selected == 128
    assert selection.mask.hashes == tuple(hash_tokens(ids) for ids in samples)
    assert (selection.mask.model, selection.mask.tau) == (
        type(tiny.tiny_model(family)).__name__,
        tau,
    )


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
@pytest.mark.usefixtures("bfloat16")
def test_equals_whole_models_in_bfloat16(scheme, quantize, selecting, changes):
    """But for tokens where bfloat16 rounds an output logit of a chunk differently."""
    selections, options = selecting
    expected, _ = oracle("solar_open", scheme, tiny.calibration(), amp=True)
    options["tau"] = tau = middle(expected)
    quantize(tiny.tiny_model("solar_open"), plain(), scheme)
    error = (changes[0] - expected).abs()
    assert (error > 1e-5).float().mean() < 0.02
    clear = (expected - tau).abs() > error
    assert clear.float().mean() > 0.95
    assert torch.equal(masks(selections[0])[clear], (expected > tau)[clear])


def test_the_routing_can_be_a_second_condition(quantize, selecting, changes):
    selections, options = selecting
    expected, shifts = oracle("glm4_moe", "W4A16", tiny.calibration(), amp=False)
    thresholds = middle(expected), shifts.median().item()
    options["tau"], options["shift_threshold"] = thresholds
    quantize(tiny.tiny_model("glm4_moe"), plain(), amp=False)
    (selection,) = selections
    both = (expected > thresholds[0]) & (shifts > thresholds[1])
    assert 0 < both.sum() < (expected > thresholds[0]).sum()
    assert torch.equal(masks(selection), both)
    assert selection.mask.shift_threshold == thresholds[1]


def test_a_hybrid(quantize, selecting, text_file):
    """Mamba, MoE and attention blocks; calibrated on text, without a mask."""
    selections, options = selecting
    options |= {"tau": 1e-3, "shift_threshold": 0.0}
    quantize(tiny.tiny_model("nemotron_h"), plain(), group_size=32, dataset=text_file)
    quantize(tiny.tiny_model("nemotron_h"), plain(), group_size=32, dataset=text_file)
    first, second = selections
    assert 0 < first.mask.selected < first.mask.total == 8 * tiny.SEQLEN
    assert torch.equal(masks(first), masks(second))


def test_layers_in_full_precision_stay_so(quantize, selecting, changes):
    everything = "self_attn,experts,shared_experts"
    for ignore_layers in (everything, "experts,shared_experts"):
        quantize(
            tiny.tiny_model("solar_open"),
            plain(),
            group_size=32,
            ignore_layers=ignore_layers,
        )
    nothing_rounded, attention_rounded = changes
    assert torch.equal(nothing_rounded, torch.zeros(8, tiny.SEQLEN))
    assert attention_rounded.median() > 1e-3


def test_a_quantized_output_projection(quantize, selecting, changes):
    for quant_lm_head in (False, True):
        model = tiny.tiny_model("solar_open")
        options = {"amp": False, "quant_lm_head": quant_lm_head}
        quantize(model, plain(), **options)
    without, with_head = changes
    assert not torch.equal(without, with_head)
    with pytest.raises(NotImplementedError, match="lm_head: quantized outside of the"):
        quantize(
            tiny.tiny_model("solar_open"),
            plain(),
            "NVFP4",
            amp=False,
            quant_lm_head=True,
        )


# ── what it leaves alone ──────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["solar_open", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_model_and_the_run_are_as_without_it(
    family, scheme, quantize, monkeypatch, selecting
):
    selections, options = selecting
    options["shift_threshold"] = 0.0
    within = VSRAQQuantizer.prepare_run

    def states(quantizer):
        model, inputs = quantizer.model, quantizer.run.orchestrator.inputs
        tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
        attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
        cached = {n: {k: str(v) for k, v in c.items()} for n, c in inputs.items()}
        return tensors, attributes, cached

    def checked(self, composer=None):
        before = None if family == "gpt_oss" else states(self)  # splits its experts
        random_states = random.getstate(), np.random.get_state()[1].tolist()
        torch_state = torch.get_rng_state()
        within(self, composer=composer)
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == random_states
        assert hook_count(self.model) == 0
        if before is not None:
            for a, b in zip(before, states(self), strict=True):
                assert a.keys() == b.keys()
                assert all(
                    torch.equal(a[n], b[n])
                    if isinstance(a[n], torch.Tensor)
                    else a[n] == b[n]
                    for n in a
                )

    def tuned():
        _, model = quantize(
            tiny.tiny_model(family), plain(iters=3), scheme, group_size=group
        )
        return weights(model)

    group = 16 if scheme == "NVFP4" else 32
    monkeypatch.setattr(VSRAQQuantizer, "prepare_run", checked)
    with_selection = tuned()
    assert len(selections) == 1
    monkeypatch.undo()
    assert same(tuned(), with_selection)


def test_nothing_is_left_when_it_fails(quantize, selecting, monkeypatch):
    def failing(*_args, **_kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr("vsraq.autoround.token_selection.output_shift", failing)
    model = tiny.tiny_model("solar_open")
    with pytest.raises(RuntimeError, match="planted"):
        quantize(model, plain())
    assert hook_count(model) == 0
    assert vars(model.model.layers[1]).get("forward") is None
    model(tiny.calibration()[0])


# ── where the model is ────────────────────────────────────────────────────────


@pytest.mark.usefixtures("bfloat16")
def test_a_streamed_model_gives_the_same_mask(quantize, selecting, changes, tmp_path):
    _, options = selecting
    options["shift_threshold"] = 0.0
    source = tiny.save("solar_open", tmp_path / "model")
    generation = GenerationConfig(do_sample=True, temperature=0.8, top_k=30)
    generation.save_pretrained(source)
    run, _ = quantize(str(source), plain())
    assert run.model_context._disk_stream_index is not None
    quantize(str(source), plain())
    quantize(load_model(source), plain())
    streamed, _, kept = selecting[0]
    assert streamed.mask.sampling == kept.mask.sampling == Sampling(0.8, 30, 0.95)
    assert torch.equal(changes[0], changes[1])
    assert torch.equal(changes[0], changes[2])
    assert torch.equal(masks(streamed), masks(kept))


@pytest.mark.usefixtures("bfloat16")
def test_a_streamed_model_is_not_loaded(quantize, selecting, tmp_path, monkeypatch):
    """No block of the model itself is ever in memory while tokens are selected."""
    seen = []

    def spy(self, name, *args):
        loaded = load(self, name, *args)
        assert all(
            p.is_meta
            for b in self.blocks
            for p in self.model.get_submodule(b).parameters()
        )
        assert not any(p.is_meta for p in loaded.parameters())
        seen.append(name)
        return loaded

    load = rounded_pass.RoundedPass.load
    monkeypatch.setattr(rounded_pass.RoundedPass, "load", spy)
    quantize(str(tiny.save("solar_open", tmp_path / "model")), plain())
    assert seen == ["model.layers.0", "model.layers.1"]


def test_blocks_that_wait_on_disk_give_the_same_mask():
    """AutoRound empties all blocks of a patched family before it prepares the run."""
    script = Path(__file__).with_name("path_rounded_pass.py")
    done = subprocess.run(
        [sys.executable, script, "qwen3_moe"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "AR_DISABLE_META_LOAD": "1"},
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert len(lines) == 2, (done.stdout + done.stderr)[-3000:]
    kept, emptied = (json.loads(line.removeprefix("RESULT ")) for line in lines)
    assert (kept["emptied"], emptied["emptied"]) == (False, True)
    assert kept["untouched"]
    assert emptied["untouched"]
    assert kept["masks"] == emptied["masks"]
    assert 0 < sum(map(sum, kept["masks"])) < 8 * tiny.SEQLEN


# ── what it refuses ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1.0}, "tau=-1.0: allowed is a finite number >= 0"),
        ({"shift_threshold": 1.0}, "shift_threshold=1.0: allowed is a fraction"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
)
def test_bad_options_are_refused(options, message, quantize, selecting):
    selecting[1].update(options)
    with pytest.raises(ValueError, match=message):
        quantize(tiny.tiny_model("solar_open"), plain())


def test_token_ids_of_another_number_are_refused(quantize, selecting, monkeypatch):
    monkeypatch.setattr(TokenRecorder, "take", lambda self: tiny.calibration(samples=7))
    with pytest.raises(ValueError, match=r"token_ids of 7 samples: .* cached 8"):
        quantize(tiny.tiny_model("solar_open"), plain())


def test_a_recorder_that_saw_nothing():
    recorder = TokenRecorder(tiny.tiny_model("llama"))
    with pytest.raises(RuntimeError, match="seen no calibration sample"):
        recorder.take()
