# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import reference
from vsraq.metrics import (
    StreamingMean,
    _top,
    candidates,
    jaccard,
    jsd,
    next_token_nll,
    output_kl,
    routing_shift,
    sampled_jsd,
)

V = 60


def pairs(kind, tokens=40):
    """Logits of two models, (tokens, V) each."""
    generator = torch.Generator().manual_seed(0)
    fp = torch.randn(tokens, V, generator=generator)
    noise = torch.randn(tokens, V, generator=generator)
    if kind == "peaked":
        fp[:, 3] += 15
        return fp + noise, fp
    if kind == "flat":
        return noise * 1e-3, fp * 1e-3
    if kind == "close":
        return fp + noise * 1e-4, fp
    if kind == "unrelated":
        return noise * 5, fp * 5
    if kind == "masked":
        q = (fp + noise).masked_fill(noise > 0.5, -math.inf)
        return q, fp.masked_fill(noise < -0.5, -math.inf)
    if kind == "almost all masked":
        masked = torch.arange(V) > 4
        return (fp + noise).masked_fill(masked, -math.inf), fp
    if kind == "ties":
        return (fp + noise).round(), fp.round()
    return fp + noise * 0.3, fp


KINDS = [
    "random",
    "peaked",
    "flat",
    "close",
    "unrelated",
    "masked",
    "almost all masked",
]
SAMPLINGS = [
    {},
    {"temperature": 1.0, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.7, "top_k": None, "top_p": 0.8},
    {"top_k": 0, "top_p": None},
    {"top_k": 1},
    {"top_k": 1000, "top_p": 1e-6},
]


def test_jaccard_equals_its_loop_twin():
    generator = torch.Generator().manual_seed(0)
    q, fp = (torch.rand(2, 30, 10, generator=generator).topk(4).indices for _ in "qf")
    expected = [
        [reference.jaccard(a, b) for a, b in zip(qs, fs, strict=True)]
        for qs, fs in zip(q.tolist(), fp.tolist(), strict=True)
    ]
    torch.testing.assert_close(jaccard(q, fp), torch.tensor(expected))


def test_jaccard_ignores_order_and_spans_zero_to_one():
    fp = torch.tensor([[0, 1], [0, 1], [0, 1]])
    q = torch.tensor([[1, 0], [1, 2], [2, 3]])
    torch.testing.assert_close(jaccard(q, fp), torch.tensor([1.0, 1 / 3, 0.0]))


def test_output_kl_by_hand():
    fp = torch.tensor([math.log(3.0), 0.0])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert output_kl(torch.zeros(2), fp).item() == pytest.approx(expected)
    assert output_kl(fp, fp).item() == 0


@pytest.mark.parametrize("kind", [*KINDS, "ties"])
def test_jsd_equals_its_loop_twin(kind):
    q, fp = pairs(kind)
    expected = [reference.jsd(*z) for z in zip(q.tolist(), fp.tolist(), strict=True)]
    torch.testing.assert_close(
        jsd(q, fp), torch.tensor(expected).float(), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "ties"])
def test_sampled_jsd_equals_its_loop_twin(kind, sampling):
    q, fp = pairs(kind)
    expected = [
        reference.sampled_jsd(a, b, **sampling)
        for a, b in zip(q.tolist(), fp.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        sampled_jsd(q, fp, **sampling),
        torch.tensor(expected).float(),
        rtol=1e-4,
        atol=1e-8,
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "ties"])
def test_candidates_are_those_of_transformers(kind, sampling):
    """Its own warpers, in the order of `generate`."""
    values = {"temperature": 0.6, "top_k": 20, "top_p": 0.95} | sampling
    if kind == "ties" and values["top_p"] not in (None, 1.0):
        pytest.skip("which of equal logits top-p cuts is not defined in transformers")
    config = GenerationConfig(do_sample=True, **values)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(values["temperature"])])
    if values["top_k"]:
        warpers.append(TopKLogitsWarper(config.top_k))
    if values["top_p"] is not None:
        warpers.append(TopPLogitsWarper(config.top_p))
    for logits in pairs(kind):
        expected = warpers(None, logits).softmax(-1)
        index, p = candidates("logits", logits, **values)
        actual = torch.zeros(logits.shape).scatter_(-1, index, p)
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected)


def test_which_of_equal_logits_stay_does_not_depend_on_other_tokens():
    tied = torch.zeros(1, 300)
    tied[0, ::4] = 1.0
    alone = sampled_jsd(tied, tied)
    flat, steep = torch.zeros(1, 300), torch.arange(300.0)[None]
    q, fp = torch.cat((tied, flat)), torch.cat((tied, steep))
    assert sampled_jsd(q, fp)[0] == alone[0] == 0


@pytest.mark.parametrize("metric", [jsd, sampled_jsd])
@pytest.mark.parametrize("kind", [*KINDS, "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jsd_is_zero_for_equal_logits_symmetric_and_bounded(kind, dtype, metric):
    q, fp = (z.to(dtype) for z in pairs(kind))
    assert torch.equal(metric(fp, fp), torch.zeros(len(fp)))
    both = metric(q, fp)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both, metric(fp, q), rtol=1e-5, atol=1e-9)
    assert (both >= 0).all()
    assert (both <= math.log(2) + 1e-7).all()
    shaped = metric(q.view(2, -1, V), fp.view(2, -1, V))
    assert torch.equal(shaped.flatten(), both)


def test_sampled_jsd_by_hand():
    fp = torch.tensor([[math.log(3.0), 0.0, -9.0]])
    q = torch.tensor([[-9.0, 0.0, math.log(3.0)]])
    # candidates {0: 3/4, 1: 1/4} and {1: 1/4, 2: 3/4}
    sampling = {"temperature": 1.0, "top_k": 2, "top_p": 1.0}
    expected = 0.75 * math.log(2)
    assert sampled_jsd(q, fp, **sampling).item() == pytest.approx(expected)
    disjoint = sampled_jsd(q, fp, temperature=1.0, top_k=1, top_p=1.0)
    assert disjoint.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("metric", [jsd, sampled_jsd])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_logits_that_are_no_distribution_are_refused(value, metric):
    fp = torch.zeros(3, 8)
    q = fp.clone()
    q[1, 2] = value
    with pytest.raises(ValueError, match=f"q_logits: 1 tokens have {value} as highest"):
        metric(q, fp)
    q[1] = -math.inf
    with pytest.raises(ValueError, match="fp_logits: 1 tokens have -inf as highest"):
        metric(fp, q)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_bad_sampling_parameters_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: allowed is"):
        sampled_jsd(torch.zeros(1, 4), torch.zeros(1, 4), **{name: value})


@pytest.mark.parametrize("p", [0.9, 0.3])
def test_routing_shift_equals_its_loop_twin(p):
    generator = torch.Generator().manual_seed(0)
    q, fp = (torch.rand(2, 30, 10, generator=generator).topk(4).indices for _ in "qf")
    expected = [
        [reference.routing_shift(a, b, p) for a, b in zip(qs, fs, strict=True)]
        for qs, fs in zip(q.tolist(), fp.tolist(), strict=True)
    ]
    torch.testing.assert_close(routing_shift(q, fp, p=p), torch.tensor(expected))


def test_routing_shift_by_hand():
    fp = torch.tensor([[0, 1], [0, 1], [0, 1]])
    q = torch.tensor([[0, 1], [1, 0], [2, 3]])
    # swapped: A = 0, 1, so RBO / (1 - p^2) = 0.09 / 0.19
    expected = torch.tensor([0.0, 1 - 0.09 / 0.19, 1.0])
    torch.testing.assert_close(routing_shift(q, fp), expected)
    many = torch.rand(50, 128).topk(8).indices
    assert torch.equal(routing_shift(many, many), torch.zeros(50))
    with pytest.raises(ValueError, match="p=1: allowed is a number between 0 and 1"):
        routing_shift(q, fp, p=1)


def test_nll_is_the_models_own_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 9, generator=generator)
    ids = torch.randint(9, (2, 6), generator=generator)
    own = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 9), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(next_token_nll(logits, ids).mean(), own)


@pytest.mark.parametrize(
    "metric", [jaccard, output_kl, jsd, sampled_jsd, routing_shift]
)
def test_shapes_that_differ_are_refused(metric):
    with pytest.raises(ValueError, match="equal shapes"):
        metric(torch.zeros(2, 3), torch.zeros(3, 3))


def test_streaming_mean_is_the_mean_of_all():
    values = torch.rand(100)
    mean = StreamingMean()
    for part in values.split(7):
        mean.update(part)
    assert mean.compute() == pytest.approx(values.mean().item())


def test_streaming_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="seen 0 values"):
        StreamingMean().compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 63, 20_000, 20_031])
def test_the_highest_of_a_large_vocabulary(dtype, vocabulary):
    """Block by block: the same values, and every logit that is equal to the last."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, vocabulary, generator=generator).to(dtype)
    logits[0, 0, :] = 1.0
    logits[0, 1, 5:] = -math.inf
    logits[0, 2, -3:] = 100.0
    for count in (1, 20):
        count = min(count, vocabulary)
        values, index = _top(logits, count)
        assert torch.equal(values, logits.topk(count, dim=-1).values)
        assert torch.equal(logits.gather(-1, index), values)
        assert all(len(set(row)) == count for row in index.flatten(0, -2).tolist())
    found, index = candidates("logits", logits, 1.0, min(20, vocabulary), None)
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices
    row = found[1, 3, : min(20, vocabulary)]
    assert torch.equal(row, ranked[1, 3, : len(row)])
