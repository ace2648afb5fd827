# SPDX-License-Identifier: Apache-2.0
"""What is kept and computed stays small: bounds that do not depend on the machine."""

from argparse import Namespace

import pytest
import torch
from torch import nn

import at_size
import tiny
from vsraq import VSRAQConfig
from vsraq.autoround import alignment_run
from vsraq.autoround.aligned_block import AlignedBlock
from vsraq.autoround.checks import check_smoothing
from vsraq.objectives import get_objective
from vsraq.ranks import rank_logits, split_samples
from vsraq.realignment import RidgeSums, error_weights
from vsraq.realignment import logits as refit_logits
from vsraq.realignment.error_weights import check_weighted_size
from vsraq.realignment.logits import RefitLogits, in_half
from vsraq.router_terms import RouterTerm
from vsraq.routers import Router, experts, find, find_routers
from vsraq.tokens.counted import SampleTokens

# ── weighted re-fit ───────────────────────────────────────────────────────────


def test_a_weighted_refit_that_is_too_large_says_how_large():
    with pytest.raises(ValueError, match=r"128 x 4096\^2 x 8 bytes = 16\.0 GiB"):
        check_weighted_size(4096, 128)  # Solar-Open-100B
    check_weighted_size(2048, 128)  # Qwen3-30B-A3B


def test_it_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(error_weights, "WEIGHTED_LIMIT", 8 * 64 * 64 * 8 - 1)
    with pytest.raises(ValueError, match='weighting="uniform"'):
        RidgeSums(64, 8, weighted=True)
    assert RidgeSums(64, 8).gram.shape == (1, 64, 64)


def test_it_is_refused_before_a_block_is_tuned(quantize, monkeypatch):
    monkeypatch.setattr(error_weights, "WEIGHTED_LIMIT", 8 * 64 * 64 * 8 - 1)
    model = tiny.tiny_model("solar_open")
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    config = VSRAQConfig(iters=1, realign_routers={"weighting": "boundary"})
    with pytest.raises(ValueError, match="a weighted re-fit of 8 experts"):
        quantize(model, config)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


# ── what a block keeps ────────────────────────────────────────────────────────


def test_the_loss_keeps_its_ranks_only_and_the_refit_two_bytes(quantize, terms):
    kept = {}
    refit = AlignedBlock.refit

    def spy(self, fp_routers):
        for router in self.routers:
            kept[self.full_name(router)] = fp_routers.logits[router.name]
        return refit(self, fp_routers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignedBlock, "refit", spy)
        config = VSRAQConfig(iters=1, objective="topk_mse")
        quantize(tiny.tiny_model("solar_open"), config)
    (_, first), *_ = terms
    for term in first.values():
        for targets in term.fp_targets.values():
            assert targets[0].values.shape == (tiny.SEQLEN, tiny.TOP_K)
    assert len(kept) == tiny.MOE_LAYERS["solar_open"]
    for logits in kept.values():
        assert {z.dtype for z in logits} == {torch.float16}
        assert sum(z.nbytes for z in logits) == 8 * tiny.SEQLEN * tiny.EXPERTS * 2


def test_logits_too_large_for_half_precision_stay():
    logits = torch.tensor([[1.0, 2.0]])
    assert in_half(logits).dtype == torch.float16
    large = torch.tensor([[1.0, 1e5]])
    assert torch.equal(in_half(large), large)


@pytest.mark.parametrize("calls", [(8, 8), (3, 13), (16,), (4, 4, 4, 4)])
@pytest.mark.parametrize("rows", [16, 11, 8, 3])
def test_the_refit_keeps_no_more_than_its_bytes(calls, rows, monkeypatch):
    monkeypatch.setattr(refit_logits, "REFIT_BYTES", rows * 5 * 2 + 1)
    logits = torch.randn(sum(calls), 5)
    kept = RefitLogits("cpu")
    for call in logits.split(list(calls)):
        kept.add(call)
    held = {c.untyped_storage().data_ptr(): c.untyped_storage() for c in kept._calls}
    assert sum(storage.nbytes() for storage in held.values()) == rows * 5 * 2
    samples = kept.samples("b", "r", [4] * 4)
    assert len(samples) == rows // 4  # whole ones, from the first on
    assert all(len(sample) == 4 for sample in samples)
    if samples:
        expected = logits[: rows // 4 * 4].half()
        assert torch.equal(torch.cat(samples), expected)


def test_missing_tokens_are_no_limit():
    kept = RefitLogits("cpu")
    kept.add(torch.randn(11, 5))
    with pytest.raises(RuntimeError, match="saw 11 tokens, the block 16"):
        kept.samples("b", "r", [4] * 4)


def test_a_refit_with_some_of_the_samples(quantize, vsraq_log, monkeypatch):
    """The same as a run that has only those, as far as the first router."""
    samples = tiny.calibration()
    config = {"iters": 1, "router_weight": 0, "next_router_weight": 0, "lr": 1e-9}

    def line(**kwargs):
        vsraq_log.clear()
        config_ = VSRAQConfig(**config, realign_routers=True)
        quantize(tiny.tiny_model("solar_open"), config_, **kwargs)
        return next(m for m in vsraq_log if "held-out logit error" in m)

    few = line(dataset=samples[:4], nsamples=4)
    assert line(dataset=samples) != few
    four = 4 * tiny.SEQLEN * tiny.EXPERTS * 2
    monkeypatch.setattr(refit_logits, "REFIT_BYTES", four + tiny.SEQLEN * 2)
    assert line(dataset=samples) == few


@pytest.mark.parametrize("calls", [(8, 8), (3, 13), (16,), (4, 4, 4, 4)])
def test_samples_share_the_memory_of_their_calls(calls):
    logits = torch.randn(sum(calls), 5)
    parts = [part.clone() for part in logits.split(list(calls))]
    samples = split_samples("b", "r", parts, [4] * 4)
    assert torch.equal(torch.cat(samples), logits)
    pointers = {part.untyped_storage().data_ptr() for part in parts}
    shared = [s.untyped_storage().data_ptr() in pointers for s in samples]
    # a sample that is spread over two calls cannot
    assert sum(shared) >= (4 if calls != (3, 13) else 0)
    ranked = split_samples("b", "r", [rank_logits(p, 2) for p in parts], [4] * 4)
    assert torch.equal(
        torch.cat([sample.values for sample in ranked]), rank_logits(logits, 2).values
    )


# ── looking ahead ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_every_second_sample_is_looked_at(count, masked):
    seen = []
    targets = [rank_logits(torch.randn(3, 6)) for _ in range(8)]
    q = {i: torch.randn(3, 6, requires_grad=True) for i in range(8)}

    def q_compared(output, samples):
        assert len(output) == len(samples)
        seen.extend(samples)
        return {"gate": torch.cat([q[i] for i in samples])}

    term = RouterTerm(
        "next router",
        get_objective("topk_mse"),
        1.0,
        (Router("gate", 2, 6),),
        {"gate": targets},
        q_compared,
        every_second=True,
    )
    samples = [6, 1, 4, 0, 3][:count]
    mask = torch.tensor([1, 0, 1] * count) if masked else None
    looked_at = term.looked_at(samples)
    loss = term.loss(torch.zeros(count, 3, 2), samples, mask, looked_at)
    assert seen == samples[::2]
    half = None if mask is None else mask[: 3 * len(samples[::2])]
    whole = term.loss(torch.zeros(len(seen), 3, 2), samples[::2], half, looked_at)
    assert loss.item() == whole.item()


def test_a_micro_batch_that_is_not_looked_at_costs_nothing():
    def q_compared(output, samples):
        raise AssertionError("the next block was run")

    objective = get_objective("topk_mse")
    routers = (Router("gate", 2, 6),)
    term = RouterTerm("next router", objective, 1.0, routers, {}, q_compared, True)
    looked_at = term.looked_at([5, 2, 7, 1])
    assert looked_at == [5, 7]
    assert term.loss(torch.zeros(2, 3, 2), [2, 1], None, looked_at) is None


def test_micro_batches_count_by_the_tokens_that_are_looked_at():
    tokens = SampleTokens([3, 4, 5, 6], [1, 2, 0, 6])
    step, looked_at = [0, 1, 2, 3], [0, 1]
    assert tokens.weight(step, step, looked_at) == 1
    # 3 counted tokens of 18 valid ones in the step
    assert tokens.weight([0, 2], step, looked_at) == pytest.approx(1 / 8 * 18 / 3)
    assert tokens.weight([2, 3], step, looked_at) == 0
    assert tokens.weight([0, 2], step, [2]) == 0  # nothing is selected there


# ── checks ────────────────────────────────────────────────────────────────────


class AWQ:
    """What the check reads of AutoRound's composer."""

    def __init__(self, model):
        self._resolved_mappings = [
            type("Mapping", (), {"smooth_name": f"{name}.norm", "balance_names": names})
            for name, names in (
                (f"layers.{i}", [f"layers.{i}.mlp.gate", f"layers.{i}.mlp.experts.0"])
                for i in range(len(model.layers))
            )
        ]

    def members(self):
        return [self]


def moe(layers, experts=4):
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.top_k = 2
        layer.mlp.gate = nn.Linear(8, experts)
        layer.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
        model.layers.append(layer)
    return model


def test_the_check_of_smoothing_looks_at_every_module_a_few_times(monkeypatch):
    looked = []
    beside = experts.experts_beside

    def spy(parent):
        looked.append(1)
        return beside(parent)

    for room in (experts, find):
        monkeypatch.setattr(room, "experts_beside", spy)
    counts = []
    for layers in (8, 16):
        model = moe(layers)
        found = find_routers(model)
        assert len(found) == layers
        looked.clear()
        check_smoothing(model, found, AWQ(model))
        counts.append(len(looked))
    assert counts[1] <= 2.1 * counts[0]


def test_blocks_are_listed_once_a_run(quantize, monkeypatch):
    """A walk of the whole model, for each of its blocks."""
    calls = []
    listed = alignment_run.get_block_names
    monkeypatch.setattr(
        alignment_run, "get_block_names", lambda *a: calls.append(1) or listed(*a)
    )
    quantize(tiny.tiny_model("solar_open", num_hidden_layers=4), VSRAQConfig(iters=1))
    assert len(calls) == 1


# ── the benchmark ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ["AutoRound", "default"])
def test_the_benchmark_at_size_runs(case):
    size = {"experts": 4, "scale": 8, "nsamples": 2, "seqlen": 16, "batch_size": 1}
    arguments = Namespace(device="cpu", iters=2, **size)
    result = at_size.run_case(case, arguments)
    assert result["peak"] > 2**27
    assert 0 < result["iteration"] < result["seconds"]
    # 24 ranks of 6 bytes for each of two losses, and the limit of the re-fit
    kept = 2 * 24 * 6 * 512 * 2048 + refit_logits.REFIT_BYTES
    assert result["kept"] == (0 if case == "AutoRound" else kept)
    assert set(at_size.CASES) >= {"own term", "next router", "re-fit, weighted"}


def test_a_case_that_is_refused_is_a_row():
    row = at_size.format_row("re-fit, weighted", {"refused": "too large"}, {})
    assert row.split() == ["re-fit,", "weighted", "refused:", "too", "large"]
