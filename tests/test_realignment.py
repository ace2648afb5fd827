# SPDX-License-Identifier: Apache-2.0
"""Routers re-fitted in closed form, against numpy and on real models."""

import copy
import gc
import weakref

import numpy
import pytest
import torch
from torch import nn

import tiny
from vsraq.capture import RouterCapture
from vsraq.realignment import RidgeSums, realign_routers, refit_router
from vsraq.realignment.error_weights import error_weights
from vsraq.routers import (
    BoundRouter,
    Router,
    SelectionRule,
    find_routers,
    router_logits,
)

HIDDEN, EXPERTS, TOP_K = 12, 6, 2


def bound(module):
    """A module that is a router, of no model."""
    return BoundRouter(Router("gate", TOP_K, EXPERTS), module, module)


def least_squares(inputs, residual, ridge, weight=None):
    """The same problem by numpy, the ridge as H more rows."""
    x, r = inputs.double().numpy(), residual.double().numpy()
    if weight is not None:
        root = numpy.sqrt(weight.double().numpy())[:, None]
        x, r = x * root, r * root
    rho = ridge * (x**2).sum(0).mean()
    rows = numpy.concatenate([x, numpy.sqrt(rho) * numpy.eye(x.shape[1])])
    targets = numpy.concatenate([r, numpy.zeros((x.shape[1], r.shape[1]))])
    return numpy.linalg.lstsq(rows, targets, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_the_correction_is_numpys_least_squares(ridge):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, HIDDEN, generator=generator)
    inputs[:, 0] *= 30  # channels of very different size, as after a norm with gains
    residual = torch.randn(200, EXPERTS, generator=generator)
    sums = RidgeSums(HIDDEN, EXPERTS)
    for x, r in zip(inputs.split(64), residual.split(64), strict=True):
        sums.update(x, r)
    expected = least_squares(inputs, residual, ridge)
    numpy.testing.assert_allclose(sums.solve(ridge).numpy(), expected, rtol=1e-4)


def test_weighted_corrections_are_numpys_too():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, HIDDEN, generator=generator)
    residual = torch.randn(200, EXPERTS, generator=generator)
    weights = torch.rand(200, EXPERTS, generator=generator)
    sums = RidgeSums(HIDDEN, EXPERTS, weighted=True)
    for x, r, w in zip(
        *(t.split(64) for t in (inputs, residual, weights)), strict=True
    ):
        sums.update(x, r, w)
    solved = sums.solve(1e-2)
    for expert in range(EXPERTS):
        expected = least_squares(
            inputs, residual[:, expert : expert + 1], 1e-2, weights[:, expert]
        )
        numpy.testing.assert_allclose(solved[expert], expected[0], rtol=1e-4)


def test_an_expert_without_any_weight_stays():
    """In a group that is never chosen, for example."""
    sums = RidgeSums(HIDDEN, 2, weighted=True)
    weights = torch.tensor([[1.0, 0.0]]).expand(50, 2)
    sums.update(torch.randn(50, HIDDEN), torch.randn(50, 2), weights)
    solved = sums.solve()
    assert solved[0].abs().max() > 0
    assert solved[1].eq(0).all()


def test_error_weights():
    scores = torch.tensor([[8.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -torch.inf]])
    assert error_weights(scores, 2, "uniform") is None
    top = error_weights(scores, 2, "top_3k")
    assert top.tolist() == [[1.0] * 6 + [pytest.approx(0.05)] * 2]
    boundary = error_weights(scores, 2, "boundary")[0]
    # the middle is 4.5, the best score 3.5 above it
    assert boundary[0].item() == pytest.approx(1 / 3)
    assert boundary[1] == boundary[2] == boundary.max()
    assert boundary[-1] == 0  # an expert of a group that was not chosen
    flat = error_weights(torch.zeros(1, 4), 2, "boundary")
    assert torch.isfinite(flat).all()
    no_other = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf]])
    assert torch.isfinite(error_weights(no_other, 2, "boundary")).all()
    with pytest.raises(ValueError, match="weighting='top': allowed are uniform"):
        error_weights(scores, 2, "top")


@pytest.mark.parametrize("weighting", ["uniform", "top_3k", "boundary"])
def test_every_weighting_helps_what_it_weighs(router, weighting):
    mixing = torch.eye(HIDDEN) + 0.2 * torch.randn(HIDDEN, HIDDEN)
    moved = samples(copy.deepcopy(router), 0.5, mixing, 0)
    refit = refit_router(bound(router), moved, weighting=weighting)
    assert refit.applied
    assert refit.after < refit.before


def test_overlap_follows_the_real_selection():
    """A correction bias that decides alone: no logit changes what is selected."""
    module = nn.Linear(HIDDEN, EXPERTS, bias=False)
    rule = SelectionRule("sigmoid", biased=True)
    description = Router("gate", TOP_K, EXPERTS, rule, "gate.bias")
    moved = samples(copy.deepcopy(module), 0.5, torch.eye(HIDDEN), 0)
    bias_owner = nn.Module()
    bias_owner.register_buffer("bias", torch.arange(EXPERTS) * 10.0)
    biased = BoundRouter(description, module, bias_owner)
    refit = refit_router(biased, moved)
    assert refit.before_jaccard == refit.after_jaccard == 1.0
    assert refit.before > 0
    logits = torch.randn(3, EXPERTS)
    chosen = biased.select(logits)
    assert chosen.tolist() == [[5, 4]] * 3


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    sums = RidgeSums(HIDDEN, EXPERTS)
    sums.update(torch.ones(3, HIDDEN), torch.ones(3, EXPERTS))
    with pytest.raises(ValueError, match=r"ridge=.*allowed is a number > 0"):
        sums.solve(ridge)


def test_sums_without_tokens_are_refused():
    with pytest.raises(ValueError, match="holds no token"):
        RidgeSums(HIDDEN, EXPERTS).solve()


def samples(router, noise, mixing, seed, count=16, tokens=64):
    """Inputs that a linear map (`mixing`) and noise have moved from where they were."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        original = torch.randn(tokens, HIDDEN, generator=generator)
        moved = original @ mixing
        moved += noise * torch.randn(moved.shape, generator=generator)
        yield moved, router_logits(router, original), None


@pytest.fixture
def router():
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, EXPERTS)


def test_what_a_linear_map_did_is_undone(router):
    mixing = torch.eye(HIDDEN) + 0.1 * torch.randn(HIDDEN, HIDDEN)
    bias = router.bias.clone()
    fp_router = copy.deepcopy(router)
    refit = refit_router(bound(router), samples(fp_router, 0.0, mixing, 0), ridge=1e-9)
    assert refit.applied
    assert refit.after < 1e-4 * refit.before
    assert refit.after_jaccard == 1.0 > refit.before_jaccard
    torch.testing.assert_close(
        router.weight, fp_router.weight @ torch.linalg.inv(mixing).T, atol=1e-4, rtol=0
    )
    assert torch.equal(router.bias, bias)
    assert "re-fitted" in str(refit)


def test_a_router_that_nothing_helps_is_left_alone(router):
    """Targets without any relation to the inputs: fitting them is fitting noise."""
    weight = router.weight.clone()

    def unrelated():
        for inputs, target, mask in samples(router, 0.0, torch.eye(HIDDEN), 0, 4, 8):
            yield inputs, target + 10 * torch.randn_like(target), mask

    refit = refit_router(bound(router), unrelated())
    assert not refit.applied
    assert torch.equal(router.weight, weight)
    assert "left alone" in str(refit)


def test_dtype_and_shape_stay(router):
    router = router.to(torch.bfloat16)
    refit = refit_router(bound(router), samples(router, 0.1, torch.eye(12), 0))
    assert router.weight.dtype == torch.bfloat16
    assert router.weight.shape == (EXPERTS, HIDDEN)
    # the held-out error is that of the weight as it is stored
    assert refit.before != refit.after


def test_masked_tokens_take_no_part(router):
    mixing = torch.eye(HIDDEN) + 0.1 * torch.randn(HIDDEN, HIDDEN)
    clean, spoiled = copy.deepcopy(router), copy.deepcopy(router)

    def with_rubbish():
        for inputs, target, _ in samples(router, 0.1, mixing, 0):
            mask = torch.tensor([1] * len(inputs) + [0] * 8)
            yield (
                torch.cat([inputs, torch.full((8, HIDDEN), 1e4)]),
                torch.cat([target, torch.zeros(8, EXPERTS)]),
                mask,
            )

    refit_router(bound(clean), samples(router, 0.1, mixing, 0))
    refit_router(bound(spoiled), with_rubbish())
    assert torch.equal(clean.weight, spoiled.weight)


def test_samples_without_a_token_that_counts_are_passed_over(router):
    mixing = torch.eye(HIDDEN) + 0.1 * torch.randn(HIDDEN, HIDDEN)
    clean, gaps = copy.deepcopy(router), copy.deepcopy(router)

    def with_gaps():
        for inputs, target, _ in samples(router, 0.1, mixing, 0):
            yield inputs, target, torch.zeros(len(inputs))
            yield inputs, target, torch.ones(len(inputs))

    refit_router(bound(clean), samples(router, 0.1, mixing, 0))
    refit_router(bound(gaps), with_gaps())
    assert torch.equal(clean.weight, gaps.weight)


def test_held_out_samples_do_not_keep_their_batch_alive(router):
    """A sample may be a view of its batch; 8 of 8 batches would stay otherwise."""
    batches = []

    def views():
        for inputs, target, _ in samples(router, 0.1, torch.eye(HIDDEN), 0, 2, 80):
            batches.append(weakref.ref(inputs))
            parts = zip(inputs.split(10), target.split(10), strict=True)
            del inputs, target
            yield from ((x, z, None) for x, z in parts)
        gc.collect()
        assert batches[0]() is None

    refit_router(bound(router), views())
    assert len(batches) == 2


def test_inputs_that_are_not_finite_name_the_router(router):
    def broken():
        for inputs, target, mask in samples(router, 0.1, torch.eye(HIDDEN), 0):
            yield inputs * torch.inf, target, mask

    weight = router.weight.clone()
    with pytest.raises(RuntimeError, match="router gate: its inputs are not finite"):
        refit_router(bound(router), broken())
    assert torch.equal(router.weight, weight)


def test_one_sample_is_too_few(router):
    with pytest.raises(ValueError, match=r"samples=1 .* router gate: allowed are 2"):
        refit_router(bound(router), samples(router, 0.1, torch.eye(HIDDEN), 0, count=1))


# ── whole models, quantized by whatever tool ──────────────────────────────────


def rounded(model, step=0.05):
    """Round every weight of attention and experts, as a tool without tuning does."""
    routers = {f"{router.name}.weight" for router in find_routers(model)}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and name not in routers and "embed" not in name:
            parameter.data = (parameter.data / step).round() * step
    return model


def logit_error(model, fp_model, input_ids):
    errors = []
    routers = find_routers(fp_model)
    kept = []
    for each in (model, fp_model):
        with RouterCapture(each, routers) as capture, torch.no_grad():
            each(input_ids=input_ids)
            kept.append(capture.take())
    for router in routers:
        q, fp = (torch.cat(k[router.name]) for k in kept)
        errors.append((q - fp).square().mean().item())
    return errors


@pytest.mark.parametrize("family", ["solar_open", "qwen3_moe", "nemotron_h", "gpt_oss"])
def test_a_model_of_any_tool(family):
    fp_model = tiny.tiny_model(family)
    q_model = rounded(copy.deepcopy(fp_model))
    before = {n: p.clone() for n, p in q_model.state_dict().items()}
    windows = tiny.calibration(samples=64)
    heldout = torch.cat(tiny.calibration(samples=16, seed=1))
    old = logit_error(q_model, fp_model, heldout)
    refits = realign_routers(q_model, fp_model, windows)
    assert len(refits) == tiny.MOE_LAYERS[family]
    assert any(refit.applied for refit in refits)
    assert sum(logit_error(q_model, fp_model, heldout)) < sum(old)
    routers = {f"{r.router}.weight" for r in refits if r.applied}
    changed = {
        n for n, p in q_model.state_dict().items() if not torch.equal(p, before[n])
    }
    assert changed == routers
    assert q_model.config.vsraq["realign_routers"] is True  # for `verify`
    assert not hasattr(fp_model.config, "vsraq")


def test_models_with_other_routers_are_refused():
    solar, llama = tiny.tiny_model("solar_open"), tiny.tiny_model("llama")
    windows = tiny.calibration(samples=2)
    with pytest.raises(ValueError, match="allowed are equal ones, and at least one"):
        realign_routers(llama, solar, windows)
    with pytest.raises(ValueError, match="at least one"):
        realign_routers(llama, llama, windows)
