# SPDX-License-Identifier: Apache-2.0
"""The example scripts that hold no arguments, on a tiny model."""

import difflib
import re
from pathlib import Path

import pytest

import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-MoE on disk, calibration text, and documents."""
    root = tmp_path_factory.mktemp("examples")
    tiny.save("qwen3_moe", root / "model")
    tiny.save_text(root / "text.jsonl")
    (root / "texts").mkdir()
    for name in "ab":
        (root / "texts" / f"{name}.txt").write_text(name.join("0123456789" * 20))
    return root


def code_of(name, folder):
    """A script, with a model and sizes that are small enough for a test."""
    code = (EXAMPLES / name).read_text()
    smaller = {
        '"Qwen/Qwen3-30B-A3B"': repr(str(folder / "model")),
        '"Qwen3-30B-A3B-W4A16"': repr(str(folder / f"{name}-out")),
        "2048": str(tiny.SEQLEN),
        "nsamples=128": f"nsamples=4, dataset={str(folder / 'text.jsonl')!r}",
        'scheme="W4A16",': 'scheme="W4A16", group_size=32, batch_size=4, '
        'device_map="cpu", enable_torch_compile=False,',
        "VSRAQConfig(": "VSRAQConfig(iters=1, ",
    }
    for long, short in smaller.items():
        code = code.replace(long, short)
    return code


def export_of(name, folder):
    """The folder of a script's export; the script runs if it has not yet."""
    if not (folder / f"{name}-out").exists():
        exec(compile(code_of(name, folder), name, "exec"), {})
    (weights,) = (folder / f"{name}-out").rglob("*.safetensors")
    return weights.parent


@pytest.mark.parametrize(
    "name", ["autoround_after.py", "custom_objective.py", "custom_calibration.py"]
)
@pytest.mark.usefixtures("bfloat16")
def test_it_runs(name, folder, monkeypatch, vsraq_log):
    monkeypatch.chdir(folder)
    exec(compile(code_of(name, folder), name, "exec"), {})
    assert list((folder / f"{name}-out").rglob("*.safetensors"))
    blocks = tiny.block_lines(vsraq_log)
    assert [line["best"] is not None for line in blocks] == [True, True]


@pytest.mark.usefixtures("bfloat16")
def test_the_routing_is_replayed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    export = export_of("autoround_after.py", folder)
    (folder / "held-out.txt").write_text("9876543210" * 40)
    code = code_of("replay_routing.py", folder)
    code = code.replace(repr(str(folder / "replay_routing.py-out")), repr(str(export)))
    capsys.readouterr()
    exec(compile(code, "replay_routing.py", "exec"), {})
    as_it_is, replayed = re.findall(r"KL ([\d.e-]+)", capsys.readouterr().out)
    assert float(replayed) < float(as_it_is)


@pytest.mark.usefixtures("bfloat16")
def test_models_are_compared(folder, monkeypatch, capsys):
    """A module beside an export; the finer of the two is nearer to full precision."""
    monkeypatch.chdir(folder)
    export = export_of("autoround_after.py", folder)
    (folder / "held-out.txt").write_text("9876543210" * 40)
    code = code_of("compare.py", folder).replace("128", "32")
    code = code.replace(repr(str(folder / "compare.py-out")), repr(str(export)))
    capsys.readouterr()
    exec(compile(code, "compare.py", "exec"), {})
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(\w+): kl ([\d.]+) \(", printed, re.M))
    assert 0 < float(found["export"]) < float(found["rounded"])
    assert "export: jaccard 0." in printed
    assert (folder / "compared" / "results.json").is_file()


def test_two_lines_make_the_difference():
    scripts = [
        (EXAMPLES / f"autoround_{name}.py").read_text().partition('"""\n')[2]
        for name in ("before", "after")
    ]
    lines = difflib.ndiff(*(script.splitlines() for script in scripts))
    changed = [line for line in lines if line[0] in "+-" and line[1:].strip()]
    assert changed == ["+ import vsraq", "+     alg_configs=vsraq.VSRAQConfig(),"]
