# SPDX-License-Identifier: Apache-2.0
"""Bad input on the command line: one line, a documented status, before any work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from vsraq.cli import _explain, main
from vsraq.yaml_text import write_yaml


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a dense one, text, and a recipe that is in order."""
    root = tmp_path_factory.mktemp("inputs")
    tiny.save("solar_open", root / "model")
    tiny.save("llama", root / "dense")
    tiny.save_text(root / "text.jsonl", samples=8)
    recipe = {
        "model": str(root / "model"),
        "scheme": "W4A16",
        "output": str(root / "out"),
        "algorithm": {"group_size": 32, "iters": 1},
        "calibration": {
            "dataset": str(root / "text.jsonl"),
            "nsamples": 4,
            "seqlen": tiny.SEQLEN,
        },
    }
    (root / "recipe.yaml").write_text(write_yaml(recipe))
    return root


def check_only(folder, *overrides):
    return main(["quantize", "--check-only", str(folder / "recipe.yaml"), *overrides])


def refused(capsys, status, expected=1):
    """The one line that was printed."""
    captured = capsys.readouterr()
    assert status == expected
    assert captured.err.startswith("vsraq: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_check_only_says_what_would_be_done(folder, capsys):
    assert check_only(folder) == 0
    said = capsys.readouterr().out
    assert said.startswith("checked: solar_open with ")
    assert " and 2 routers; export about " in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=/no/such/folder", "model='/no/such/folder': no such folder"),
        ("model=sone/modle", "model='sone/modle': its config cannot be read, and the "),
        ("model={root}", "the folder has no config.json"),
        ("model={root}/text.jsonl", "no such folder"),
        ("model={root}/dense", "a llama has no MoE router"),
        ("output={root}/text.jsonl", "text.jsonl is a file; allowed is a folder"),
        ("output={root}/text.jsonl/out", "text.jsonl is a file; allowed is a folder"),
        ("output=/proc/out", "/proc cannot be written"),
        ("format=auto_rnd", "format='auto_rnd'"),
        ("format=fake", "'fake' cannot be verified"),
        ("scheme=W4A61", "scheme='W4A61': unknown; did you mean W4A16?"),
        ("scheme=GGUF:Q4_K_M", "scheme='GGUF:Q4_K_M': unknown"),
        ("algorithm.data_type=fp", "No quantization function found for dtype=fp"),
        ("calibration.nsamples=9", "8 of 8 texts have calibration.seqlen=32 tokens"),
        ("calibration.seqlen=4096", "0 of 8 texts have calibration.seqlen=4096"),
        ("calibration.dataset=pille-10k", "did you mean pile-10k?"),
        ("calibration.dataset=no.jsonl", "dataset='no.jsonl': no such file"),
        ("calibration.dataset={root}/recipe.yaml", "AutoRound reads .json and .jsonl"),
        ("calibration.dataset={root}/bad.jsonl", "no JSON in UTF-8"),
        ("calibration.dataset={root}/ids.json", "sample 1 has no text"),
        ("algorithm.lr=fast", "lr='fast': allowed is a finite number > 0"),
        ("algorithm.token_mask=m", "token_mask='m': it has no effect"),
        ("runtime.device_map=cdua", "runtime.device_map='cdua': allowed is an int"),
        ("runtime.device_map=-1", "runtime.device_map=-1: allowed is an int"),
        ("runtime.model_dtype=bf17", "runtime.model_dtype='bf17': allowed is auto"),
        ("runtime.layer_config={{a: W9A99}}", "runtime.layer_config={'a': 'W9A99'}"),
        ("runtime.layer_config={{a: {{bits: x}}}}", "runtime.layer_config={'a': {"),
        ("runtime.layer_config=[a]", "runtime.layer_config=['a']: allowed is a mapp"),
        ("runtime.ignore_layers=[gate]", "runtime.ignore_layers=['gate']: allowed"),
    ],
)
def test_refused_before_hours_of_work(override, message, folder, capsys):
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "ids.json").write_text('[{"input_ids": [1, 2], "a": 1}]')
    line = refused(capsys, check_only(folder, override.format(root=folder)))
    assert message in line


def test_a_missing_or_broken_token_mask(folder, capsys):
    mask = folder / "mask.safetensors"
    sra = ["algorithm.objective=sra", f"algorithm.token_mask={mask}"]
    line = refused(capsys, check_only(folder, *sra))
    assert f"token_mask='{mask}': there is no such file" in line
    mask.write_bytes(b"not safetensors")
    assert "not a mask of this version" in refused(capsys, check_only(folder, *sra))


def test_no_room_for_the_export(folder, tmp_path, capsys, monkeypatch):
    """A model of 10**16 weights, of which only the config is there."""
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"moe_intermediate_size": 2**42}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(capsys, check_only(folder, f"model={tmp_path}"))
    assert "GB free at" in line
    assert "the run needs about" in line
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "resume"))
    line = refused(capsys, check_only(folder, f"calibration.nsamples={10**9}"))
    assert "the run needs about" in line


def test_paths_that_are_no_recipes(tmp_path, capsys):
    assert "a folder" in refused(capsys, main(["quantize", str(tmp_path)]))
    missing = str(tmp_path / "recipe.yaml")
    assert "no such file" in refused(capsys, main(["quantize", missing]))
    assert "no such file" in refused(capsys, main(["select-tokens", missing]))


def test_verify_takes_trust_remote_code(tmp_path, capsys):
    arguments = ["verify", str(tmp_path), "--reference", "x", "--trust-remote-code"]
    assert "no config.json" in refused(capsys, main(arguments))


def test_debug_shows_the_traceback(tmp_path, capsys):
    path = str(tmp_path)
    for arguments in (["--debug", "quantize", path], ["quantize", path, "--debug"]):
        assert main(arguments) == 1
        captured = capsys.readouterr().err
        assert captured.startswith("Traceback")
        assert "\nvsraq: error: " in captured


def test_a_wrong_command_line_is_status_2(capsys):
    for arguments in ([], ["quantise"], ["verify", "x"], ["demo", "--iters", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "130  interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotImplementedError("no next-router\nterm"), "no next-router term"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (OSError(28, "No space left on device", "out/x"), "No space left on device"),
        (SystemExit(-1), r"AutoRound ended the run (exit status -1)"),
        (
            KeyError("model_type"),
            "unexpected KeyError: 'model_type'; run it again with",
        ),
        (RecursionError(), "unexpected RecursionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_library_and_autoround_raise(error, message):
    status, line = _explain(error)
    assert status == 1
    assert message in line
    assert "\n" not in line


def test_an_interrupt_is_status_130(tmp_path):
    """The recipe is a pipe: when it is opened, the command is at work."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "vsraq.cli", "quantize", str(pipe)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores interrupts, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with Path(pipe).open("w"):
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "vsraq: error: interrupted"
    assert "Traceback" not in said
