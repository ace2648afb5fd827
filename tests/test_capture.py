# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import tiny
from vsraq.capture import RouterCapture
from vsraq.routers import find_routers


def hook_count(module):
    """Hooks of ours; transformers leaves its own recorders on a model."""
    return sum(
        hook.__module__.startswith("vsraq")
        for m in module.modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )


@pytest.fixture
def model():
    return tiny.tiny_model("solar_open")


@pytest.fixture
def input_ids():
    return torch.cat(tiny.calibration(samples=3))


def test_logits_of_every_router(model, input_ids):
    routers = find_routers(model)
    with RouterCapture(model, routers) as capture:
        assert hook_count(model) == len(routers)
        output = model(input_ids, output_router_logits=True)
        kept = capture.take()
    assert hook_count(model) == 0
    for router, own in zip(routers, output.router_logits, strict=True):
        (logits,) = kept[router.name]
        assert logits.requires_grad
        torch.testing.assert_close(logits, own.view_as(logits))


def test_take_returns_one_item_per_call_and_clears(model, input_ids):
    with RouterCapture(model, find_routers(model)) as capture:
        model(input_ids)
        model(input_ids)
        assert [len(kept) for kept in capture.take().values()] == [2, 2]
        model(input_ids)
        assert [len(kept) for kept in capture.take().values()] == [1, 1]


def test_keep_decides_what_is_stored(model, input_ids):
    def keep(router, logits):
        return router.name, logits.shape

    with RouterCapture(model, find_routers(model), keep) as capture:
        model(input_ids)
        tokens = input_ids.numel()
        for name, kept in capture.take().items():
            assert kept == [(name, (tokens, tiny.EXPERTS))]


def test_hooks_are_gone_after_an_exception(model, input_ids):
    def interrupted():
        with RouterCapture(model, find_routers(model)):
            model(input_ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hook_count(model) == 0


def test_a_silent_router_is_an_error(model, input_ids):
    routers = find_routers(model)
    with RouterCapture(model, routers) as capture:
        model.model.layers[0](
            model.model.embed_tokens(input_ids),
            position_embeddings=model.model.rotary_emb(
                model.model.embed_tokens(input_ids),
                torch.arange(input_ids.shape[1]).unsqueeze(0),
            ),
        )
        with pytest.raises(RuntimeError, match=rf"{routers[1].name} .*was not called"):
            capture.take()


def test_nothing_to_capture_is_an_error():
    with pytest.raises(ValueError, match="has no router to capture"):
        RouterCapture(tiny.tiny_model("llama"), ())


def test_opening_twice_is_an_error(model):
    capture = RouterCapture(model, find_routers(model))
    with capture, pytest.raises(RuntimeError, match="is open already"):
        capture.open()
    assert hook_count(model) == 0


def test_two_captures_of_one_model_are_an_error(model, input_ids):
    routers = find_routers(model)
    with (
        RouterCapture(model, routers) as capture,
        pytest.raises(RuntimeError, match="allowed is one at a time"),
    ):
        RouterCapture(model, routers).open()
    with RouterCapture(model, routers) as capture:  # the first one was closed
        model(input_ids)
        assert capture.take()
