# SPDX-License-Identifier: Apache-2.0
"""Routers re-fitted inside AutoRound's runs, exported, and verified."""

import json
import re
from pathlib import Path

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from safetensors.torch import load_file, save_file

import tiny
from test_autoround import same, weights
from vsraq import Objective, VSRAQConfig
from vsraq.checkpoint import CheckpointError, load_model, verify
from vsraq.realignment import realign_routers
from vsraq.routers import find_routers

# its fixtures are made once per process
pytestmark = pytest.mark.xdist_group("test_realigned_runs")

# enough tokens for the fit to hold on samples that it has not seen
MANY = {"dataset": tiny.calibration(samples=64), "nsamples": 64}
ROUTER = "model.layers.0.mlp.gate"
REFIT_LINE = re.compile(
    r"vsraq: router (\S+) (re-fitted|left alone, no gain): held-out logit error "
    r"(\S+) -> (\S+), Jaccard (\S+) -> (\S+)$"
)


def refits(messages):
    return [match.groups() for m in messages if (match := REFIT_LINE.match(m))]


def routers_of(model):
    return {
        r.name: model.get_submodule(r.name).weight.detach().clone()
        for r in find_routers(model)
    }


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_alone_on_top_of_autoround(scheme, quantize, vsraq_log):
    """The first block is tuned as without, then its router moves, and so on."""
    tuning = {"iters": 3, "not_use_best_mse": True}  # the best may be the first
    plain_config = SignRoundConfig(**tuning)
    _, plain = quantize(tiny.tiny_model("solar_open"), plain_config, scheme, **MANY)
    config = VSRAQConfig(**tuning, router_weight=0, realign_routers=True)
    _, model = quantize(tiny.tiny_model("solar_open"), config, scheme, **MANY)

    def block(index, model):
        return {n: w for n, w in weights(model).items() if f"layers.{index}." in n}

    assert same(block(0, plain), block(0, model))
    assert not same(block(1, plain), block(1, model))  # other inputs reach it
    before, after = routers_of(plain), routers_of(model)
    lines = refits(vsraq_log)
    assert [line[0] for line in lines] == list(before)
    for name, verdict, old, new, _, _ in lines:
        applied = verdict == "re-fitted"
        assert applied == (float(new) < float(old))
        assert applied == (not torch.equal(before[name], after[name]))
        assert before[name].dtype == after[name].dtype
    assert "re-fitted" in {line[1] for line in lines}


def test_the_correction_bias_stays(quantize):
    config = VSRAQConfig(iters=1, router_weight=0, realign_routers=True)
    original = tiny.tiny_model("solar_open")
    _, model = quantize(tiny.tiny_model("solar_open"), config, **MANY)
    for name in routers_of(original):
        before, after = (m.get_submodule(name) for m in (original, model))
        expected = before.e_score_correction_bias
        assert torch.equal(expected, after.e_score_correction_bias.to(expected.dtype))
        assert not torch.equal(before.weight.to(after.weight.dtype), after.weight)


def test_two_routers_in_one_group_of_blocks(quantize, vsraq_log):
    config = VSRAQConfig(iters=1, router_weight=0, realign_routers=True, nblocks=2)
    quantize(tiny.tiny_model("solar_open"), config, **MANY)
    assert [line[0].rpartition("layers.")[2] for line in refits(vsraq_log)] == [
        "0.mlp.gate",
        "1.mlp.gate",
    ]
    assert all(line[1] == "re-fitted" for line in refits(vsraq_log))


def test_the_record_of_an_earlier_run_goes(quantize):
    model = tiny.tiny_model("solar_open")
    model.config.vsraq = {"realign_routers": True}
    _, model = quantize(model, VSRAQConfig(iters=1, router_weight=1.0))
    assert not hasattr(model.config, "vsraq")


def test_an_objective_reads_its_ranks_and_no_more(quantize):
    """The re-fit has all of them kept."""
    seen = set()

    def first_rank(q_logits, fp_logits, *, top_k):
        seen.add(fp_logits.values.shape[-1])
        return (q_logits.gather(-1, fp_logits.indices.long()) - fp_logits.values)[
            ..., 0
        ]

    objective = Objective("first", first_rank, ranks_read=lambda *_: 1)
    for realign in (False, True):
        config = VSRAQConfig(
            iters=1, router_weight=1.0, realign_routers=realign, objective=objective
        )
        quantize(tiny.tiny_model("solar_open"), config)
    assert seen == {1}


def test_padding_takes_no_part(quantize):
    """What stands behind the valid tokens does not move a router."""

    def routers(value):
        model = tiny.tiny_model("solar_open")
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = value
        config = VSRAQConfig(iters=1, router_weight=0, realign_routers=True)
        dataset = [ids.clone() for ids in tiny.calibration(samples=64)]
        for ids in dataset:
            ids[:, tiny.SEQLEN // 2 :] = 0
        _, model = quantize(model, config, dataset=dataset, nsamples=len(dataset))
        return routers_of(model)

    moved = routers(0.1)
    assert same(moved, routers(-0.5))
    original = routers_of(tiny.tiny_model("solar_open"))
    assert not same({n: w.to(moved[n].dtype) for n, w in original.items()}, moved)


def test_on_top_of_round_to_nearest(quantize):
    """`iters=0` is AutoRound's RTN; its routers are re-fitted afterwards."""
    source = tiny.tiny_model("solar_open")
    _, model = quantize(
        tiny.tiny_model("solar_open"), "rtn", disable_opt_rtn=True, **MANY
    )
    before = weights(model)
    reports = realign_routers(model.float(), source, MANY["dataset"])
    assert any(report.applied for report in reports)
    assert same(before, {n: w.to(before[n].dtype) for n, w in weights(model).items()})


# ── the export ────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """(folder of the export, tuned model, folder of the original)."""
    with tiny.bfloat16():
        return realigned_export(tmp_path_factory.mktemp("realigned"))


def realigned_export(root):
    source = tiny.save("solar_open", root / "source")
    autoround = AutoRound(
        load_model(source),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=1, router_weight=0, realign_routers=True),
        group_size=32,
        **tiny.RUN | MANY,
    )
    tuned, _ = autoround.quantize()
    _, folder = autoround.save_quantized(
        str(root / "out"), format="auto_round", inplace=False, return_folders=True
    )
    return folder, tuned, source


def test_the_export_holds_the_new_router(export):
    folder, tuned, source = export
    original = load_model(source)
    exported = load_model(folder)
    name = ROUTER
    assert torch.equal(
        exported.get_submodule(name).weight, tuned.get_submodule(name).weight
    )
    assert not torch.equal(
        exported.get_submodule(name).weight, original.get_submodule(name).weight
    )


def test_verify_knows(export):
    folder, tuned, source = export
    against_tuned = verify(folder, tuned)
    assert (against_tuned.routers, against_tuned.realigned_routers) == (2, 0)
    against_original = verify(folder, source)
    changed = sum(
        not torch.equal(weight, load_model(source).get_submodule(name).weight)
        for name, weight in routers_of(tuned).items()
    )
    assert against_original.realigned_routers == changed > 0


def altered(export, tmp_path, change=None, drop_record=False):
    folder, _, _ = export
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    if change is not None:
        tensors[f"{ROUTER}.weight"] = change(tensors[f"{ROUTER}.weight"])
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    if drop_record:
        del config["vsraq"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_another_router_than_the_tuned_one_is_a_fault(export, tmp_path):
    folder = altered(export, tmp_path, lambda weight: weight * 1.5)
    with pytest.raises(CheckpointError, match="not the router that was re-fitted"):
        verify(folder, export[1])


def test_without_the_record_a_new_router_is_a_fault(export, tmp_path):
    folder = altered(export, tmp_path, drop_record=True)
    with pytest.raises(CheckpointError, match="differs from the reference's router"):
        verify(folder, export[2])


def test_a_re_fitted_router_must_have_its_recorded_bytes(export, tmp_path):
    """Also against the original alone, which does not know the new weights."""
    changes = {
        "nan": lambda weight: weight * torch.nan,
        "dtype": lambda weight: weight.float(),
        "other": lambda weight: weight * 1.5,
        "original": lambda _: load_file(export[2] / "model.safetensors")[
            f"{ROUTER}.weight"
        ],
    }
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        folder = altered(export, tmp_path / name, change)
        with pytest.raises(CheckpointError, match="not the router that was re-fitted"):
            verify(folder, export[2])


@pytest.mark.usefixtures("bfloat16")
def test_streamed_from_disk_and_written_block_by_block(tmp_path):
    source = tiny.save("solar_open", tmp_path / "model")
    autoround = AutoRound(
        str(source),
        alg_configs=VSRAQConfig(
            iters=1, router_weight=1.0, next_router_weight=1.0, realign_routers=True
        ),
        group_size=32,
        **tiny.RUN | MANY,
    )
    _, folder = autoround.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    result = verify(folder, source)
    assert result.routers == 2
    assert result.realigned_routers > 0
