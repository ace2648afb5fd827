# SPDX-License-Identifier: Apache-2.0
"""Two real processes that tune one model together, each on half of the samples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import process_of_two
import tiny
from prepared import prepare
from test_rounded_pass import padded
from vsraq.checkpoint import verify
from vsraq.realignment import refit_router
from vsraq.routers import find_routers

pytestmark = pytest.mark.xdist_group("several processes")
SCRIPT = Path(process_of_two.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes have written."""
    folder = tmp_path_factory.mktemp("processes")
    logs = [folder / f"{rank}.log" for rank in (0, 1)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, str(SCRIPT), str(folder), str(rank)]
            running.append(
                subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, cwd=folder
                )
            )
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return folder


@pytest.fixture
def of_both(folder):
    def load(name):
        return [
            torch.load(folder / f"{name}{r}.pt", weights_only=False) for r in (0, 1)
        ]

    return load


def different(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_plain_autoround_leaves_the_processes_with_different_weights(of_both):
    """Each keeps the iteration that was best for its own samples.

    When this fails, AutoRound decides that together, and `with_common_value` can go.
    """
    first, second = of_both("plain")
    assert different(first["tensors"], second["tensors"])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    return model, folder


def gates(folder):
    tensors = load_file(folder / "model.safetensors")
    return {n: tensors[n] for n in tensors if n.endswith("mlp.gate.weight")}


def test_the_first_process_exports(folder, of_both, original):
    model, source = original
    first, second = of_both("export")
    assert not different(first["tensors"], second["tensors"])
    assert first["again"] == "ran"
    assert "rank=1: this process would export too" in second["again"]
    assert not (folder / "rank1").exists()
    verify(folder / "rank0", source)
    exported, before = gates(folder / "rank0"), model.state_dict()
    assert len(exported) == 2
    assert any(not torch.equal(exported[name], before[name]) for name in exported)


def test_one_packs_its_blocks_while_the_other_tunes(folder, of_both, original):
    (exports,) = (folder / "at_once").iterdir()  # AutoRound names it by the scheme
    verify(exports, original[1])
    exported = gates(exports)
    tuned = of_both("at_once")[1]
    assert len(tuned) == 2
    assert not different({f"{n}.weight": w for n, w in tuned.items()}, exported)


def test_one_process_speaks(of_both):
    first, second = of_both("export")
    assert sum("held-out logit error" in line for line in first["log"]) == 2
    assert any("tokens per expert" in line for line in first["log"])
    assert not second["log"]


@pytest.mark.parametrize("step", ["uneven", "nvfp4", "extension"])
def test_experts_without_a_token_in_one_process(step, of_both):
    """On several devices; with static scales; with scales from squared activations."""
    first, second = of_both(step)
    assert not different(first["tensors"], second["tensors"])


@pytest.fixture(scope="module")
def of_one():
    """One process with the samples of both; its first block sees what both see."""
    samples = tiny.calibration(samples=16, seqlen=process_of_two.FEW)
    return process_of_two.few_tokens(samples, "NVFP4", nsamples=16, batch_size=8)


# The last bits of a matrix product depend on its number of rows, which decides how it
# is computed, and an expert has other rows in two processes than in one. The input of
# an expert's down_proj has several products of 64 terms before it.
ROUNDING = {"rtol": 64 * torch.finfo(torch.float32).eps, "atol": 0.0}


def test_activation_scales_are_those_of_all_samples(of_both, of_one):
    both = of_both("nvfp4")[0]["tensors"]
    scales = [n for n in both if n.endswith("act_max") and ".layers.0." in n]
    assert len(scales) > 32
    for name in scales:
        torch.testing.assert_close(both[name], of_one["tensors"][name], **ROUNDING)


def largest_inputs(rank):
    """Of each expert's down_proj in the first block, over one process' samples."""
    model = tiny.tiny_model("solar_open", **process_of_two.FEW_TOKENS)
    model = prepare(model, "NVFP4").module
    found = {}

    def look(name, args):
        if args[0].numel():
            found[name] = args[0].abs().amax().view(1)

    for name, module in model.model.layers[0].named_modules():
        if re.search(r"experts\.\d+\.down_proj$", name):
            scale = f"model.layers.0.{name}.act_max"
            module.register_forward_pre_hook(lambda _, args, n=scale: look(n, args))
    ids = torch.cat(process_of_two.own_samples(rank, seqlen=process_of_two.FEW))
    with torch.no_grad():
        model(ids, attention_mask=padded(ids))
    return found


def test_activation_scales_are_not_those_of_one_process(of_both):
    both = of_both("nvfp4")[0]["tensors"]
    halves = [largest_inputs(rank) for rank in (0, 1)]
    for name in halves[0] | halves[1]:
        found = torch.cat([own[name] for own in halves if name in own])
        torch.testing.assert_close(both[name], found.amax().view(1), **ROUNDING)
    shared = halves[0].keys() & halves[1].keys()
    differ = [abs(1 - own[n] / both[n]).item() for own in halves for n in shared]
    assert max(differ) > 0.1  # far more than rounding


def test_tokens_of_both_are_counted_once(of_both, of_one):
    def row(run):
        rows = {line for line in run["log"] if "layers.0.mlp.gate " in line}
        return [line for line in rows if line.endswith("of 32")]

    assert len(row(of_one)) == 1
    assert row(of_both("nvfp4")[0]) == row(of_one)


def test_selected_tokens_of_both_are_one_mean(of_both):
    """SRA's Eq. 8 over the tokens of a step, where one process has nine times more."""
    both = of_both("masked")[0]
    samples = tiny.calibration()
    one = process_of_two.first_loss(samples, process_of_two.SHARES, batch_size=8)
    # AutoRound divides by the step's valid tokens, here the mean of both processes
    assert both[0] == pytest.approx(2 * one[0], rel=1e-3)


@pytest.mark.parametrize("weighting", ["uniform", "boundary"])
def test_a_refit_on_halves_is_the_refit_on_all(weighting, of_both):
    first, second = (results[weighting] for results in of_both("refit"))
    assert torch.equal(first["weight"], second["weight"])
    assert first["report"] == second["report"]
    model = tiny.tiny_model("solar_open")
    router = find_routers(model)[0]
    module = model.get_submodule(router.name)
    samples = tiny.refit_samples()
    # Each process holds out its second sample, here 2 and 3; one process would hold
    # out the second and the tenth.
    order = [0, 2, 1, 4, 5, 6, 7, 8, 9, 3, 10, 11, 12, 13, 14, 15]
    report = refit_router(
        router.bind(model),
        [samples[i] for i in order],
        weighting=weighting,
    )
    assert report.applied
    assert report.after == pytest.approx(first["report"].after, rel=1e-5)
    torch.testing.assert_close(module.weight.detach(), first["weight"])


REFUSALS = {
    "settings": "iters: the processes have 1, 2, by rank",
    "seed": "seed: the processes have 0, 1, by rank",
    "seqlen": "seqlen: the processes have 32, 24, by rank",
    "samples": "nsamples: the processes have [8, 7] calibration samples",
    "text": "dataset: several processes have the same calibration samples",
    "model": "model: the processes have",
    "bits": "layer_config: the processes have",
    "head": "world_size=2 with lm_head: AutoRound tunes layers outside",
    "folder": "rank=1: this process would export too",
    "resume": "AR_RESUME_DIR with world_size=2",
    "awq": "world_size=2 with AWQ",
    "weights": "block layers.0: the processes have tuned 2 of 2 tensors to different",
    "mask": "token mask: 1 samples have selected tokens",
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_what_would_not_end_equal_is_refused(refused, of_both):
    for messages in of_both("refusals"):
        assert REFUSALS[refused] in messages[refused]


def test_quality_is_that_of_one_process(of_both):
    """With as many samples, and as many in a step: 2 x 4 of 2 x 8, or 8 of 16.

    One process with the settings of each of the two would see half of the samples, and
    end worse than both.
    """
    one = [
        process_of_two.recipe(
            tiny.calibration(samples=16), seed, nsamples=16, batch_size=8
        )[1]
        for seed in (0, 1, 2)
    ]
    first, second = (run["divergence"] for run in of_both("export"))
    print("one process", one, "two", first)
    assert first == second
    assert first <= max(one) + max(one) - min(one)
