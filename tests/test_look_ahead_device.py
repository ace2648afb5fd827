# SPDX-License-Identifier: Apache-2.0
"""Where the block that is looked ahead at runs."""

import pytest
import torch
from auto_round.utils.device import set_non_auto_device_map

import tiny
from vsraq import VSRAQConfig
from vsraq.autoround.next_router import NextRouter
from vsraq.look_ahead_device import look_ahead_device

# what AutoRound's own function writes, from maps by name
MAPS = [
    ({"model.layers.1": "cuda:1"}, "cuda:1"),
    ({"model.layers.0": "cuda:1"}, "cuda:0"),
    ({"model.layers.1.self_attn": "cuda:2", "model.layers.0": "cuda:1"}, "cuda:2"),
    # the small part alone
    ({"model.layers.1.input_layernorm": "cuda:1"}, "cuda:0"),
]


@pytest.mark.parametrize(("device_map", "expected"), MAPS)
def test_a_map_by_name_decides(device_map, expected):
    model = tiny.tiny_model("solar_open")
    set_non_auto_device_map(model, device_map)
    block = model.model.layers[1]
    del block.mlp.experts, block.mlp.shared_experts  # as it is looked ahead at
    assert look_ahead_device(block, "cuda:0") == expected


def test_without_a_map_it_is_the_default():
    block = tiny.tiny_model("solar_open").model.layers[1]
    assert look_ahead_device(block, torch.device("cpu")) == torch.device("cpu")


def test_a_run_asks_with_the_device_of_the_loss(quantize, monkeypatch):
    """The one that AutoRound's `dispatch_block` chose for the block that is tuned."""
    asked, devices = [], []
    values = NextRouter.values

    def ask(block, default):
        asked.append(default)
        return look_ahead_device(block, default)

    def spy(self, *args):
        devices.append({p.device for block in self._blocks for p in block.parameters()})
        return values(self, *args)

    monkeypatch.setattr("vsraq.autoround.next_router.look_ahead_device", ask)
    monkeypatch.setattr(NextRouter, "values", spy)
    run, _ = quantize(tiny.tiny_model("solar_open"), VSRAQConfig(iters=1))
    assert asked == [run.alg_composer.block_quantizer._loss_device]
    assert devices
    assert all(found == {torch.device("cpu")} for found in devices)
