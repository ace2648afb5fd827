import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from auto_round import AutoRound
from safetensors.torch import load_file

import tiny
from test_autoround import tuned
from vsraq import VSRAQConfig
from vsraq.autoround.resume_guard import guard_resume

SETTINGS = {"iters": "4", "objective": "vsraq"}


def unfinished(folder):
    (folder / "group_0").mkdir(parents=True)
    (folder / "group_0" / "resume_manifest.json").write_text("{}")


def test_the_same_settings_may_resume(tmp_path):
    guard_resume(tmp_path, SETTINGS)
    unfinished(tmp_path)
    guard_resume(tmp_path, SETTINGS)


def test_other_settings_are_refused(tmp_path):
    guard_resume(tmp_path, SETTINGS)
    unfinished(tmp_path)
    with pytest.raises(ValueError, match=r"iters was 4, now 5\); allowed are the same"):
        guard_resume(tmp_path, SETTINGS | {"iters": "5"})


def test_a_run_of_another_algorithm_is_refused(tmp_path):
    unfinished(tmp_path)
    with pytest.raises(ValueError, match="unfinished run of another algorithm"):
        guard_resume(tmp_path, SETTINGS)


def test_a_finished_run_leaves_the_folder_free(tmp_path):
    guard_resume(tmp_path, SETTINGS)
    guard_resume(tmp_path, SETTINGS | {"iters": "5"})


KILLED = """
    import os, signal, sys
    import tiny
    from auto_round import AutoRound
    from vsraq import VSRAQConfig
    from vsraq.autoround import VSRAQQuantizer

    log = VSRAQQuantizer._log

    def die_in_the_second_block(self, run):
        if run.name.endswith("1"):
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, run)

    VSRAQQuantizer._log = die_in_the_second_block
    with tiny.bfloat16():
        AutoRound(
            sys.argv[1],
            scheme="W4A16",
            group_size=32,
            alg_configs=VSRAQConfig(iters=2, **eval(sys.argv[4])),
            dataset=sys.argv[2],
            **tiny.RUN,
        ).quantize_and_save(sys.argv[3], format="auto_round")
"""


def kill(source, text, output, **options):
    """A real run that dies while it tunes its second block."""
    script = textwrap.dedent(KILLED)
    arguments = [str(source), text, str(output), repr(options)]
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]


@pytest.fixture
def resumable(tmp_path, monkeypatch):
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "resume"))
    source = tiny.save("solar_open", tmp_path / "model")
    return source, tiny.save_text(tmp_path / "text.jsonl")


@pytest.mark.usefixtures("bfloat16")
def test_a_killed_run_resumes_with_its_settings_only(resumable, quantize, tmp_path):
    source, text = resumable
    kill(source, text, tmp_path / "out", router_weight=1.0)
    run = {"dataset": text, "group_size": 32}
    with pytest.raises(ValueError, match=r"router_weight was 1.0, now 2.0"):
        quantize(str(source), VSRAQConfig(iters=2, router_weight=2.0), **run)
    config = VSRAQConfig(iters=2, router_weight=1.0)
    with pytest.raises(ValueError, match=r"seed was 42, now 1"):
        quantize(str(source), config, seed=1, **run)


@pytest.mark.usefixtures("bfloat16")
def test_a_resumed_run_ends_as_one_that_was_never_killed(
    resumable, tmp_path, monkeypatch
):
    """The default recipe: its second block needs the re-fitted router of the first.

    On selected tokens: the process that resumes selects the same again.
    """
    source, text = resumable
    options = {"token_selection": True, "tau": 0.05}

    def export(folder):
        autoround = AutoRound(
            str(source),
            scheme="W4A16",
            group_size=32,
            alg_configs=VSRAQConfig(iters=2, **options),
            dataset=text,
            **tiny.RUN,
        )
        _, path = autoround.quantize_and_save(
            str(tmp_path / folder), format="auto_round"
        )
        tensors = {}
        for file in Path(path).glob("*.safetensors"):
            tensors |= load_file(file)
        return tensors, autoround.alg_composer.block_quantizer.token_mask

    kill(source, text, tmp_path / "resumed", **options)
    with tiny.LogLines() as log:
        resumed, mask = export("resumed")
    assert [line["block"] for line in tiny.block_lines(log)] == ["model.layers.1"]
    monkeypatch.delenv("AR_RESUME_DIR")
    never_killed, same_mask = export("never killed")
    assert mask.digest == same_mask.digest
    assert 0 < mask.selected < mask.total
    assert resumed.keys() == never_killed.keys()
    assert all(torch.equal(t, never_killed[name]) for name, t in resumed.items())


def test_no_resume_folder_no_file(quantize, tmp_path, monkeypatch):
    monkeypatch.delenv("AR_RESUME_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    tuned(quantize, VSRAQConfig(iters=1))
    assert not list(tmp_path.rglob("vsraq_run.json"))
