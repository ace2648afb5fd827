# SPDX-License-Identifier: Apache-2.0
"""The probe of the automatic weights holds one gradient at a time."""

import weakref

import pytest
import torch
from torch import nn

from vsraq.autoround.balance import _magnitudes

WIDTH, LAYERS = 64, 6


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)
    ).double()


def loss_of(layers):
    hidden_states = torch.ones(3, WIDTH, dtype=torch.float64)
    for layer in layers[:-1]:  # the last one is not reached
        hidden_states = layer(hidden_states).tanh()
    return hidden_states.square().mean()


def test_the_same_sums_as_all_gradients_at_once(layers):
    parameters = list(layers.parameters())
    expected = torch.autograd.grad(loss_of(layers), parameters, allow_unused=True)
    found = _magnitudes(loss_of(layers), parameters, keep_graph=False)
    assert found[:-1] == [gradient.abs().sum().item() for gradient in expected[:-1]]
    assert expected[-1] is found[-1] is None


def test_a_gradient_of_zero_is_not_a_missing_one(layers):
    parameters = list(layers.parameters())
    found = _magnitudes(0 * loss_of(layers), parameters, keep_graph=False)
    assert found == [0.0] * (LAYERS - 1) + [None]


def test_one_gradient_at_a_time(layers):
    """What is alive of the gradients whenever another one is complete."""
    gradients, most = [], 0

    def note(parameter):
        nonlocal most
        gradients.append(weakref.ref(parameter.grad.untyped_storage()))
        most = max(most, sum(gradient() is not None for gradient in gradients))

    parameters = list(layers.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(note)
    _magnitudes(loss_of(layers), parameters, keep_graph=True)
    assert len(gradients) == LAYERS - 1
    assert most == 1


def test_nothing_stays(layers):
    parameters = list(layers.parameters())
    loss = loss_of(layers)
    first = _magnitudes(loss, parameters, keep_graph=True)
    assert first == _magnitudes(loss, parameters, keep_graph=False)
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_hooks_are_gone_after_a_failure(layers):
    parameters = list(layers.parameters())
    loss = loss_of(layers)
    loss.backward()  # frees the graph
    for parameter in parameters:
        parameter.grad = None
    with pytest.raises(RuntimeError, match="second time"):
        _magnitudes(loss, parameters, keep_graph=False)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)
