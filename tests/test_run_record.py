# SPDX-License-Identifier: Apache-2.0
"""`vsraq_run.json` beside an export, also of runs that were resumed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from auto_round import AutoRound

import tiny
from vsraq import VSRAQConfig
from vsraq.expert_coverage import FILE_NAME as COVERAGE
from vsraq.run_record.file import BlockEntry, RunFile, read_run

ROOT = Path(__file__).parents[1]
ITERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The export of one default run."""
    autoround = AutoRound(
        tiny.tiny_model("solar_open"),
        tokenizer=tiny.tiny_tokenizer(),
        scheme="W4A16",
        group_size=32,
        alg_configs=VSRAQConfig(iters=ITERS),
        dataset=tiny.calibration(),
        **tiny.RUN,
    )
    output = tmp_path_factory.mktemp("export")
    return Path(autoround.quantize_and_save(str(output), format="auto_round")[1])


def test_it_is_what_the_schema_says(folder):
    run = read_run(folder)
    assert run["model"] == "SolarOpenForCausalLM"
    assert run["scheme"] == "W4A16"
    assert run["recipe"] is None
    assert run["seconds"]["planning"] is None
    assert run["peak_mebibytes"]["host"] > 100
    assert run["peak_mebibytes"]["devices"] == {}
    first, second = run["blocks"]
    assert first["name"] == "model.layers.0"
    assert first["losses"].keys() == {"reconstruction", "router", "next router"}
    assert first["weights"].keys() == {"router", "next router"}
    assert second["losses"].keys() == {"reconstruction", "router"}
    for block in run["blocks"]:
        assert block["iterations"] == ITERS
        assert all(len(curve) == ITERS for curve in block["losses"].values())
        (router,) = block["routers"]
        assert router["name"] == f"{block['name']}.mlp.gate"
    assert run["seconds"]["tuning"] > first["seconds"] + second["seconds"]


def test_the_coverage_is_that_of_the_other_file(folder):
    counted = json.loads((folder / COVERAGE).read_text())["routers"]
    coverage = read_run(folder)["coverage"]
    assert coverage == {name: entry["tokens"] for name, entry in counted.items()}


def test_every_key_is_documented():
    text = (ROOT / "docs" / "run_record.md").read_text().partition("## Callbacks")[0]
    whole, block = (
        re.findall(r"^\| `(\w+)` \|", table, re.M)
        for table in text.split("Each block has these:")
    )
    assert whole == list(RunFile.model_fields)
    assert block == list(BlockEntry.model_fields)


def test_the_example_of_the_docs_runs():
    text = (ROOT / "docs" / "run_record.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    namespace = {}
    exec(compile(code, "run_record.md", "exec"), namespace)
    assert namespace["config"].callbacks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "vsraq-run/2"},
            r"format: .*; allowed is a vsraq_run\.json of form",
        ),
        ({"scheme": None}, "scheme: "),
        ({"more": 1}, "more: "),
        ({"seconds": {"tuning": 1.0}}, r"seconds\.planning: "),
    ],
)
def test_another_file_is_refused(change, message, folder, tmp_path):
    content = read_run(folder) | change
    (tmp_path / "vsraq_run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_what_is_no_json_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path)
    (tmp_path / "vsraq_run.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_run(tmp_path)


# ── resumed ──────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys, tiny
from auto_round import AutoRound
from vsraq import VSRAQConfig
from vsraq.callbacks import Callback

class Kill(Callback):
    def on_run_start(self, run):
        print("done", run.done, flush=True)

    def on_block_start(self, block):
        print("block", block.index, block.blocks, flush=True)
        if block.index == 1 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

with tiny.bfloat16():
    AutoRound(
        sys.argv[1] + "/model",
        scheme="W4A16",
        group_size=32,
        alg_configs=VSRAQConfig(iters=2, callbacks=[Kill()]),
        dataset=sys.argv[1] + "/text.jsonl",
        **tiny.RUN,
    ).quantize_and_save(sys.argv[1] + "/out", format="auto_round")
"""


def test_a_resumed_run_has_the_blocks_of_the_killed_one(tmp_path):
    tiny.save("solar_open", tmp_path / "model")
    tiny.save_text(tmp_path / "text.jsonl")
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "AR_RESUME_DIR": str(tmp_path / "resume"),
        "AR_WORK_SPACE": str(tmp_path / "work"),
        "PYTHONPATH": os.pathsep.join(folders),
    }
    said = []
    for way in ("kill", "resume"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), way],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        expected = -signal.SIGKILL if way == "kill" else 0
        assert done.returncode == expected, done.stderr[-3000:]
        said.append(re.findall(r"^(?:done|block) .*", done.stdout, re.M))
    assert said == [["done 0", "block 0 2", "block 1 2"], ["done 1", "block 1 2"]]
    (file,) = (tmp_path / "out").rglob("vsraq_run.json")
    run = read_run(file)
    assert [block["name"] for block in run["blocks"]] == [
        "model.layers.0",
        "model.layers.1",
    ]
    assert all(len(b["losses"]["router"]) == 2 for b in run["blocks"])
    assert [len(b["routers"]) for b in run["blocks"]] == [1, 1]
    assert len(run["coverage"]) == 2
    assert run["seconds"]["tuning"] > sum(b["seconds"] for b in run["blocks"])
