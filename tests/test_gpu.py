# SPDX-License-Identifier: Apache-2.0
"""What needs CUDA: the same runs as on the CPU, on a card.

Tolerances are wide where two ways to compute meet. Kernels add up in another order, so
a logit moves by some 1e-6 in float32 and 1e-2 in bfloat16; a weight that lies between
two steps of the grid, or a token between two experts, then goes the other way, and that
moves the mean of a few hundred tokens by percents.
"""

import math
import shutil
from argparse import Namespace

import pytest
import torch
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from torch.utils._triton import has_triton

import at_size
import tiny
from test_autoround import tuned
from vsraq import VSRAQConfig
from vsraq.autoround.aligned_block import AlignedBlock
from vsraq.autoround.next_router import NextRouter

CARD = "cuda:0"
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"
    ),
    # drivers and compilers warn of the machine they find
    pytest.mark.filterwarnings("default"),
]
FAMILY = "solar_open"


def config(**kwargs):
    """The default recipe with fixed weights, so that two runs weigh alike."""
    options = {"iters": 5, "router_weight": 1.0, "next_router_weight": 1.0}
    return VSRAQConfig(objective="top3k_mse", realign_routers=True, **options | kwargs)


def losses(log):
    """Of the first block's first and best iteration: reconstruction, own, next."""
    line = next(line for line in tiny.block_lines(log) if line["n0"] is not None)
    names = ("r0", "z0", "n0", "r1", "z1", "n1")
    return {name: float(line[name]) for name in names}


def refit_errors(log):
    """Held-out logit error before and after, of the first router."""
    line = next(m for m in log if "held-out logit error" in m)
    words = line.split("held-out logit error ")[1].split(",")[0].split(" -> ")
    return [float(word) for word in words]


def run(quantize, log, own=None, model=None, **kwargs):
    log.clear()
    model = tiny.tiny_model(FAMILY) if model is None else model
    quantize(model, own or config(), **{"device_map": CARD} | kwargs)
    return losses(log), refit_errors(log)


def check_close(found, expected, tolerance):
    """The first iteration's losses, before any step could go another way."""
    for name in ("r0", "z0", "n0"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name


def test_cpu_and_cuda_agree(quantize, vsraq_log):
    """In float32: PyTorch's matrix products use TF32 only where a user says so."""
    on_cpu, cpu_errors = run(quantize, vsraq_log, device_map="cpu", amp=False)
    on_card, card_errors = run(quantize, vsraq_log, amp=False)
    check_close(on_card, on_cpu, 0.05)
    # five steps along signs, some of which are those of noise
    for name in ("r1", "z1", "n1"):
        assert on_card[name] == pytest.approx(on_cpu[name], rel=0.3), name
    assert card_errors == pytest.approx(cpu_errors, rel=0.3)


def test_automatic_weights_agree(quantize, vsraq_log, terms):
    """They are sums of gradient magnitudes, so noise in single ones hardly counts."""
    found = []
    for device in ("cpu", CARD):
        terms.clear()
        tuned(quantize, VSRAQConfig(iters=1), device_map=device, amp=False)
        found.append({label: term.weight for label, term in terms[0][1].items()})
    on_cpu, on_card = found
    assert on_card == pytest.approx(on_cpu, rel=0.1)


def test_bfloat16_autocast(quantize, vsraq_log):
    """Both losses fall in the precision that models are published and tuned in."""
    own = config(iters=20, router_weight=10.0, next_router_weight=10.0)
    model = tiny.in_bfloat16(tiny.tiny_model(FAMILY))
    found, errors = run(quantize, vsraq_log, own, model)
    assert all(math.isfinite(value) for value in (*found.values(), *errors))
    assert found["n1"] < found["n0"]
    # against float32: rounded activations change some choices of experts
    in_float32, _ = run(quantize, vsraq_log, own, amp=False)
    check_close(found, in_float32, 0.5)


@pytest.mark.skipif(
    not has_triton() or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="torch.compile for CUDA needs triton and a C compiler",
)
def test_torch_compile(quantize, vsraq_log):
    """No term is compiled away, in the second block neither (hooks, other closures)."""
    plain, errors = run(quantize, vsraq_log, amp=False)
    first = tiny.block_lines(vsraq_log)
    compiled, compiled_errors = run(
        quantize, vsraq_log, amp=False, enable_torch_compile=True
    )
    second = tiny.block_lines(vsraq_log)
    check_close(compiled, plain, 0.05)
    assert compiled_errors == pytest.approx(errors, rel=0.3)
    for line, expected in zip(second, first, strict=True):
        assert float(line["z0"]) == pytest.approx(float(expected["z0"]), rel=0.3)


def test_low_gpu_mem_usage(quantize, vsraq_log):
    """The same kernels; only where tensors wait differs."""
    plain, errors = run(quantize, vsraq_log, amp=False)
    low, low_errors = run(quantize, vsraq_log, amp=False, low_gpu_mem_usage=True)
    check_close(low, plain, 1e-3)
    # atomic additions of a backward pass are in no fixed order
    assert low_errors == pytest.approx(errors, rel=0.3)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason=f"torch.cuda.device_count() is {torch.cuda.device_count()}, not 2 or more",
)
def test_two_devices(quantize, vsraq_log, monkeypatch):
    """An automatic map: the look-ahead runs where AutoRound takes the loss."""
    where = []
    values, next_term = NextRouter.values, AlignedBlock.next_term

    def spy(self, *args):
        where.append({p.device for block in self._blocks for p in block.parameters()})
        return values(self, *args)

    def note(self, device):
        where.clear()
        term = next_term(self, device)
        assert where[0] == {torch.device(device)}
        return term

    try:
        plain = SignRoundConfig(iters=1)
        tuned(quantize, plain, device_map="0,1", amp=False)
    except RuntimeError as error:
        pytest.skip(f"AutoRound alone fails on two devices: {error}")
    one, errors = run(quantize, vsraq_log, amp=False)
    monkeypatch.setattr(NextRouter, "values", spy)
    monkeypatch.setattr(AlignedBlock, "next_term", note)
    two, two_errors = run(quantize, vsraq_log, amp=False, device_map="0,1")
    assert where
    check_close(two, one, 0.05)
    assert two_errors == pytest.approx(errors, rel=0.3)


def test_the_benchmark_at_size_small():
    """A block of one sixteenth of the width; `benchmarks/at_size.py` has the real one.

    The bound is that of a block this small, where constant parts weigh; at size it is
    1.02.
    """
    size = {"experts": 16, "scale": 4, "nsamples": 8, "seqlen": 256, "batch_size": 4}
    arguments = Namespace(device="cuda", iters=4, **size)
    plain, ours = (
        at_size.in_a_process(case, arguments) for case in ("AutoRound", "default")
    )
    assert "refused" not in plain, plain
    assert "refused" not in ours, ours
    assert ours["peak"] < 1.5 * plain["peak"]
    assert 0 < ours["iteration"] < ours["seconds"]
