"""Every code block of the README and the example scripts run, on the embedded model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vsraq
from vsraq.cli import _parser
from vsraq.demo import model_path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_there_are_code_blocks():
    assert len(blocks("python")) >= 3
    assert len(blocks("bash")) >= 3


def test_every_python_block_runs(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {
        '"upstage/Solar-Open-100B"': repr(str(model_path())),
        "nsamples=512": "nsamples=4",
        "seqlen=2048": f"seqlen=64, dataset={text_file!r}, batch_size=4, iters=2, "
        "enable_torch_compile=False, device_map='cpu'",
    }
    namespace = {}
    for block in blocks("python"):
        code = block
        for long, short in smaller.items():
            code = code.replace(long, short)
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["folder"]
    assert namespace["config"].resolve_objective().name == "worst_expert"


@pytest.mark.parametrize("block", blocks("bash"))
def test_every_shell_line_is_a_command_of_this_project(block):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in block.strip().splitlines():
        program, *arguments = shlex.split(line)
        if program == "make":
            assert set(arguments) <= set(targets)
        elif program == "vsraq":
            parsed = _parser().parse_args(arguments)
            assert parsed.command != "quantize" or (ROOT / parsed.config).is_file()
        else:
            assert line == "pip install ."


def test_the_tables_of_the_readme_are_those_of_the_code():
    table = README.split("## Objectives")[1].split("\n\n")[1]
    names = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert names == list(vsraq.OBJECTIVES)


def test_the_public_names():
    assert vsraq.__all__ == sorted(vsraq.__all__)
    assert set(vsraq.__all__) == {
        "OBJECTIVES",
        "Objective",
        "Router",
        "VSRAQConfig",
        "__version__",
        "find_routers",
    }


def test_importing_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:vsraq", "-c", "import vsraq"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert "vsraq" not in done.stderr


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_solar_example(scheme, text_file, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "quantize_solar.py",
            scheme,
            f"--model={model_path()}",
            f"--output={tmp_path / 'out'}",
            f"--dataset={text_file}",
            "--nsamples=4",
            "--seqlen=64",
            "--iters=1",
        ],
        capture_output=True,
        text=True,
        # the example leaves torch.compile at AutoRound's default, which needs g++
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Verification(kind=" in done.stdout
    assert "routers=6, experts=192" in done.stdout
