# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README and of the documentation runs, or says why not."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from auto_round import AutoRound

import choices
import seams
import tiny
import vsraq
from code_blocks import (
    LANGUAGES,
    PAGES,
    ROOT,
    blocks,
    check_command,
    check_python,
    commands,
)
from vsraq.checkpoint import formats, load_model
from vsraq.cli import main
from vsraq.recipe import parse_recipe
from vsraq.yaml_text import parse_yaml

PYTHON = [block for block in blocks("python") if block.reason is None]
SHELL = blocks("bash")
# models of the hub, which are not here
NAMES = re.compile(r'"(upstage/Solar-Open-100B|Qwen/Qwen3-30B-A3B)"')


def test_every_block_has_a_language():
    assert {block.language for block in blocks()} <= LANGUAGES
    assert {str(page.name) for page in PAGES if "```" in page.read_text()} == {
        block.page for block in blocks()
    }


def test_a_block_that_is_not_run_says_why():
    for page in PAGES:
        marks = re.findall(r"<!-- not run.*", page.read_text())
        reasons = [b.reason for b in blocks(pages=[page]) if b.reason is not None]
        assert len(marks) == len(reasons), page.name  # each right before its block


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_what_it_says_of_vsraq_is_so(block):
    check_python(block.code, str(block))


@pytest.mark.parametrize(
    "code",
    [
        "import vsraq\nvsraq.plan_bytes()",
        "from vsraq import VSRAQConfigs",
        "import vsraq\nvsraq.VSRAQConfig(router_wait=1)",
        "from vsraq.losses import topk_mse\ntopk_mse(q, fp, k=2)",
        "import vsraq\nvsraq.BitPlan.store('x')",
        "for",
    ],
)
def test_what_is_not_so_is_found(code):
    with pytest.raises((AssertionError, ImportError, SyntaxError)):
        check_python(code, "here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a text, as files."""
    root = tmp_path_factory.mktemp("blocks")
    tiny.save("solar_open", root / "model")
    tiny.save_text(root / "text.jsonl", samples=64)
    rows = (root / "text.jsonl").read_text().splitlines()
    (root / "text.txt").write_text("".join(json.loads(row)["text"] for row in rows))
    (root / "exports").mkdir()
    (root / "exports" / "vsraq").symlink_to(root / "model")
    return root


def small_run(folder, model, **given):
    """AutoRound with what the page says, and as little work as possible."""
    small = {"dataset": f"{folder}/text.jsonl", "iters": 1} | tiny.RUN
    if isinstance(given.get("scheme"), str):
        small["group_size"] = 32
    return AutoRound(model, **given | small)


def small_plan(folder, model, _dataset, *given, **options):
    small = {"tokens": 64, "seqlen": tiny.SEQLEN, "group_size": 32}
    small |= {"device_map": "cpu", "enable_torch_compile": False}
    return vsraq.plan_bits(model, f"{folder}/text.jsonl", *given, **options | small)


@pytest.fixture
def names(folder):
    """What the blocks of all pages take for granted."""
    fp_model, q_model = (load_model(folder / "model") for _ in range(2))
    batches = [torch.cat(tiny.calibration(samples=2)) for _ in range(2)]
    return {
        "_small_run": partial(small_run, folder),
        "_small_plan": partial(small_plan, folder),
        "fp_model": fp_model,
        "tokenizer": tiny.tiny_tokenizer(),
        "q_model": q_model,
        "q1": q_model,
        "batches": batches,
        "mask": torch.ones(4, tiny.SEQLEN, dtype=torch.bool),
    }


def smaller(code, folder):
    code = NAMES.sub(lambda _: repr(str(folder / "model")), code)
    code = code.replace('"nvidia-reasoning"', repr(f"{folder}/text.jsonl:text"))
    code = re.sub(r"nsamples=\d+", "nsamples=4", code)
    code = re.sub(r"seqlen=\d+", f"seqlen={tiny.SEQLEN}", code)
    code = re.sub(r"\bvsraq\.plan_bits\(", "_small_plan(", code)
    return re.sub(r"\bAutoRound\(", "_small_run(", code)


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
@pytest.mark.usefixtures("bfloat16")
def test_every_python_block_runs(page, folder, names, monkeypatch, tmp_path):
    """The blocks of a page, one after another."""
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)  # a block adds one
    for block in PYTHON:
        if block.page == page:
            exec(compile(smaller(block.code, folder), str(block), "exec"), names)
    if page == "README.md":
        assert Path(names["folder"], "vsraq_run.json").is_file()


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_shell_line_is_a_command_of_this_project(block):
    for words in commands(block.code):
        if block.reason is None or words[0] == "vsraq":
            check_command(words, str(block))


@pytest.mark.parametrize(
    "line",
    [
        "vsraq verify export",
        "vsraq quantise configs/solar_open_100b_w4a16.yaml",
        "vsraq quantize configs/nowhere.yaml",
        "vsraq quantize configs/solar_open_100b_w4a16.yaml algorithm.router=1",
        "make everything",
        "pip install vsraq[all]",
        "python benchmarks/nothing.py",
        "rm out",
    ],
)
def test_a_wrong_line_is_found(line):
    with pytest.raises((AssertionError, OSError, SystemExit, ValueError)):
        check_command(line.split(), "here")


@pytest.mark.usefixtures("bfloat16")
def test_recipes_on_the_command_line_run(folder, monkeypatch, tmp_path):
    """Those of the options; tests/test_five_commands.py has the README's."""
    monkeypatch.chdir(ROOT)
    ran = []
    for block in SHELL:
        for program, command, *arguments in commands(block.code):
            run = program == "vsraq" and command in ("plan", "quantize")
            if not run or block.page != "options.md":
                continue
            given = [a.replace("out/plan", f"{tmp_path}/plan") for a in arguments]
            small = [
                f"model={folder / 'model'}",
                f"output={tmp_path / f'out{len(ran)}'}",
                "algorithm.iters=1",
                "algorithm.group_size=32",
                f"calibration.dataset={folder / 'text.jsonl'}",
                "calibration.nsamples=4",
                f"calibration.seqlen={tiny.SEQLEN}",
                "runtime.enable_torch_compile=false",
                "runtime.device_map=cpu",
                *(["--tokens=64"] if command == "plan" else []),
            ]
            assert main([command, *given, *small]) == 0
            ran.append(command)
    assert ran.count("quantize") >= 2
    assert "plan" in ran


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_recipe_is_one(block):
    recipe = parse_yaml(block.code)
    if "model" not in recipe:  # a part of one
        recipe |= {"model": "m", "scheme": "W4A16", "output": "out"}
    assert parse_recipe(recipe).algorithm_config()


def test_the_script_before_and_after_is_that_of_the_examples():
    (diff,) = (b.code for b in blocks("diff") if b.page == "index.md")
    lines = diff.splitlines()
    for sign, name in ((" -", "before"), (" +", "after")):
        shown = "\n".join(line[1:] for line in lines if line[:1] in sign)
        script = (ROOT / "examples" / f"autoround_{name}.py").read_text()
        script = script.split('"""')[2].strip()
        assert shown.strip() == script


def test_the_measured_table_is_that_of_the_results():
    page = (ROOT / "docs" / "choose.md").read_text()
    table = choices.measured((ROOT / "docs" / "results.md").read_text())
    assert page == choices.with_table(page, table), "run benchmarks/choices.py"


def test_seams_have_their_page():
    page = (ROOT / "docs" / "autoround_seams.md").read_text()
    said = set(re.findall(r"\w+", page))
    assert len(seams.pinned()) > 40
    assert len(seams.touched()) > 20
    assert seams.pinned() - said == set()
    assert seams.touched() - said == set()
