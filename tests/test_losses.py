# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import reference
from vsraq import losses
from vsraq.loss_modules import (
    MarginLoss,
    MSEKLLoss,
    PairwiseMarginLoss,
    RankLoss,
    RouterKLLoss,
    SigmoidAwareLoss,
    SRALoss,
    TopKMSELoss,
    VSRAQLoss,
)
from vsraq.losses import reduce_tokens
from vsraq.ranks import RankedLogits, rank_logits

T, E, K = 7, 11, 3

# name, hyper-parameters, how many fp ranks it reads
CASES = [
    ("topk_mse", {"top_k": K}, K),
    ("topk_mse", {"top_k": K, "multiplier": 3}, 9),
    ("topk_mse", {"top_k": K, "multiplier": 5}, E),
    ("topk_mse", {"top_k": K, "multiplier": "all"}, E),
    ("topk_mse", {"top_k": 1}, 1),
    ("sigmoid_aware_mse", {"top_k": K}, K),
    ("sigmoid_aware_mse", {"top_k": K, "gamma": 0.0, "eps": 0.0}, K),
    ("sigmoid_aware_mse", {"top_k": E, "gamma": 2.5}, E),
    ("rank", {"top_k": K}, K),
    ("rank", {"top_k": K, "margin": 0.7}, K),
    ("rank", {"top_k": 1}, 1),
    ("margin", {"top_k": K}, K + 1),
    ("margin", {"top_k": K, "boundary": 4}, K + 4),
    ("margin", {"top_k": E - 1, "boundary": 4}, E),
    ("margin", {"top_k": E}, E),
    ("pairwise_margin", {"top_k": K}, K + 1),
    ("pairwise_margin", {"top_k": K, "boundary": 20}, E),
    ("pairwise_margin", {"top_k": 1, "boundary": 1}, 2),
    ("router_kl", {}, E),
    ("router_kl", {"top_m": 4}, 4),
    ("mse_kl", {}, E),
    ("mse_kl", {"kl_weight": 0.3, "top_m": 4}, E),
    ("vsraq", {"top_k": K}, K + 1),
    ("vsraq", {"top_k": 1, "alpha": 1.0, "boundary": 3}, 4),
    ("vsraq", {"top_k": E, "rank_margin": 0.2, "margin_weight": 2.0}, E),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in h.items())}" for name, h, _ in CASES]
each_loss = pytest.mark.parametrize(("name", "hyper", "ranks"), CASES, ids=IDS)

SHIFT_INVARIANT = {"margin", "pairwise_margin", "router_kl", "rank"}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    fp = torch.randn(T, E, generator=generator, dtype=torch.float64) * 2
    q = fp + torch.randn(T, E, generator=generator, dtype=torch.float64) * 0.5
    return q, fp


@each_loss
def test_equals_its_loop_twin(name, hyper, ranks, logits):
    q, fp = logits
    expected = [
        getattr(reference, name)(a, b, **hyper)
        for a, b in zip(q.tolist(), fp.tolist(), strict=True)
    ]
    result = getattr(losses, name)(q, fp, **hyper)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@each_loss
def test_ranked_form_gives_the_same(name, hyper, ranks, logits):
    q, fp = (x.float() for x in logits)
    loss = getattr(losses, name)
    ranked = rank_logits(fp, ranks)
    assert ranked.indices.dtype == torch.int16
    assert torch.equal(loss(q, fp, **hyper), loss(q, ranked, **hyper))


@each_loss
def test_too_few_ranks_are_refused(name, hyper, ranks, logits):
    q, fp = logits
    if ranks == 1:
        return  # nothing below one rank exists
    with pytest.raises(ValueError, match=rf"holds {ranks - 1} ranks.*reads"):
        getattr(losses, name)(q, rank_logits(fp, ranks - 1), **hyper)


@each_loss
def test_gradient(name, hyper, ranks, logits):
    q, fp = logits
    loss = getattr(losses, name)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, fp, **hyper), q.clone().requires_grad_()
    )


@each_loss
def test_zero_at_equality_and_never_negative(name, hyper, ranks, logits):
    q, fp = logits
    loss = getattr(losses, name)
    assert (loss(q, fp, **hyper) >= 0).all()
    at_equality = loss(fp, fp, **hyper)
    if name == "vsraq":  # its rank term is what remains
        rank = losses.rank(
            fp, fp, top_k=hyper["top_k"], margin=hyper.get("rank_margin", 0.0)
        )
        torch.testing.assert_close(at_equality, 0.01 * rank)
    elif name != "rank":
        assert at_equality.abs().max() < 1e-15


@each_loss
def test_shift_of_the_quantized_logits(name, hyper, ranks, logits):
    q, fp = logits
    loss = getattr(losses, name)
    shifted, plain = loss(q + 3, fp, **hyper), loss(q, fp, **hyper)
    if name in SHIFT_INVARIANT:
        torch.testing.assert_close(shifted, plain)
    else:
        assert not torch.allclose(shifted, plain)


@each_loss
def test_order_of_the_experts_does_not_matter(name, hyper, ranks, logits):
    q, fp = logits
    order = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    loss = getattr(losses, name)
    torch.testing.assert_close(
        loss(q[:, order], fp[:, order], **hyper), loss(q, fp, **hyper)
    )


@each_loss
def test_masked_equals_sliced(name, hyper, ranks, logits):
    q, fp = logits
    loss = getattr(losses, name)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    masked = reduce_tokens(loss(q, fp, **hyper), mask)
    sliced = reduce_tokens(loss(q[mask.bool()], fp[mask.bool()], **hyper))
    torch.testing.assert_close(masked, sliced)


@each_loss
def test_bfloat16_input_is_computed_in_float32(name, hyper, ranks, logits):
    q, fp = (x.bfloat16() for x in logits)
    loss = getattr(losses, name)
    result = loss(q, fp, **hyper)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(q.float(), fp.float(), **hyper))


@each_loss
def test_leading_dimensions(name, hyper, ranks, logits):
    q, fp = logits
    loss = getattr(losses, name)
    batched = loss(q.expand(2, 4, T, E), fp.expand(2, 4, T, E), **hyper)
    assert batched.shape == (2, 4, T)
    torch.testing.assert_close(batched[1, 3], loss(q, fp, **hyper))


def test_values_computed_by_hand():
    fp = torch.tensor([3.0, 1.0, 0.0, -1.0])
    q = torch.tensor([2.0, 1.5, 1.0, -1.0])
    # errors by rank: -1, 0.5, 1, 0
    assert losses.topk_mse(q, fp, top_k=2).item() == pytest.approx(0.625)
    assert losses.topk_mse(q, fp, top_k=1, multiplier=3).item() == pytest.approx(0.75)
    # boundary margin: q 1.5 - 1 = 0.5, fp 1 - 0 = 1
    assert losses.margin(q, fp, top_k=2).item() == pytest.approx(0.25)
    # pairs of the errors -1, 0.5, 1: 1.5^2, 2^2, 0.5^2
    pairwise = losses.pairwise_margin(q, fp, top_k=2)
    assert pairwise.item() == pytest.approx(6.5 / 3)
    rank = losses.rank(q, fp, top_k=2)
    assert rank.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    kl = losses.router_kl(torch.zeros(2), torch.tensor([math.log(3.0), 0.0]))
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    # p = 1/2: weight 1/4 + eps, sigmoid(log 3) = 3/4
    sigmoid_aware = losses.sigmoid_aware_mse(
        torch.tensor([math.log(3.0)]), torch.zeros(1), top_k=1
    )
    assert sigmoid_aware.item() == pytest.approx(0.251 * 0.0625)


def test_ties_go_to_the_lower_index():
    ranked = rank_logits(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2)
    assert ranked.indices.tolist() == [1, 2]
    q = torch.tensor([0.0, 5.0, 2.0, 2.0])
    assert losses.topk_mse(q, torch.tensor([1.0, 2, 2, 2]), top_k=1).item() == 9.0


def test_no_gradient_reaches_the_full_precision_logits(logits):
    q, fp = logits
    fp.requires_grad_()
    assert not losses.vsraq(q, fp, top_k=K).requires_grad


@pytest.mark.parametrize("mask", [torch.zeros(T), torch.zeros(T, dtype=torch.bool)])
def test_empty_mask_is_exactly_zero_and_attached(mask, logits):
    q, fp = logits
    q = q.clone().requires_grad_()
    loss = reduce_tokens(losses.topk_mse(q, fp, top_k=K), mask)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_no_token_at_all_is_zero():
    q = torch.empty(0, E, requires_grad=True)
    loss = reduce_tokens(losses.topk_mse(q, torch.empty(0, E), top_k=K))
    assert loss.item() == 0
    assert loss.requires_grad


MODULES = [
    (TopKMSELoss(K), "topk_mse", {"top_k": K}),
    (TopKMSELoss(K, "all"), "topk_mse", {"top_k": K, "multiplier": "all"}),
    (SigmoidAwareLoss(K), "sigmoid_aware_mse", {"top_k": K}),
    (RankLoss(K, margin=0.5), "rank", {"top_k": K, "margin": 0.5}),
    (MarginLoss(K, boundary=2), "margin", {"top_k": K, "boundary": 2}),
    (PairwiseMarginLoss(K), "pairwise_margin", {"top_k": K}),
    (RouterKLLoss(top_m=5), "router_kl", {"top_m": 5}),
    (MSEKLLoss(kl_weight=0.5), "mse_kl", {"kl_weight": 0.5}),
    (SRALoss(K), "topk_mse", {"top_k": K, "multiplier": 3}),
    (VSRAQLoss(K), "vsraq", {"top_k": K}),
]


@pytest.mark.parametrize(
    ("module", "name", "hyper"), MODULES, ids=[type(m).__name__ for m, _, _ in MODULES]
)
def test_module_is_its_function_reduced(module, name, hyper, logits):
    q, fp = logits
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    per_token = getattr(losses, name)(q, fp, **hyper)
    assert torch.equal(module(q, fp, mask), reduce_tokens(per_token, mask))
    if not isinstance(module, SRALoss):
        assert torch.equal(module(q, fp), reduce_tokens(per_token))
    assert "=" in repr(module)


def test_sra_needs_its_mask(logits):
    with pytest.raises(ValueError, match="mask=None: SRALoss aligns selected tokens"):
        SRALoss(K)(*logits)


BAD_VALUES = [
    ("topk_mse", {"top_k": 0}, r"top_k=0: allowed is a positive int"),
    ("topk_mse", {"top_k": 2.0}, r"top_k=2.0: allowed is a positive int"),
    ("topk_mse", {"top_k": True}, r"top_k=True"),
    ("topk_mse", {"top_k": E + 1}, rf"top_k={E + 1}: allowed is 1 to num_experts={E}"),
    ("topk_mse", {"top_k": K, "multiplier": 0}, r'multiplier=0: .* or "all"'),
    ("topk_mse", {"top_k": K, "multiplier": "some"}, r"multiplier='some'"),
    ("sigmoid_aware_mse", {"top_k": K, "gamma": math.nan}, r"gamma=nan"),
    ("sigmoid_aware_mse", {"top_k": K, "eps": -1.0}, r"eps=-1.0: .* >= 0"),
    ("rank", {"top_k": K, "margin": math.inf}, r"margin=inf"),
    ("margin", {"top_k": K, "boundary": 0}, r"boundary=0"),
    ("pairwise_margin", {"top_k": E + 1}, rf"top_k={E + 1}"),
    ("router_kl", {"top_m": 0}, r"top_m=0"),
    ("router_kl", {"top_m": E + 1}, rf"top_m={E + 1}: allowed is 1 to num_experts={E}"),
    ("mse_kl", {"kl_weight": -1.0}, r"kl_weight=-1.0: .* >= 0"),
    ("vsraq", {"top_k": K, "alpha": 1.5}, r"alpha=1.5: allowed is .* 0 to 1"),
    ("vsraq", {"top_k": K, "alpha": math.nan}, r"alpha=nan"),
    ("vsraq", {"top_k": K, "rank_weight": "1"}, r"rank_weight='1'"),
]


@pytest.mark.parametrize(("name", "hyper", "message"), BAD_VALUES)
def test_bad_values_are_refused(name, hyper, message, logits):
    with pytest.raises(ValueError, match=message):
        getattr(losses, name)(*logits, **hyper)


def test_modules_refuse_bad_values_at_construction():
    with pytest.raises(ValueError, match=r"alpha=-0\.1"):
        VSRAQLoss(K, alpha=-0.1)
    with pytest.raises(ValueError, match="top_k=0"):
        SRALoss(0)


@each_loss
def test_shapes_that_differ_are_refused(name, hyper, ranks, logits):
    q, fp = logits
    loss = getattr(losses, name)
    for other in (fp[:-1], fp[:1], fp.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"q_logits has shape .* equal shapes"):
            loss(q, other, **hyper)
    with pytest.raises(ValueError, match=r"q_logits has shape .* equal shapes"):
        loss(q, RankedLogits(fp[:, :E], fp[:, :E].to(torch.int16), E + 1), **hyper)


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(1,\).*\(3,\)"):
        reduce_tokens(torch.zeros(3), torch.ones(1))


@pytest.mark.parametrize("ranks", [0, E + 1])
def test_ranks_outside_the_experts_are_refused(ranks):
    with pytest.raises(ValueError, match=f"ranks={ranks}: allowed is 1 to"):
        rank_logits(torch.zeros(E), ranks)


def test_the_error_of_a_routers_input(logits):
    q, fp = logits
    expected = [
        reference.topk_mse(a, b, top_k=1, multiplier="all")
        for a, b in zip(q.tolist(), fp.tolist(), strict=True)
    ]
    actual = losses.input_mse(q, fp)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    assert losses.input_mse(fp, fp).eq(0).all()
    with pytest.raises(ValueError, match="shape"):
        losses.input_mse(q[:, 1:], fp)


def test_another_ranking_chooses_which_logits_are_compared():
    q_logits, fp_logits = torch.randn(T, E), torch.randn(T, E)
    ranking = torch.stack([torch.randperm(E) for _ in range(T)])
    ranked = rank_logits(fp_logits, 2 * K, ranking)
    assert torch.equal(ranked.indices.long(), ranking[:, : 2 * K])
    first = ranking[:, :K]
    expected = (q_logits - fp_logits).gather(-1, first).square().mean(-1)
    loss = losses.topk_mse(q_logits, ranked, top_k=K)
    torch.testing.assert_close(loss, expected)
    error = (q_logits - fp_logits).gather(-1, ranking)
    expected = (error[:, K - 1] - error[:, K]).square()
    loss = losses.margin(q_logits, ranked, top_k=K)
    torch.testing.assert_close(loss, expected)
    # the order among the chosen stays that of the logits, or it would fight them
    by_logits = first.gather(-1, fp_logits.gather(-1, first).argsort(-1, True))
    gaps = q_logits.gather(-1, by_logits).diff()
    expected = torch.nn.functional.softplus(gaps).mean(-1)
    torch.testing.assert_close(losses.rank(q_logits, ranked, top_k=K), expected)


def test_all_ranks_in_any_order_give_the_logits_back():
    fp_logits = torch.randn(T, E)
    ranking = torch.stack([torch.randperm(E) for _ in range(T)])
    assert torch.equal(
        reference.logits_of(rank_logits(fp_logits, None, ranking)), fp_logits
    )
