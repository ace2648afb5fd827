# SPDX-License-Identifier: Apache-2.0
"""What better routing would be worth: the experiment of SRA Fig. 4."""

import copy
import json

import pytest
import torch

import families
import tiny
from replayed import damaged
from test_capture import hook_count
from vsraq import record_routing, replay_routing
from vsraq.analysis import Thresholds, compare, measure_replay
from vsraq.analysis.replay_effect import ReplaySums
from vsraq.cli import main
from vsraq.metrics import routing_shift, sampled_jsd
from vsraq.routers import find_routers
from vsraq.tokens import Sampling

IDS = torch.cat(tiny.calibration(samples=5, seqlen=12))
OPTIONS = {"batch_size": 2, "sampling": Sampling(1.0, 50, 1.0)}


@pytest.fixture(scope="module")
def pair():
    model = tiny.tiny_model("deepseek_v3")
    return model, damaged(model, scale=0.15)


@pytest.fixture(scope="module")
def by_hand(pair):
    """Sampled-JSD and routing shift, with other code: (N, S) each."""
    model, q_model = pair
    with torch.no_grad():
        logits = [m(input_ids=IDS, use_cache=False).logits for m in pair]
    routings = [record_routing(m, [IDS]) for m in pair]
    shifts = []
    for router, fp, q in zip(
        find_routers(model), *(r.routers for r in routings), strict=True
    ):
        chosen = []
        for m, recorded in ((q_model, q), (model, fp)):
            raw = recorded.calls[0][1][recorded.raw_logits]
            chosen.append(router.bind(m).select(raw))
        shifts.append(routing_shift(*chosen))
    shift = torch.stack(shifts).mean(0).view(IDS.shape)
    values = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    return sampled_jsd(logits[1], logits[0], **values), shift, logits[0], routings[0]


@pytest.fixture(scope="module")
def halves(by_hand):
    """Thresholds that half of the tokens are above, and none is close to."""
    jsd, shift = by_hand[0].flatten().sort().values, by_hand[1].flatten()
    middle = len(jsd) // 2
    return Thresholds(
        sampled_jsd=jsd[middle - 1 : middle + 1].mean().item(),
        routing_shift=shift.median().item() + 1e-3,
    )


def regions(jsd, shift, thresholds):
    high, moved = jsd > thresholds.sampled_jsd, shift > thresholds.routing_shift
    return {
        "A": high & ~moved,
        "B": high & moved,
        "C": ~high & ~moved,
        "D": ~high & moved,
        "all": torch.ones_like(high),
    }


@pytest.mark.parametrize("region", ["A", "B", "C", "D", "all", "mask"])
def test_against_the_experiment_written_by_hand(pair, by_hand, halves, region):
    jsd, shift, fp_logits, routing = by_hand
    if region == "mask":
        chosen = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        tokens = chosen
    else:
        chosen = regions(jsd, shift, halves)[region]
        tokens = region
    result = measure_replay(*pair, IDS, tokens, thresholds=halves, **OPTIONS)
    assert (result.tokens, result.chosen) == (IDS.numel(), int(chosen.sum()))
    assert result.region == region
    assert 0 < result.chosen
    with torch.no_grad(), replay_routing(pair[1], routing, chosen):
        logits = pair[1](input_ids=IDS, use_cache=False).logits
    after = sampled_jsd(logits, fp_logits, temperature=1.0, top_k=50, top_p=1.0)
    expected = (jsd[chosen], after[chosen], (after - jsd)[chosen])
    found = (result.before["sampled_jsd"], result.after["sampled_jsd"])
    for interval, values in zip((*found, result.mean_change), expected, strict=True):
        assert interval.value == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-6)
        assert interval.low <= interval.value <= interval.high
    improved = (expected[2] < 0).float().mean().item()
    assert result.improved.value == pytest.approx(improved, abs=0.05)
    change = result.change
    assert sum(change.counts) == result.chosen
    assert change.below == change.above == 0


def test_the_regions_are_those_of_compare(pair, halves):
    options = OPTIONS | {"thresholds": halves}
    found = compare(*pair, IDS, **options)
    metrics = found.methods["quantized"].metrics
    for region in "ABCD":
        share = metrics[f"region_{region.lower()}"].value
        chosen = measure_replay(*pair, IDS, region, **options).chosen
        assert chosen == pytest.approx(share * IDS.numel())


def test_a_model_that_replays_its_own_routing_does_not_change(pair):
    model, _ = pair
    result = measure_replay(model, model, IDS, "all", **OPTIONS)
    for interval in (result.before["sampled_jsd"], result.after["sampled_jsd"]):
        assert interval.value == interval.low == interval.high == 0
    assert result.improved.value == result.mean_change.value == 0


def test_a_model_whose_head_needs_more_than_hidden_states():
    model = families.tiny_family("qwen4_exp_text")  # several streams between blocks
    result = measure_replay(damaged(model), model, IDS, "all", **OPTIONS)
    assert result.chosen == IDS.numel()
    assert result.after["sampled_jsd"].value < result.before["sampled_jsd"].value


def of_logits(model):
    """The same model, but it takes no embeddings, so that it cannot be split."""

    class OfLogits(type(model)):
        def forward(self, input_ids, use_cache=None):
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    other = copy.deepcopy(model)
    other.__class__ = OfLogits
    return other


def test_one_model_whose_head_cannot_be_used(pair, monkeypatch):
    """Hidden states on one side, logits on the other, in chunks."""
    expected = measure_replay(*pair, IDS, "all", **OPTIONS)
    monkeypatch.setattr("vsraq.analysis.passes.CHUNK_TOKENS", 7)
    monkeypatch.setattr("vsraq.analysis.passes.CHUNK_LOGITS", 1)
    for whole in (0, 1):
        models = list(pair)
        models[whole] = of_logits(models[whole])
        result = measure_replay(*models, IDS, "all", **OPTIONS)
        for name in ("before", "after"):
            found, wanted = (
                getattr(r, name)["sampled_jsd"] for r in (result, expected)
            )
            assert found.value == pytest.approx(wanted.value, rel=1e-3)


def test_nothing_chosen(pair):
    model, _ = pair
    result = measure_replay(model, model, IDS, "B", **OPTIONS)
    assert result.chosen == 0
    assert result.before["sampled_jsd"].value is result.improved.value is None
    assert "0 of 60 tokens (0.0%, region B)" in str(result)
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("E", "allowed are A, B, C, D, all, or a mask"),
        (
            torch.ones(5, 11, dtype=torch.bool),
            r"\(5, 11\); the text has shape \(5",
        ),
        (torch.ones(5, 12), "a mask of torch.float32"),
    ],
)
def test_other_choices_are_refused(pair, tokens, message):
    with pytest.raises(ValueError, match=message):
        measure_replay(*pair, IDS, tokens, **OPTIONS)
    assert hook_count(pair[0]) == hook_count(pair[1]) == 0


def test_sums_of_batches_are_those_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 6, 4, generator=generator) * 0.6
    chosen = torch.rand(6, 4, generator=generator) < 0.5
    sums = ReplaySums()
    for rows in (slice(0, 2), slice(2, 6)):
        sums.add(chosen[rows], before[rows].flatten(), after[rows].flatten())
    found = [interval.value for interval in sums.intervals(0)]
    b, a = before[chosen].double(), after[chosen].double()
    expected = [b.mean(), a.mean(), (a - b).mean(), (a < b).double().mean()]
    assert found == pytest.approx([value.item() for value in expected])
    assert sums.chosen == chosen.sum()
    edges, counts = sums.histogram().edges, sums.histogram().counts
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == ((a - b >= low) & (a - b < high)).sum()


def test_the_command(pair, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    for name, model in zip(("fp", "q"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "ids.safetensors"), "--out", str(out)]
    arguments += ["--jsd-threshold", "0.05", "--shift-threshold", "0.2"]
    monkeypatch.chdir(tmp_path / "q")
    models = [str(tmp_path / "fp"), "."]
    assert main(["replay", *models, *arguments, "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "q: " in printed
    assert "written to" in printed
    assert {file.name for file in out.iterdir()} == {"replay.json", "vsraq_replay.log"}
    found = json.loads((out / "replay.json").read_text())
    assert found["format"] == "vsraq-replay/1"
    assert (found["method"], found["region"], found["tokens"]) == ("q", "B", 60)
    again = measure_replay(*pair, IDS, batch_size=2, thresholds=Thresholds(0.05, 0.2))
    assert found["chosen"] == again.chosen > 0
    assert found["change"] == again.as_dict()["change"]
