# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import tiny
from test_capture import hook_count
from vsraq.analysis import closeness
from vsraq.routers import find_routers

BATCHES = torch.cat(tiny.calibration(samples=6)).split(2)


def test_a_model_agrees_with_itself():
    model = tiny.tiny_model("solar_open")
    result = closeness(model, model, BATCHES)
    assert result.kl == result.excess_nll == result.excess_nll_error == 0
    assert set(result.jaccard.values()) == {1.0}
    assert list(result.jaccard) == [r.name for r in find_routers(model)]
    losses = [model(ids, labels=ids).loss.item() for ids in BATCHES]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)))


def test_figures_of_a_changed_model():
    model, changed = tiny.tiny_model("glm4_moe"), tiny.tiny_model("glm4_moe")
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.o_proj.weight.mul_(1.3)
    result = closeness(changed, model, BATCHES)
    assert result.kl > 0
    assert 0 < result.mean_jaccard < 1
    assert hook_count(model) == hook_count(changed) == 0


def test_the_excess_nll_is_the_difference_of_losses_over_sequences():
    model, changed = tiny.tiny_model("olmoe"), tiny.tiny_model("olmoe")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    result = closeness(changed, model, BATCHES)
    differences = torch.tensor(
        [
            [m(ids, labels=ids).loss.item() for m in (changed, model)]
            for ids in torch.cat(list(BATCHES)).split(1)
        ]
    ).double()
    excess = differences[:, 0] - differences[:, 1]
    assert result.excess_nll == pytest.approx(excess.mean().item(), rel=1e-4)
    error = excess.std().item() / math.sqrt(len(excess))
    assert result.excess_nll_error == pytest.approx(error, rel=1e-3)
    assert math.isnan(closeness(changed, model, [BATCHES[0][:1]]).excess_nll_error)


def test_the_correction_bias_counts():
    model, biased = tiny.tiny_model("solar_open"), tiny.tiny_model("solar_open")
    for layer in biased.model.layers:
        layer.mlp.gate.e_score_correction_bias[0] += 10  # expert 0 for every token
    result = closeness(biased, model, BATCHES)
    assert result.jaccard["model.layers.0.mlp.gate"] < 1


def test_other_routers_are_refused():
    with pytest.raises(ValueError, match="allowed are equal ones"):
        closeness(tiny.tiny_model("olmoe"), tiny.tiny_model("glm4_moe"), BATCHES)
