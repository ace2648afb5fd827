# SPDX-License-Identifier: Apache-2.0
"""`rank_by="selection"`: the ranks of the losses are those of the real choice."""

import pytest
import torch

import tiny
from reference import logits_of
from test_autoround import same, weights
from vsraq import VSRAQConfig
from vsraq.routers import find_routers


def config(**kwargs):
    options = {"iters": 2, "router_weight": 1.0, "not_use_best_mse": True}
    return VSRAQConfig(**{"objective": "margin"} | options | kwargs)


def biased(family="glm4_moe"):
    """A model whose correction bias decides often."""
    model = tiny.tiny_model(family)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.randn_like(buffer))
    return model


@pytest.mark.parametrize("realign", [False, True])
def test_the_ranks_are_those_of_the_routers_choice(realign, quantize, terms):
    model = biased()
    routers = {r.name: r.bind(model) for r in find_routers(model)}
    options = {
        "next_router_weight": 1.0,
        "objective": {"name": "router_kl", "top_m": 8},
    }
    if realign:
        options["realign_routers"] = True
    quantize(model, config(rank_by="selection", **options))
    checked = 0
    for block, by_label in terms:
        for term in by_label.values():
            (router,) = term.routers
            own = term.label == "router"
            index = int(block.rpartition(".")[2]) + (0 if own else 1)
            name = f"model.layers.{index}.{router.name}"
            for target in term.fp_targets[router.name]:
                ranking = routers[name].ranking(logits_of(target))
                by_logits = logits_of(target).argsort(-1, descending=True)
                assert torch.equal(target.indices.long(), ranking)
                assert not torch.equal(ranking, by_logits)
                checked += 1
    assert checked == (2 + 2) * tiny.RUN["nsamples"]


def test_other_ranks_tune_other_weights(quantize):
    _, by_selection = quantize(biased(), config(rank_by="selection"))
    _, by_logits = quantize(biased(), config(rank_by="logits"))
    assert not same(weights(by_selection), weights(by_logits))


def test_where_both_rankings_agree_it_is_refused(quantize):
    with pytest.raises(ValueError, match=r"every router .* chooses the highest logits"):
        quantize(tiny.tiny_model("qwen3_moe"), config(rank_by="selection"))


def test_an_unknown_selection_is_refused(quantize):
    model = tiny.tiny_model("solar_open")
    for layer in model.model.layers:
        gate = layer.mlp.gate
        gate.register_buffer("other_bias", torch.zeros(tiny.EXPERTS))
    with pytest.raises(ValueError, match=r"which experts router \S+ chooses is unkn"):
        quantize(model, config(rank_by="selection"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_by": "scores"}, "rank_by='scores': allowed is logits, selection"),
        (
            {"rank_by": "selection", "router_weight": 0, "realign_routers": True},
            "no effect without a router_weight or next_router_weight",
        ),
        (
            {"rank_by": "selection", "objective": "input_mse"},
            "no effect without an objective that does not treat all experts alike",
        ),
        (
            {"rank_by": "selection", "objective": "mse_kl"},
            "no effect without an objective that does not treat all experts alike",
        ),
        (
            {"rank_by": "selection", "objective": {"name": "full_mse"}},
            "no effect without an objective that does not treat all experts alike",
        ),
    ],
)
def test_refused_options(options, message):
    if options.get("router_weight") == 0:
        options = options | {"objective": "top3k_mse"}
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_first_ranks_of_a_divergence_depend_on_the_ranking():
    own = config(rank_by="selection", objective={"name": "mse_kl", "top_m": 8})
    assert own.alignment.rank_by == "selection"
