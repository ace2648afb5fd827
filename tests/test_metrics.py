import math

import pytest
import torch

import reference
from vsraq.metrics import StreamingMean, jaccard, next_token_nll, output_kl


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


def test_nll_is_the_models_own_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 9, generator=generator)
    ids = torch.randint(9, (2, 6), generator=generator)
    own = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 9), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(next_token_nll(logits, ids).mean(), own)


@pytest.mark.parametrize("metric", [jaccard, output_kl])
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
