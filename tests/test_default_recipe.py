# SPDX-License-Identifier: Apache-2.0
"""`VSRAQConfig()`: the recipe, and what naming one of its parts does to the others."""

from dataclasses import replace

import pytest

import tiny
from test_autoround import same, tuned
from tiny import block_lines
from vsraq import VSRAQConfig
from vsraq.options import DEFAULT_RECIPE, Alignment


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, DEFAULT_RECIPE),
        ({"objective": "router_kl"}, replace(DEFAULT_RECIPE, objective="router_kl")),
        ({"router_weight": 0.01}, Alignment(0.01, 0.0, False)),
        ({"router_weight": 0}, Alignment(0, "auto", True)),
        ({"next_router_weight": 0}, Alignment("auto", 0, True)),
        ({"realign_routers": False}, Alignment("auto", "auto", False)),
        ({"router_weight": 0, "realign_routers": False}, Alignment(0, "auto", False)),
        ({"router_weight": 0, "realign_routers": True}, Alignment(0, 0.0, True)),
        ({"router_weight": 0.1, "realign_routers": False}, Alignment(0.1, 0.0, False)),
        (tiny.PLAIN, Alignment(0, 0, False)),
        ({"next_router_weight": "auto"}, Alignment(0.0, "auto", False)),
        ({"realign_routers": True}, Alignment(0.0, 0.0, True)),
        (
            {"router_weight": "auto", "realign_routers": True},
            Alignment("auto", 0.0, True),
        ),
    ],
)
def test_switching_parts_on_or_off(named, expected):
    """On: only those. Off: the others stay."""
    assert VSRAQConfig(**named).alignment == expected


def test_on_or_off():
    assert DEFAULT_RECIPE
    assert Alignment(0.0, 0.0, True)
    assert not Alignment(0, 0.0, False)


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_recipe_is_the_sum_of_its_parts(scheme, quantize, vsraq_log):
    by_default = tuned(quantize, VSRAQConfig(iters=3), scheme=scheme)
    first, last = block_lines(vsraq_log)
    assert float(first["weight"]) > 0
    assert float(first["next_weight"]) > 0
    assert last["next_weight"] is None
    assert sum("held-out logit error" in m for m in vsraq_log) == 2
    by_hand = VSRAQConfig(
        iters=3,
        objective="top3k_mse",
        router_weight="auto",
        next_router_weight="auto",
        auto_ratio=1.0,
        realign_routers=True,
    )
    assert same(by_default, tuned(quantize, by_hand, scheme=scheme))


def test_options_given_to_autoround_directly_switch_the_others_off(quantize, vsraq_log):
    """AutoRound sets them on a configuration that it has built already."""
    direct = tuned(quantize, "vsraq", iters=2, router_weight=5.0)
    assert [line["next_weight"] for line in block_lines(vsraq_log)] == [None, None]
    config = VSRAQConfig(iters=2, router_weight=5.0)
    assert same(direct, tuned(quantize, config))


def test_one_sample_is_refused_before_the_first_block(quantize, monkeypatch):
    """Re-fitting needs a second one; without it, one sample is enough."""
    monkeypatch.setattr("vsraq.autoround.VSRAQQuantizer.quantize_block", None)
    one = {"dataset": tiny.calibration(samples=1), "nsamples": 1, "batch_size": 1}
    with pytest.raises(ValueError, match=r"nsamples=1: re-fitting routers needs 2"):
        quantize(tiny.tiny_model("solar_open"), VSRAQConfig(iters=1), **one)
