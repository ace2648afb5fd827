# SPDX-License-Identifier: Apache-2.0
"""The parts of a comparison against slow twins, on random inputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compare_reference
import reference
import tiny
from vsraq.analysis.intervals import Interval, ratio_intervals
from vsraq.analysis.outputs import check_finite, output_change
from vsraq.analysis.routing import expert_ranks, rank_counts, routing_change
from vsraq.analysis.tally import EDGES, Histogram, Thresholds, TokenSample
from vsraq.routers import find_routers
from vsraq.tokens import Sampling


@st.composite
def rankings(draw):
    """Full-precision and quantized orders of some tokens, and K."""
    experts = draw(st.integers(1, 9))
    tokens = draw(st.integers(1, 4))
    orders = st.lists(st.permutations(range(experts)), min_size=tokens, max_size=tokens)
    return draw(orders), draw(orders), draw(st.integers(1, experts))


def ranks_of(q_orders, fp_orders, top_k):
    """Full-precision ranks of what the quantized model chooses."""
    return torch.tensor(
        [
            [fp.index(e) for e in q[:top_k]]
            for q, fp in zip(q_orders, fp_orders, strict=True)
        ]
    )


@given(rankings(), st.floats(0.05, 0.95))
def test_routing_of_random_rankings(orders, p):
    q_orders, fp_orders, top_k = orders
    ranks = ranks_of(*orders)
    change = routing_change(ranks, p=p)._asdict()
    dropped, injected = rank_counts(ranks, len(fp_orders[0]))
    expected = [
        compare_reference.change(q, fp, top_k)
        for q, fp in zip(q_orders, fp_orders, strict=True)
    ]
    for name, values in change.items():
        if name != "routing_shift":
            assert values.tolist() == pytest.approx([e[name] for e in expected]), name
    shifts = [
        reference.routing_shift(q[:top_k], fp[:top_k], p)
        for q, fp in zip(q_orders, fp_orders, strict=True)
    ]
    assert change["routing_shift"].tolist() == pytest.approx(shifts, abs=1e-5)
    same = change["weights_only"] == 1
    assert change["routing_shift"][same].eq(0).all()
    for counts, name, first in (
        (dropped, "dropped_ranks", 0),
        (injected, "injected_ranks", top_k),
    ):
        ranks = [rank for e in expected for rank in e[name]]
        places = range(first, first + len(counts))
        assert counts.tolist() == [ranks.count(r) for r in places]
    assert len(dropped) + len(injected) == len(fp_orders[0])


@pytest.mark.parametrize("family", ["qwen3_moe", "solar_open", "deepseek_v3"])
def test_ranks_are_those_of_the_real_choice(family):
    model = tiny.tiny_model(family)
    router = find_routers(model)[0].bind(model)
    logits = torch.randn(200, tiny.EXPERTS)
    logits[:50] = logits[:50].round()  # ties
    ranks = expert_ranks(router, logits)
    assert ranks.dtype == torch.uint8
    assert torch.equal(ranks.sort().values, torch.arange(8).expand(200, -1).byte())
    chosen = router.select(logits)
    places = torch.arange(tiny.TOP_K).expand_as(chosen).byte()
    assert torch.equal(ranks.gather(-1, chosen), places)
    order = router.ranking(logits)[50:]
    assert torch.equal(ranks[50:].long().argsort(), order)


def logits_like(kind, generator, tokens=3, vocabulary=40):
    fp = torch.randn(tokens, vocabulary, generator=generator)
    noise = torch.randn(tokens, vocabulary, generator=generator)
    if kind == "close":
        return fp + noise * 1e-3, fp
    if kind == "far":
        return noise * 9, fp * 9
    if kind == "bfloat16":
        return (fp + noise).bfloat16(), fp.bfloat16()
    if kind == "masked":
        masked = torch.arange(vocabulary) > 30
        return (fp + noise).masked_fill(masked, -math.inf), fp.masked_fill(
            masked, -math.inf
        )
    return fp + noise * 0.3, fp + 50


@given(
    st.sampled_from(["close", "far", "bfloat16", "masked", "shifted"]),
    st.integers(0, 2**30),
    st.sampled_from([Sampling(), Sampling(1.0, None, 0.7), Sampling(0.3, 3, None)]),
)
def test_outputs_of_random_logits(kind, seed, sampling):
    generator = torch.Generator().manual_seed(seed)
    q, fp = logits_like(kind, generator)
    next_ids = torch.randint(0, 30, (len(q),), generator=generator)
    next_ids[-1] = -100
    found = output_change(q, fp, next_ids, sampling)
    values = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    for i in range(len(q)):
        row = q[i].tolist(), fp[i].tolist()
        if kind == "masked":
            row = row[0][:31], row[1][:31]
        following = int(next_ids[i])
        following = following if following >= 0 else None
        expected = compare_reference.outputs(*row, following, values)
        expected = {"q_nll": 0.0, "fp_nll": 0.0} | expected
        own = {name: column[i].item() for name, column in found._asdict().items()}
        assert own == pytest.approx(expected, rel=2e-3, abs=2e-6)


def test_equal_logits_differ_by_nothing():
    random = torch.randn(20, 3000) * 7
    for logits in (random, random.bfloat16()):
        found = output_change(logits, logits, torch.zeros(20).long(), Sampling())
        assert torch.equal(found.q_nll, found.fp_nll)
        for name in ("kl", "jsd", "sampled_jsd"):
            assert getattr(found, name).eq(0).all(), name
        assert found.top1_agreement.eq(1).all()


def test_bad_logits_are_refused():
    fp = torch.randn(4, 40)
    ids = torch.zeros(4).long()
    with pytest.raises(ValueError, match="quantized model's logits: 4 tokens have nan"):
        output_change(fp * math.nan, fp, ids, Sampling())
    masked = fp.clone()
    masked[0, 3] = -math.inf
    found = output_change(masked, fp, ids, Sampling())
    with pytest.raises(ValueError, match=r"bad gives .* 0 of sequence 7, .* KL is"):
        check_finite(found, (2, 2), "bad", 7)
    found = output_change(fp, masked, ids, Sampling())
    check_finite(found, (2, 2), "bad", 7)  # the other way round it is not
    ids[2] = 3
    masked[2, 3] = -math.inf
    found = output_change(masked, masked, ids, Sampling())
    with pytest.raises(ValueError, match=r"full-.* 1 of sequence 8, .* NLL is"):
        check_finite(found, (2, 2), "bad", 7)


def test_what_only_the_quantized_model_masks_counts_for_nothing_without_probability():
    fp = torch.randn(3, 40)
    fp[:, 5] = -1e4  # exp of it is 0 in float32
    q = fp + 0.1 * torch.randn(3, 40)
    q[1, 5] = -math.inf
    found = output_change(q, fp, torch.zeros(3).long(), Sampling())
    kept = torch.arange(40) != 5
    expected = output_change(q[:, kept], fp[:, kept], torch.zeros(3).long(), Sampling())
    for values, of_kept in zip(found, expected, strict=True):
        torch.testing.assert_close(values, of_kept)
    check_finite(found, (1, 3), "q", 0)


@given(
    st.lists(
        st.floats(-0.5, 1.5, allow_nan=False) | st.sampled_from([0.0, 0.7, 1.0]),
        max_size=30,
    ),
    st.sampled_from(sorted(EDGES)),
)
def test_histograms_of_random_values(values, name):
    histogram = Histogram(EDGES[name])
    histogram.add(torch.tensor(values[:10], dtype=torch.float64))
    histogram.add(torch.tensor(values[10:], dtype=torch.float64))
    expected = compare_reference.histogram(values, EDGES[name])
    assert (histogram.counts, histogram.below, histogram.above) == expected


@given(
    st.floats(0, 0.69),
    st.floats(0, 0.99),
    st.lists(st.tuples(st.floats(0, 0.69), st.floats(0, 1)), min_size=1, max_size=9),
)
def test_regions_of_random_tokens(high_jsd, high_shift, tokens):
    thresholds = Thresholds(high_jsd, high_shift)
    jsd, shift = torch.tensor(tokens, dtype=torch.float64).T
    found = thresholds.regions(jsd, shift)
    assert found.sum(0).eq(1).all()
    for token, region in zip(tokens, found.int().argmax(0).tolist(), strict=True):
        expected = compare_reference.region(
            *token, {"sampled_jsd": high_jsd, "routing_shift": high_shift}
        )
        assert "region_" + "abcd"[region] == expected


def test_intervals_of_many_metrics_at_once_are_those_of_each_alone():
    generator = np.random.default_rng(0)
    numerators, denominators = generator.random((2, 30, 5))
    denominators[:, 3] = 0
    denominators[1:, 4] = numerators[1:, 4] = 0
    together = ratio_intervals(numerators, denominators, seed=3)
    for column in range(5):
        alone = ratio_intervals(
            numerators[:, [column]], denominators[:, [column]], seed=3
        )
        for end in ("value", "low", "high"):
            expected = getattr(together[column], end)
            assert getattr(alone[0], end) == pytest.approx(expected)  # None, too
    assert together[3] == Interval(None, None, None)
    only = numerators[0, 4] / denominators[0, 4]  # one sequence has all of it
    ends = together[4].value, together[4].low, together[4].high
    assert ends == pytest.approx((only,) * 3)
    assert str(together[3]) == "-"
    low, high = compare_reference.percentile_interval(
        list(zip(numerators[:, 0], denominators[:, 0], strict=True)),
        lambda drawn: sum(a for a, _ in drawn) / sum(b for _, b in drawn),
        seed=7,
    )
    assert together[0].low == pytest.approx(low, rel=0.03)
    assert together[0].high == pytest.approx(high, rel=0.03)


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        values = generator.normal(1.0, 0.5, (40, 1))
        (interval,) = ratio_intervals(values, np.ones((40, 1)), seed=seed)
        held += interval.low <= 1.0 <= interval.high
    assert 87 <= held <= 100


def test_the_sample_has_each_token_once():
    sample = TokenSample.draw(100, seed=0)
    assert sample.positions.tolist() == list(range(100))
    many = TokenSample.draw(20_000, seed=0).positions
    assert len(many.unique()) == 5000
    assert torch.equal(many, many.sort().values)
    found = [
        TokenSample(many).inside(start, start + 6000) + start
        for start in range(0, 20_000, 6000)
    ]
    assert torch.equal(torch.cat(found), many)
