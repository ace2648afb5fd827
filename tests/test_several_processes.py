"""Two real processes that tune one model together, each on half of the samples."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import process_of_two
import tiny
from vsraq.checkpoint import verify
from vsraq.realignment import refit_router
from vsraq.routers import correction_bias, find_routers

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


def test_exports_are_equal_and_verify(folder, of_both, tmp_path):
    files = [load_file(next(folder.glob(f"rank{r}/**/*.safetensors"))) for r in (0, 1)]
    assert not different(*files)
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    model.save_pretrained(tmp_path)
    assert verify(next(folder.glob("rank0/**/config.json")).parent, tmp_path).ok
    gates = [name for name in files[0] if name.endswith("mlp.gate.weight")]
    original = model.state_dict()
    assert len(gates) == 2
    assert any(not torch.equal(files[0][name], original[name]) for name in gates)


def test_one_process_speaks(of_both):
    first, second = of_both("export")
    assert sum("held-out logit error" in line for line in first["log"]) == 2
    assert any("tokens per expert" in line for line in first["log"])
    assert not second["log"]


def test_tokens_of_both_are_counted(of_both):
    table = [line.split() for line in of_both("nvfp4")[0]["log"] if "mlp.gate " in line]
    assert table
    seen = 16 * tiny.SEQLEN * tiny.TOP_K  # of 8 experts, so the median is below it
    assert any(int(row[-5]) > seen / 2 / 8 for row in table if row[-5].isdigit())


def test_experts_without_a_token_in_one_process(of_both):
    """On several devices AutoRound averages the gradients that there are."""
    first, second = of_both("uneven")
    assert not different(first["tensors"], second["tensors"])


def test_activation_scales_are_those_of_all_samples(of_both):
    first, second = of_both("nvfp4")
    assert sum(name.endswith("act_max") for name in first["tensors"]) > 8
    assert not different(first["tensors"], second["tensors"])


def test_a_refit_on_halves_is_the_refit_on_all(of_both):
    first, second = of_both("refit")
    assert torch.equal(first["weight"], second["weight"])
    assert first["report"] == second["report"]
    model = tiny.tiny_model("solar_open")
    router = find_routers(model)[0]
    module = model.get_submodule(router.name)
    samples = tiny.refit_samples()
    # the processes hold out the second of their own: samples 2 and 3
    held_out = [samples[2], samples[3]]
    fitted = [s for s in samples if s not in held_out]
    ordered = [fitted[0], held_out[0], *fitted[1:8], held_out[1], *fitted[8:]]
    report = refit_router(router, module, ordered, bias=correction_bias(model, router))
    assert report.applied
    assert report.after == pytest.approx(first["report"].after, rel=1e-5)
    torch.testing.assert_close(module.weight.detach(), first["weight"])


def test_what_would_not_end_equal_is_refused(of_both):
    for rank, messages in enumerate(of_both("refusals")):
        assert "iters: the processes have 1, 2" in messages["settings"]
        assert "nsamples: the processes have [8, 7] calibration" in messages["samples"]
        assert "output_dir=" in messages["folder"], rank
        assert "several processes would write the same files" in messages["folder"]
        assert "AWQ" in messages["awq"]
        assert "world_size=2" in messages["awq"]


def test_quality_is_that_of_one_process(of_both):
    divergences = [
        process_of_two.recipe(tiny.calibration(samples=16), seed)[1]
        for seed in (0, 1, 2)
    ]
    print("one process", divergences, "two", of_both("export")[0]["divergence"])
    both = of_both("export")
    assert both[0]["divergence"] == both[1]["divergence"]
    spread = max(divergences) - min(divergences)
    assert min(divergences) - spread <= both[0]["divergence"]
    assert both[0]["divergence"] <= max(divergences) + spread
