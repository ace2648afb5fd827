# SPDX-License-Identifier: Apache-2.0
"""One line on the screen, the log in a file, and nothing left behind."""

import io
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import tiny
from vsraq.callbacks import (
    BlockInfo,
    BlockResult,
    RunInfo,
    RunResult,
    Step,
    listens_to_steps,
)
from vsraq.cli import _demo_log
from vsraq.console import run_console
from vsraq.console.live_line import LiveLine, PlainLines, open_line
from vsraq.console.log_file import logged_to
from vsraq.run_record.file import read_run
from vsraq.yaml_text import write_yaml


@pytest.fixture
def bars():
    return []


@pytest.fixture
def log(tmp_path, bars):
    """Run something inside; the lines of the log come back, without its head."""

    def run(inside):
        path = tmp_path / "new" / "run.log"
        with logged_to(path, bars.append):
            inside()
        return path.read_text().splitlines()[1:]

    return run


def test_everything_goes_to_the_log(log, capsys):
    handler = logging.StreamHandler()  # of stderr, as AutoRound's
    logger = logging.getLogger("test_console")
    logger.addHandler(handler)
    try:
        before = handler.stream

        def inside():
            print("printed")
            logger.warning("\x1b[33;1mlogged\x1b[0m")
            print("warned", file=sys.stderr)

        lines = log(inside)
        assert handler.stream is before is sys.stderr
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    assert lines == ["printed", "logged", "warned"]
    assert capsys.readouterr() == ("", "afterwards\n")


def test_what_is_made_inside_works_afterwards(log, capsys):
    made = []

    def inside():
        made.append(logging.StreamHandler())
        logging.getLogger("test_console").addHandler(made[0])
        made.append(sys.stderr)

    log(inside)
    handler, stream = made
    logging.getLogger("test_console").removeHandler(handler)
    assert handler.stream is sys.stderr
    stream.write("late\n")
    assert capsys.readouterr().err == "late\n"


def test_a_bar_is_one_line(log, bars):
    def inside():
        for number in tqdm(range(50), desc="packing", mininterval=0):
            if number == 20:
                sys.stderr.write("in between\n")
        print("after")

    lines = log(inside)
    assert len(lines) == 3
    assert lines[0] == "in between"
    assert lines[1].startswith("packing: 100%")
    assert lines[2] == "after"
    assert any("| 20/50 " in bar for bar in bars)


def test_a_bar_is_one_line_beside_the_line_of_a_terminal(log):
    """Bars count the others and move down: a line of the log at each state."""
    line = LiveLine(Terminal())
    line.phase("W4A16")

    def inside():
        for _ in tqdm(range(50), desc="packing", mininterval=0):
            pass

    assert len(log(inside)) == 1


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_an_error_says_where_the_log_is(error, tmp_path):
    path = tmp_path / "run.log"
    streams = sys.stdout, sys.stderr

    def run():
        with logged_to(path, print):
            for number in range(20):
                print(f"line {number}")
            print("unfinished", end="")
            raise error

    with pytest.raises(type(error)) as raised:
        run()
    assert (sys.stdout, sys.stderr) == streams
    first, *rest = raised.value.__notes__[0].split("\n  ")
    assert first == f"log: {path}, which ends with"
    assert rest == [*(f"line {n}" for n in range(9, 20)), "unfinished"]
    assert f"{type(error).__name__}" in path.read_text().splitlines()[-1]


def test_a_second_run_appends(tmp_path):
    for word in ("one", "two"):
        with logged_to(tmp_path / "run.log", print):
            print(word)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[1::2] == ["one", "two"]
    assert all(line.startswith("# 20") for line in lines[::2])


# ── the line ─────────────────────────────────────────────────────────────────


class Terminal(io.StringIO):
    def isatty(self):
        return True


LOSSES = {"next router": 3e-3, "reconstruction": 1e-4, "router": 2e-3}


def tell(line, *, blocks=2, done=0, iters=4):
    line.phase("W4A16")
    line.on_run_start(RunInfo("model", "W4A16", blocks, done, iters))
    for index in range(done, blocks):
        info = BlockInfo(f"layers.{index}", index, blocks, iters)
        line.on_block_start(info)
        for iteration in range(iters):
            line.on_step(Step(info, iteration, LOSSES))
        curves = {label: [loss] * iters for label, loss in LOSSES.items()}
        line.on_block_end(BlockResult(info, iters, 1, curves, {}, (), 1.0))
    line.on_run_end(RunResult(1.0, None))


def test_a_terminal_has_one_line(monkeypatch):
    monkeypatch.setattr("vsraq.console.live_line._REFRESH", 0)
    terminal = Terminal()
    line = open_line(terminal)
    assert isinstance(line, LiveLine)
    tell(line)
    assert "\n" not in terminal.getvalue()
    states = [state.strip() for state in terminal.getvalue().split("\r")]
    assert "W4A16: block 1/2" in states
    said = (
        r"W4A16: block 2/2, iteration 3/4, reconstruction 1\.00e-04, "
        r"router 2\.00e-03, next router 3\.00e-03, \d+:\d\d left"
    )
    assert any(re.fullmatch(said, state) for state in states)
    line.bar("packing:  20%")  # of the export
    assert "W4A16: packing:  20%" in terminal.getvalue()
    line.say("exported", terminal)
    assert "exported\n" in terminal.getvalue()
    line.close()
    assert terminal.getvalue().count("\n") == 1


def test_another_stream_has_a_line_now_and_then(monkeypatch):
    stream = io.StringIO()
    line = open_line(stream)
    assert isinstance(line, PlainLines)
    assert not listens_to_steps(line)  # nothing waits for the device
    tell(line, blocks=5)
    assert re.fullmatch(
        r"W4A16\n"
        r"W4A16: block 1/5, iteration 2/4 is kept, reconstruction .*, \d+:\d\d left\n"
        r"W4A16: block 5/5, .*, 0:00 left\n",
        stream.getvalue(),
    )
    line.bar("packing:  20%")
    line.close()
    assert stream.getvalue().count("\n") == 3


def test_a_resumed_run_knows_the_time_of_its_own_blocks(monkeypatch):
    stream = io.StringIO()
    clock = iter(range(0, 1000, 60))
    monkeypatch.setattr("vsraq.console.live_line.time.monotonic", lambda: next(clock))
    line = PlainLines(stream)
    line._phase = "W4A16"
    line.on_run_start(RunInfo("model", "W4A16", 10, 8, 4))  # 0:00
    info = BlockInfo("layers.8", 8, 10, 4)
    line.on_block_end(BlockResult(info, 4, 1, {}, {}, (), 1.0))
    assert stream.getvalue().endswith("block 9/10, iteration 2/4 is kept, 3:00 left\n")


def test_verbose_shows_everything(tmp_path, capsys):
    with run_console(tmp_path / "run.log", verbose=True) as console:
        assert not console.callbacks
        console.phase("tuning")
        print("printed")
        console.say("said")
    assert not (tmp_path / "run.log").exists()
    assert capsys.readouterr() == ("printed\nsaid\n", "")


def test_a_verbose_demo_leaves_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    log = _demo_log(None)
    with run_console(log, verbose=True):
        assert not list(tmp_path.iterdir())
    with run_console(log):
        assert list(tmp_path.iterdir()) == [log]


# ── vsraq quantize ───────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, text, and a recipe."""
    root = tmp_path_factory.mktemp("quantize")
    tiny.save("solar_open", root / "model")
    tiny.save_text(root / "text.jsonl", samples=8)
    recipe = {
        "model": str(root / "model"),
        "scheme": "W4A16",
        "output": str(root / "out"),
        "algorithm": {"group_size": 32, "iters": 2},
        "calibration": {
            "dataset": str(root / "text.jsonl"),
            "nsamples": 4,
            "seqlen": tiny.SEQLEN,
        },
        "runtime": {"enable_torch_compile": False, "device_map": "cpu"},
    }
    (root / "recipe.yaml").write_text(write_yaml(recipe))
    return root


COMMAND = """
import sys, tiny
from vsraq.cli import main
with tiny.bfloat16():
    sys.exit(main(sys.argv[1:]))
"""


def vsraq(*arguments):
    """A command in a process of its own, whose streams are files."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("method", ["vsraq", "auto_round"])
def test_quantize_says_what_matters(method, folder):
    out = folder / method
    recipe = folder / "recipe.yaml"
    runs = out / "runs"
    done = vsraq(
        *("quantize", recipe, f"output={out}", f"method={method}"),
        f"callbacks.tensorboard={runs}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checked, log, exported, verified = done.stdout.splitlines()
    assert checked.startswith("checked: solar_open with ")
    assert log == f"log: {out / 'vsraq_quantize.log'}"
    path = Path(exported.removeprefix("exported to "))
    assert verified.startswith("verified: Verification(kind=")
    lines = done.stderr.splitlines()
    assert lines[0] == "W4A16"
    assert lines[-1] == "verifying"
    assert re.match(r"W4A16: block 2/2, iteration [12]/2 is kept, reconst", lines[-2])
    assert len(lines) <= 4
    logged = (out / "vsraq_quantize.log").read_text()
    assert "quantized 28/28 layers in the block" in logged or "loss iter 0" in logged
    assert "\x1b" not in logged
    assert "\r" not in logged
    assert list(runs.glob("events.out.tfevents.*"))
    run = read_run(path)
    assert run["model"] == str(folder / "model")
    assert run["recipe"]["algorithm"]["iters"] == 2
    assert run["recipe"]["method"] == method
    assert run["recipe"]["callbacks"] == {"tensorboard": str(runs)}
    assert run["seconds"]["planning"] is None
    assert [b["iterations"] for b in run["blocks"]] == [2, 2]
    losses = {label for block in run["blocks"] for label in block["losses"]}
    aligned = {"router", "next router"} if method == "vsraq" else set()
    assert losses == {"reconstruction"} | aligned
    assert (run["coverage"] is not None) == (method == "vsraq")
    if method == "auto_round":
        compares_quietly(folder, path)


def compares_quietly(folder, export):
    """Loading an export makes AutoRound log, to a file."""
    ids = folder / "ids.safetensors"
    save_file({"input_ids": torch.cat(tiny.calibration(samples=2))}, ids)
    for command, phase in (("compare", "comparing"), ("replay", "replaying")):
        out = folder / command
        models = (folder / "model", export)
        done = vsraq(command, *models, f"--data={ids}", f"--out={out}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr == f"{phase}\n"
        log, size, *_ = done.stdout.splitlines()
        assert log == f"log: {out / f'vsraq_{command}.log'}"
        assert size.startswith("the full-precision pass writes 64 tokens x ")
        logged = (out / f"vsraq_{command}.log").read_text()
        assert "full precision: 100%" in logged
        assert "\r" not in logged


def test_an_error_of_the_run_ends_with_the_log(folder):
    out = folder / "failed"
    arguments = ("algorithm.on_unreached=error", "algorithm.min_tokens_per_expert=9999")
    done = vsraq("quantize", folder / "recipe.yaml", f"output={out}", *arguments)
    assert done.returncode == 1
    error, log, *last = done.stderr[done.stderr.index("vsraq: error") :].splitlines()
    assert error.startswith("vsraq: error: router model.layers.0.mlp.gate: experts [0,")
    assert log == f"log: {out / 'vsraq_quantize.log'}, which ends with"
    assert last
    assert "Traceback" not in done.stderr
    assert "Traceback" in (out / "vsraq_quantize.log").read_text()


def test_a_callback_without_its_package_is_refused_early(folder, monkeypatch, capsys):
    from vsraq.cli import main

    monkeypatch.setattr("vsraq.callbacks.tensorboard.find_spec", lambda _name: None)
    arguments = ["quantize", "--check-only", str(folder / "recipe.yaml")]
    assert main([*arguments, "callbacks.tensorboard=runs"]) == 1
    error = capsys.readouterr().err
    assert (
        "error: callbacks.tensorboard: vsraq.callbacks.TensorBoard: the pack" in error
    )
    assert main([*arguments, "callbacks.tensorbord=runs"]) == 1
    assert "did you mean callbacks.tensorboard?" in capsys.readouterr().err
