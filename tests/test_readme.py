# SPDX-License-Identifier: Apache-2.0
"""What the README and the options say is so, and every example script runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tiny
import vsraq
from vsraq import options
from vsraq.demo import model_path

ROOT = Path(__file__).parents[1]
OPTIONS = (ROOT / "docs" / "options.md").read_text()


def test_the_table_of_objectives_is_that_of_the_code():
    table = OPTIONS.split("## Objectives")[1].split("\n\n")[1]
    names = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert names == list(vsraq.OBJECTIVES)


def test_every_option_and_hyperparameter_is_described():
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", OPTIONS, re.M)
    assert sorted(name for name, _ in rows) == sorted(options.OPTIONS)
    table = OPTIONS.split("### Hyper-parameters")[1].split("###")[0]
    cells = [row.split(" | ") for row in re.findall(r"^\| `.+", table, re.M)]
    described = {
        (objective, name.strip("|` "))
        for name, _default, _allowed, objectives, _meaning in cells
        for objective in re.findall(r"`(\w+)`", objectives)
    }
    known = vsraq.OBJECTIVES.values()
    assert described == {(o.name, name) for o in known for name in o.hyperparameters}


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, heading = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), f"{page.name}: {link}"
            titles = (
                re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
            )
            anchors = [
                re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles
            ]
            assert not heading or heading in anchors, f"{page.name}: {link}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_public_names():
    assert len(vsraq.__all__) == len(set(vsraq.__all__))  # ruff keeps their order
    assert set(vsraq.__all__) == {
        "BitPlan",
        "OBJECTIVES",
        "Objective",
        "Router",
        "RoutingRecord",
        "VSRAQConfig",
        "__version__",
        "calibration_samples",
        "compare",
        "evaluate",
        "find_routers",
        "plan_bits",
        "realign_routers",
        "record_routing",
        "replay_routing",
        "select_tokens",
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


def pytest_generate_tests(metafunc):
    if "scheme" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        metafunc.parametrize("scheme", ["W4A16", "NVFP4"] if every else ["NVFP4"])


def test_the_solar_example(scheme, text_file, tmp_path):
    output = run_example("quantize_solar.py", scheme, model_path(), text_file, tmp_path)
    assert "routers=6," in output
    assert "experts=192" in output


def test_the_nemotron_example(scheme, tmp_path):
    """A tiny hybrid, streamed from disk, exported and verified."""
    source = tiny.save("nemotron_h", tmp_path / "model")
    text = tiny.save_text(tmp_path / "text.jsonl", samples=64)
    output = run_example("quantize_nemotron.py", scheme, source, text, tmp_path)
    assert "routers=2," in output
    reach = re.findall(r"next router .*? reaches (\d+) of (\d+) quantized", output)
    assert len(set(reach)) == 3  # a Mamba, a MoE and an attention layer
    assert all(reached == quantized != "0" for reached, quantized in reach)


def test_the_qwen_example(tmp_path):
    """The mask of the first run is found by the second."""
    source = tiny.save("qwen3_moe", tmp_path / "model")
    text = tiny.save_text(tmp_path / "text.jsonl", samples=64)
    mask = f"--mask={tmp_path / 'mask.safetensors'}"
    arguments = ("quantize_qwen3_sra.py", "W4A16", source, text)
    first = run_example(*arguments, tmp_path / "first", mask)
    assert "vsraq: selected " in first
    second = run_example(*arguments, tmp_path / "second", mask)
    assert "vsraq: a given mask selects " in second
    assert "vsraq: selected " not in second


RUN_SCRIPT = """
import runpy, sys, tiny
sys.argv = sys.argv[1:]
with tiny.bfloat16():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(script, scheme, model, dataset, folder, *more):
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN_SCRIPT,
            ROOT / "examples" / script,
            scheme,
            f"--model={model}",
            f"--output={folder / 'out'}",
            f"--dataset={dataset}",
            "--nsamples=4",
            "--seqlen=32",
            "--iters=1",
            *(["--group-size=32"] if scheme == "W4A16" else []),
            *more,
        ],
        capture_output=True,
        text=True,
        # the examples leave torch.compile at AutoRound's default, which needs g++
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join(folders),
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Verification(kind=" in done.stdout
    return done.stdout + done.stderr
