# SPDX-License-Identifier: Apache-2.0
"""Routers of whole models re-fitted block by block, against passes from the start."""

import copy
import logging
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import tiny
from test_capture import hook_count
from test_realignment import rounded
from vsraq import block_stream
from vsraq.block_stream import BlockStream, WholePasses, why_not_streamed
from vsraq.blocks import decoder_blocks
from vsraq.realignment import realign_routers
from vsraq.routers import expert_containers, find_routers

FAMILIES = [
    "solar_open",
    "glm4_moe",
    "deepseek_v3",
    "qwen2_moe",
    "nemotron_h",
    "gpt_oss",
    "granitemoe",
]
SAMPLES = tiny.calibration(samples=64)


@contextmanager
def counted(model):
    """How often each module is called."""
    calls = Counter()

    def count(name):
        return lambda *_: calls.update([name])

    handles = [
        module.register_forward_pre_hook(count(name))
        for name, module in model.named_modules()
    ]
    yield calls
    for handle in handles:
        handle.remove()


def weights_of(model):
    return {r.name: model.get_submodule(r.name).weight for r in find_routers(model)}


def from_the_start(monkeypatch, q_model, fp_model):
    monkeypatch.setattr(
        block_stream, "why_not_streamed", lambda *_: "this test compares with it"
    )
    refits = realign_routers(q_model, fp_model, SAMPLES)
    monkeypatch.undo()
    return refits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_routers_as_by_passes_from_the_start(family, monkeypatch, caplog):
    fp_model = tiny.tiny_model(family)
    streamed = rounded(copy.deepcopy(fp_model))
    passed = copy.deepcopy(streamed)
    expected = from_the_start(monkeypatch, passed, fp_model)
    caplog.clear()
    refits = realign_routers(streamed, fp_model, SAMPLES)
    assert not caplog.records  # every one of these families can be streamed
    assert any(refit.applied for refit in refits)
    for refit, other in zip(refits, expected, strict=True):
        assert (refit.router, refit.applied) == (other.router, other.applied)
        assert refit.after == pytest.approx(other.after, rel=1e-3)
    torch.testing.assert_close(weights_of(streamed), weights_of(passed))
    for model in (streamed, fp_model):
        assert hook_count(model) == 0
        assert not any("forward" in vars(module) for module in model.modules())


def test_every_expert_runs_once_and_the_output_head_never():
    """Besides the two samples that try, both ways, whether blocks can be run alone."""
    fp_model = tiny.tiny_model("solar_open", num_hidden_layers=5)
    q_model = rounded(copy.deepcopy(fp_model))
    routers = find_routers(fp_model)
    experts = [expert_containers(fp_model, [r])[0] for r in routers]
    with counted(q_model) as q_calls, counted(fp_model) as fp_calls:
        realign_routers(q_model, fp_model, SAMPLES)
    for calls in (q_calls, fp_calls):
        assert calls["lm_head"] == 0
        assert [calls[name] for name in experts] == [64 + 4] * 4 + [0]
        # up to the router, and up to the end
        assert calls["model.layers.2.self_attn"] == 2 * 64 + 4


def test_what_is_kept_are_the_hidden_states():
    model = tiny.tiny_model("glm4_moe")
    routers = find_routers(model)
    blocks = decoder_blocks(model, routers)
    assert blocks == tuple(f"model.layers.{i}" for i in range(3))
    stream = BlockStream(model, blocks, SAMPLES)
    with torch.no_grad():
        stream.advance_to(routers[-1].name)
    assert [s.shape for s in stream._states] == [(1, tiny.SEQLEN, 64)] * len(SAMPLES)
    assert all(s._base is None for s in stream._states)


def test_blocks_that_depend_on_more_than_their_inputs_are_passed_from_the_start(caplog):
    """What the first block leaves somewhere for the second."""
    fp_model = tiny.tiny_model("qwen3_moe")
    q_model = rounded(copy.deepcopy(fp_model))
    for model in (fp_model, q_model):
        left = []

        def leave(_module, _args, output, left=left):
            left[:] = [output]

        def take(_module, args, left=left):
            return (args[0] + 0.5 * left[0], *args[1:])

        model.model.layers[0].register_forward_hook(leave)
        model.model.layers[1].register_forward_pre_hook(take)
    with caplog.at_level(logging.WARNING):
        refits = realign_routers(q_model, fp_model, SAMPLES)
    assert caplog.text.count("cannot be run block by block (what reaches") == 2
    assert any(refit.applied for refit in refits)


def test_why_a_model_is_not_streamed():
    model = tiny.tiny_model("qwen3_moe")
    routers = find_routers(model)
    router = routers[-1].name
    assert (
        decoder_blocks(model.model.layers[0], find_routers(model.model.layers[0])) == ()
    )
    assert "not in one list" in why_not_streamed(model, (), SAMPLES[:1], router)
    blocks = decoder_blocks(model, routers)
    assert why_not_streamed(model, blocks, SAMPLES[:2], router) == ""
    model.model.layers[1].forward = None
    reason = why_not_streamed(model, blocks, SAMPLES[:1], router)
    assert reason.startswith("TypeError: ")


def test_whole_passes_are_the_models_own():
    model = tiny.tiny_model("solar_open")
    routers = find_routers(model)
    with torch.no_grad():
        stream = BlockStream(model, decoder_blocks(model, routers), SAMPLES)
        whole = WholePasses(model, SAMPLES)
        assert len(stream) == len(whole) == len(SAMPLES)
        for router in routers:
            stream.advance_to(router.name)
            for sample in (0, 63):
                torch.testing.assert_close(
                    stream.router_input(router.name, sample),
                    whole.router_input(router.name, sample),
                )
