# SPDX-License-Identifier: Apache-2.0
"""Hybrids: one mask for Mamba, attention and MoE layers alike."""

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calib_dataset import CALIB_DATASETS
from datasets import Dataset

import tiny
from test_autoround import same, weights
from vsraq import VSRAQConfig
from vsraq.hybrids import adapt_attention_mask, layer_kinds

HYBRID = tiny.tiny_model("nemotron_h")
BLOCKS = [f"model.layers.{index}" for index in range(4)]


def masks(*rows):
    return [torch.tensor([row]) for row in rows]


def adapted(model, cached):
    adapt_attention_mask(model, BLOCKS[: len(model.model.layers)], cached)
    return cached["attention_mask"]


def test_the_kinds_of_layers():
    kinds = layer_kinds(HYBRID, BLOCKS)
    assert kinds == ("linear_attention", "moe", "full_attention", "moe")
    solar = layer_kinds(tiny.tiny_model("solar_open"), BLOCKS[:2])
    assert len(set(solar)) == 1


@pytest.mark.parametrize(
    "cached",
    [
        masks([1, 1, 1], [1, 1, 1]),
        masks([1, 1, 0], [1, 0, 0]),
        masks([True, False, False]),
        torch.ones(2, 3).long(),
    ],
)
def test_a_mask_of_the_end_is_dropped(cached):
    assert adapted(HYBRID, {"attention_mask": cached}) is None


def test_any_other_mask_is_refused():
    cached = {"attention_mask": masks([1, 1, 1], [0, 1, 1])}
    with pytest.raises(
        ValueError, match=r"1 linear_attention, 2 moe, 1 full_attention, and 1 calib"
    ):
        adapted(HYBRID, cached)


def test_attention_that_needs_its_mask_is_refused():
    eager = tiny.tiny_model("nemotron_h")
    eager.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="attn_implementation='eager' is not causal"):
        adapted(eager, {"attention_mask": masks([1, 1, 0])})


@pytest.mark.parametrize(
    "cached", [None, [None, None], [torch.ones(1, 1, 3, 3, dtype=torch.bool)]]
)
def test_other_masks_stay(cached):
    assert adapted(HYBRID, {"attention_mask": cached}) is cached


def test_flash_attention_takes_any_mask():
    """Sliding and full attention are two kinds, and both take it."""
    model = tiny.tiny_model("gpt_oss")
    kinds = layer_kinds(model, BLOCKS[:2])
    assert set(kinds) == {"sliding_attention", "full_attention"}
    model.config._attn_implementation = "flash_attention_2"
    cached = masks([False, True, True])
    assert adapted(model, {"attention_mask": cached}) is cached


def test_a_model_of_one_kind_keeps_its_mask():
    cached = masks([1, 1, 0])
    assert adapted(tiny.tiny_model("solar_open"), {"attention_mask": cached}) is cached


def test_tensors_give_the_same_weights_as_a_data_set(quantize, monkeypatch):
    """AutoRound crashes on tensors, which get a mask, and runs on a named data set."""
    options = {"iters": 2, "not_use_best_mse": True}
    with pytest.raises(RuntimeError, match="Expected attn_mask dtype"):
        quantize(tiny.tiny_model("nemotron_h"), SignRoundConfig(**options))
    ids = torch.cat(tiny.calibration()).tolist()
    masks = [[1] * tiny.SEQLEN] * len(ids)

    def load(*args, **kwargs):
        return Dataset.from_dict({"input_ids": ids, "attention_mask": masks})

    monkeypatch.setitem(CALIB_DATASETS, "tiny", load)
    _, plain = quantize(
        tiny.tiny_model("nemotron_h"), SignRoundConfig(**options), dataset="tiny"
    )
    config = VSRAQConfig(**options, **tiny.PLAIN)
    _, from_tensors = quantize(tiny.tiny_model("nemotron_h"), config)
    assert same(weights(plain), weights(from_tensors))


def test_left_padding_is_refused_before_the_first_block():
    samples = [
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([0]), 0),
        }
        for ids in tiny.calibration()
    ]
    run = AutoRound(
        tiny.tiny_model("nemotron_h"),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=1),
        dataset=samples,
        **tiny.RUN,
    )
    with pytest.raises(ValueError, match="padded before their end"):
        run.quantize()
