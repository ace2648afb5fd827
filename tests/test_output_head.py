# SPDX-License-Identifier: Apache-2.0
"""The model's own code behind its last block, against its own full forward."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

import tiny
from vsraq.tokens.output_head import output_head

FAMILIES = ["llama", "solar_open", "granitemoe", "nemotron_h", "gpt_oss", "qwen2_moe"]


def blocks_of(model):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    name = next(n for n in names if n.endswith("layers"))
    return [f"{name}.{i}" for i in range(len(model.get_submodule(name)))]


def last_hidden(model, input_ids):
    """Hidden states behind the last block, and the logits of the same forward."""
    seen = []
    last = model.get_submodule(blocks_of(model)[-1])
    handle = last.register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        logits = model(input_ids).logits
    handle.remove()
    (hidden,) = seen
    return hidden, logits


def state(model):
    return {
        **{n: (id(p), p.data_ptr()) for n, p in model.named_parameters()},
        **{n: (id(b), b.data_ptr()) for n, b in model.named_buffers()},
        **{n: "forward" in vars(m) for n, m in model.named_modules()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_full_forward(family):
    overrides = {"logits_scaling": 7.0} if family == "granitemoe" else {}
    model = tiny.tiny_model(family, **overrides)
    input_ids = torch.cat(tiny.calibration(samples=3))
    hidden, logits = last_hidden(model, input_ids)
    before = state(model)
    with output_head(model, blocks_of(model), device="cpu") as head:
        torch.testing.assert_close(head(hidden), logits)
        one = head(hidden[1, 5:9])
        assert not one.requires_grad
        torch.testing.assert_close(one, logits[1, 5:9])
    assert state(model) == before
    again, _ = last_hidden(model, input_ids)
    assert torch.equal(again, hidden)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_computes_in_another_dtype(device):
    model = tiny.tiny_model("solar_open").bfloat16()
    hidden, _ = last_hidden(model, torch.cat(tiny.calibration(samples=3)))
    with output_head(model.float(), blocks_of(model)) as head:
        expected = head(hidden.float())
    model.bfloat16()
    before = state(model)
    options = {"device": device, "dtype": torch.float32}
    with output_head(model, blocks_of(model), **options) as head:
        assert torch.equal(head(hidden.float()), expected)
    assert state(model) == before
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_scale_and_softcap_are_the_models_own():
    """Cohere scales its logits, Gemma 2 caps them and scales its embeddings."""
    shape = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    for config in (
        CohereConfig(**shape, **special, logit_scale=0.25),
        Gemma2Config(**shape, **special, head_dim=32, final_logit_softcapping=3.0),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        hidden, logits = last_hidden(model, torch.cat(tiny.calibration(samples=2)))
        with output_head(model, blocks_of(model)) as head:
            torch.testing.assert_close(head(hidden), logits)


def test_blocks_may_be_on_meta_and_return_tuples():
    model = tiny.tiny_model("solar_open")
    hidden, logits = last_hidden(model, tiny.calibration()[0])
    blocks = blocks_of(model)
    for name in blocks:
        model.get_submodule(name).to("meta")
    with output_head(model, blocks, device="cpu") as head:
        torch.testing.assert_close(head(hidden), logits)
    model.lm_head.to("meta")
    with (
        pytest.raises(RuntimeError, match=r"lm_head.weight: .* not in memory"),
        output_head(model, blocks, device="cpu"),
    ):
        pass
    assert not any("forward" in vars(model.get_submodule(name)) for name in blocks)


def test_the_model_is_as_before_after_an_exception():
    model = tiny.tiny_model("solar_open")
    before = state(model)
    with (
        pytest.raises(RuntimeError, match="planted"),
        output_head(model, blocks_of(model), device="cpu"),
    ):
        raise RuntimeError("planted")
    assert state(model) == before


def test_what_is_not_a_stack_of_blocks_is_refused():
    model = tiny.tiny_model("llama")
    hidden, _ = last_hidden(model, tiny.calibration()[0])
    model.unused = nn.Linear(2, 2)
    with (
        output_head(model, ["unused"]) as head,
        pytest.raises(RuntimeError, match="called 0 of the blocks unused"),
    ):
        head(hidden)
    with (
        pytest.raises(NotImplementedError, match="Linear: its forward takes no inputs"),
        output_head(nn.Linear(2, 2), []),
    ):
        pass
