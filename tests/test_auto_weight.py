# SPDX-License-Identifier: Apache-2.0
"""Automatic weights: balanced once per block, then as if they had been given."""

from types import SimpleNamespace

import pytest
import torch

import tiny
from test_autoround import padded, same, tuned, weights
from tiny import block_lines
from vsraq import VSRAQConfig
from vsraq.autoround import VSRAQQuantizer
from vsraq.autoround.balance import balance_terms
from vsraq.autoround.block_tuning import BlockTuning


@pytest.fixture
def weights_found(monkeypatch):
    """The exact weight of every term, by block: the log rounds."""
    found = {}
    probe = BlockTuning.probe

    def spy(self, *args):
        probe(self, *args)
        found[self.name] = {term.label: term.weight for term in self.terms}

    monkeypatch.setattr(BlockTuning, "probe", spy)
    return found


def automatic(**kwargs):
    options = {
        "iters": 4,
        "objective": "top3k_mse",
        "router_weight": "auto",
        "next_router_weight": "auto",
        "not_use_best_mse": True,
    }
    return VSRAQConfig(**options | kwargs)


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_same_bits_as_with_that_weight_given(
    scheme, quantize, weights_found, vsraq_log
):
    """One block's two weights, given as numbers, give that block's weights again."""
    _, model = quantize(tiny.tiny_model("solar_open"), automatic(), scheme)
    block = "model.layers.0"
    given = dict(weights_found[block])
    assert all(weight > 0 for weight in given.values())
    line = block_lines(vsraq_log)[0]
    assert float(line["weight"]) == pytest.approx(given["router"], rel=1e-3)
    assert float(line["next_weight"]) == pytest.approx(given["next router"], rel=1e-3)
    fixed = automatic(
        router_weight=given["router"], next_router_weight=given["next router"]
    )
    _, again = quantize(tiny.tiny_model("solar_open"), fixed, scheme)

    def of_block(model):
        return {n: w for n, w in weights(model).items() if n.startswith(block)}

    assert same(of_block(model), of_block(again))
    assert not same(
        weights(model), tuned(quantize, automatic(auto_ratio=100.0), scheme=scheme)
    )


def test_deterministic(quantize, weights_found):
    first = tuned(quantize, automatic())
    found = {block: dict(own) for block, own in weights_found.items()}
    assert same(first, tuned(quantize, automatic()))
    assert weights_found == found


def test_proportional_to_the_ratio(quantize, weights_found):
    tuned(quantize, automatic(iters=1, auto_ratio=0.25))
    found = weights_found["model.layers.0"]
    tuned(quantize, automatic(iters=1, auto_ratio=0.5))
    for label, weight in weights_found["model.layers.0"].items():
        assert weight == pytest.approx(2 * found[label])


def test_the_gradients_have_that_ratio(quantize, monkeypatch):
    """In the first step, over the layers that the router loss reaches."""
    step = VSRAQQuantizer._step
    gradients = []

    def spy(self, scaler, optimizer, lr_schedule):
        if self.tuning is not None and self.tuning.name == "model.layers.0":
            (term,) = self.tuning.terms
            assert term.reached == 4
            own = [
                p.grad.clone()
                for n, m in blocks[-1].named_modules()
                if n.startswith("self_attn.") and hasattr(m, "orig_layer")
                for p in m.params.values()
                if p.grad is not None
            ]
            gradients.append(torch.cat([g.flatten() for g in own]))
        step(self, scaler, optimizer, lr_schedule)

    blocks = []
    wrapped = BlockTuning.probe

    def keep_block(self, block, *args):
        blocks.append(block)
        wrapped(self, block, *args)

    monkeypatch.setattr(VSRAQQuantizer, "_step", spy)
    monkeypatch.setattr(BlockTuning, "probe", keep_block)

    def first_gradient(ratio):
        gradients.clear()
        # all samples in one micro-batch, so that the first step sees what was balanced
        tuned(
            quantize,
            automatic(iters=1, next_router_weight=0, auto_ratio=ratio),
            batch_size=8,
            amp=False,
        )
        return gradients[0]

    # g(ratio) = g_rec + ratio * u with |u| = |g_rec|, both sums of magnitudes
    half, one, two = (first_gradient(ratio) for ratio in (0.5, 1.0, 2.0))
    u = two - one
    reconstruction = one - u
    assert (half - reconstruction - 0.5 * u).abs().sum() < 0.01 * half.abs().sum()
    ratio = (u.abs().sum() / reconstruction.abs().sum()).item()
    assert ratio == pytest.approx(1.0, rel=0.02)


def test_padding_does_not_shift_the_balance(quantize, weights_found):
    """Half of the tokens masked: both gradients are those of the other half."""
    tuned(quantize, automatic(iters=1), dataset=padded(0), amp=False)
    masked = weights_found["model.layers.0"]["router"]
    samples = [ids[:, : tiny.SEQLEN // 2] for ids in padded(0)]
    tuned(
        quantize,
        automatic(iters=1),
        dataset=samples,
        seqlen=tiny.SEQLEN // 2,
        amp=False,
    )
    assert weights_found["model.layers.0"]["router"] == pytest.approx(masked, rel=0.1)


def test_a_term_that_reaches_nothing_gets_no_weight(quantize, weights_found, vsraq_log):
    quantize(tiny.tiny_model("nemotron_h"), automatic(iters=1))
    assert weights_found["model.layers.1"]["router"] == 0
    assert weights_found["model.layers.1"]["next router"] > 0
    assert any("own-router loss tunes nothing" in m for m in vsraq_log)


@pytest.mark.parametrize("option", ["enable_adam", "enable_alg_ext"])
def test_with_the_variants_of_the_loop(option, quantize, vsraq_log):
    tuned(quantize, automatic(iters=2, **{option: True}))
    for line in block_lines(vsraq_log):
        assert float(line["weight"]) > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router_weight": "automatic"}, r'allowed is a finite number >= 0, or "auto"'),
        ({"next_router_weight": -1}, r"next_router_weight=-1: allowed"),
        ({"next_router_weight": True}, r"next_router_weight=True: allowed"),
        ({"router_weight": "auto", "auto_ratio": 0}, r"auto_ratio=0: allowed .* > 0"),
        (
            {"router_weight": 1.0, "auto_ratio": 0.5},
            r"auto_ratio=0.5: it has no effect",
        ),
        (
            {"lookahead": 3},
            r"lookahead=3: it has no effect without a next_router_weight",
        ),
        (
            {"next_router_weight": 1.0, "lookahead": 0},
            r"lookahead=0: allowed is an int",
        ),
        (
            {"next_router_objective": "vsraq"},
            r"has no effect without a next_router_weig",
        ),
        (
            {"next_router_weight": 1.0, "next_router_objective": "vsrag"},
            r"Did you mean 'vsraq'",
        ),
        (
            {"realign_routers": True, "objective": {"name": "vsraq", "alpha": 0.5}},
            r"'alpha': 0.5}: its hyper-parameters have no effect without a term",
        ),
        (
            {
                "next_router_weight": 1.0,
                "next_router_objective": "vsraq",
                "objective": {"name": "margin", "boundary": 2},
            },
            r"'boundary': 2}: its hyper-parameters have no effect without a term",
        ),
        ({"ridge": 0.1}, r'ridge=0.1: .* write realign_routers=\{"ridge": \.\.\.\}'),
        ({"tau": 0.1}, r'tau=0.1: it is no option .* token_selection=\{"tau": '),
        ({"alpha": 0.1}, r'alpha=0.1: .* objective=\{"name": "vsraq", "alpha": '),
        ({"realign_routers": {"ridge": 0}}, r"realign_routers.ridge=0: allowed"),
        (
            {"realign_routers": {}},
            r"realign_routers=\{\}: allowed is True, False, or a",
        ),
        (
            {"realign_routers": {"wieghting": "top_3k"}},
            r"realign_routers.wieghting: unknown key; did you mean",
        ),
        (
            {"realign_routers": {"weighting": "top"}},
            r"realign_routers.weighting='top': allowed is uniform, top_3k, boundary",
        ),
        ({"realign_routers": 1}, r"realign_routers=1: allowed is True, False"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VSRAQConfig(**tiny.PLAIN | kwargs)


class Wrapped(torch.nn.Module):
    """What AutoRound's wrappers have: a layer, and what is tuned of it."""

    def __init__(self, value):
        super().__init__()
        self.orig_layer = None
        vars(self)["params"] = {"value": torch.tensor(value, requires_grad=True)}


def test_gradients_that_are_not_finite_are_left_out_and_named(vsraq_log):
    """A NaN used to make the automatic weight 0, without a word."""
    block = torch.nn.ModuleDict({"good": Wrapped(2.0), "bad": Wrapped(0.0)})
    good, bad = (vars(m)["params"]["value"] for m in block.values())

    def weight(broken):
        term = SimpleNamespace(weight="auto", reached=0, reaches_something=False)

        def micro_batch():
            router = 2 * good + (bad.sqrt() * 0.0 if broken else bad)
            return 6 * good + bad, [router]

        balance_terms(block, [term], [micro_batch], 1.0, "layers.7")
        assert term.reaches_something
        return term.weight

    assert weight(broken=False) == pytest.approx((6 + 1) / (2 + 1))
    assert not vsraq_log
    assert weight(broken=True) == pytest.approx(6 / 2)
    (line,) = vsraq_log
    assert line.startswith("vsraq: block layers.7: the gradients of 1 of 2 quantized")
    assert "(bad)" in line
