# SPDX-License-Identifier: Apache-2.0
"""A block that AutoRound gets without its model, as llm-compressor gives it."""

import pytest
import torch
from auto_round import AutoRound
from torch import nn

import tiny
from vsraq import VSRAQConfig

OWN = {"router_weight": "auto", "iters": 1}


class LoneBlock(nn.Module):
    """What llm-compressor's AutoRoundModifier wraps around a block."""

    def __init__(self, model, index):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([model.model.layers[index]])
        self.config = model.config
        self.dtype = model.dtype
        self.name_or_path = ""


def tune(family, config):
    model = tiny.tiny_model(family)
    hidden = model.model.embed_tokens(torch.cat(tiny.calibration())).detach()
    embeddings = model.model.rotary_emb(hidden, torch.arange(tiny.SEQLEN)[None])
    kwargs = {"position_embeddings": embeddings, "attention_mask": None}
    lone = LoneBlock(model, 0)
    run = AutoRound(lone, "", scheme="W4A16", alg_configs=config, **tiny.RUN)
    run.configure_layer_config(enable_gguf_official_mixed=False)
    run.batch_dim = 0
    inputs = [(((h,), kwargs),) for h in hidden.split(1)]
    run.quantize_block(lone.model.layers[0], inputs)


def test_the_router_of_a_lone_block_is_aligned(vsraq_log):
    tune("qwen3_moe", VSRAQConfig(**OWN))
    (line,) = tiny.block_lines(vsraq_log)
    assert float(line["weight"]) > 0
    assert int(line["reached"]) == 4


def test_the_next_router_of_a_lone_block_is_refused():
    """It used to be left out, with a line of information."""
    with pytest.raises(NotImplementedError, match="one block without the model"):
        tune("qwen3_moe", VSRAQConfig(iters=1))


def test_tokens_per_expert_of_a_lone_block(vsraq_log):
    """The options used to keep their defaults there, and nothing was reported."""
    tune("qwen3_moe", VSRAQConfig(**OWN, min_tokens_per_expert=10**6))
    assert any("fewer than 1000000 calibration tokens" in m for m in vsraq_log)
    options = {"min_tokens_per_expert": 10**6, "on_unreached": "error"}
    with pytest.raises(ValueError, match="min_tokens_per_expert=1000000"):
        tune("qwen3_moe", VSRAQConfig(**OWN, **options))


def test_a_lone_dense_block_is_tuned_and_named(vsraq_log):
    """It used to end the run: a dense first block looked like a dense model."""
    tune("glm4_moe", VSRAQConfig(**OWN))
    assert any("Glm4MoeDecoderLayer, without a MoE router" in m for m in vsraq_log)
