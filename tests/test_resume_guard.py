# SPDX-License-Identifier: Apache-2.0
"""Which unfinished runs are resumed, which are refused, and what is said then.

What a killed run ends with is tested in test_killed_runs.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file

import tiny
from test_autoround import tuned
from vsraq import VSRAQConfig
from vsraq.resume.block_records import BlockRecord
from vsraq.resume.disk_errors import DiskError
from vsraq.resume.guard import ResumableRun


@pytest.fixture(scope="module", autouse=True)
def streamed_in_bfloat16():
    with tiny.bfloat16():
        yield


pytestmark = pytest.mark.xdist_group("test_resume_guard")

SETTINGS = {"iters": "4", "objective": "vsraq"}
BLOCKS = ["layers.0", "layers.1", "layers.2"]
RECORD = BlockRecord(
    {"layers.0.gate.weight": torch.randn(4, 8).bfloat16()},
    {"layers.0.gate": {"tokens": torch.arange(4)}},
    (),
)


# ── the files of a run, written as AutoRound writes them ──────────────────────


class Files:
    """One run: our files through our code, AutoRound's as it writes them."""

    def __init__(self, root, settings=SETTINGS, output="out"):
        self.output = root / output
        self.group = root / "resume" / "group_0"
        self.run = ResumableRun(root / "resume", self.output, BLOCKS, settings)

    def shard(self, number, block):
        save_file(
            {f"{BLOCKS[block]}.w": torch.full((4,), float(block))},
            self.output / f"model-shard-{number:05d}.safetensors",
        )

    def inputs(self, name, block):
        self.group.mkdir(parents=True, exist_ok=True)
        torch.save([torch.full((2,), float(block))], self.group / f"resume_{name}.pt")

    def manifest(self, done):
        content = {"signature": "s", "completed_blocks": BLOCKS[:done]}
        (self.group / "resume_manifest.json").write_text(json.dumps(content))

    def tune(self, block, until="manifest"):
        """One block, up to the first write that does not happen."""
        self.run.start_block(block)
        self.run.end_block(block, RECORD)
        for step, write in [
            ("shard", lambda: self.shard(block + 1, block)),
            ("q_input", lambda: self.inputs("q_input", block + 1)),
            ("input_ids", lambda: self.inputs("input_ids", block + 1)),
            ("manifest", lambda: self.manifest(block + 1)),
        ]:
            write()
            if step == until:
                return

    def chain(self):
        """The block whose inputs AutoRound would load."""
        both = [
            float(torch.load(self.group / f"resume_{name}.pt")[0][0])
            for name in ("q_input", "input_ids")
        ]
        assert both[0] == both[1], both
        return both[0]

    def shards(self):
        return [p.name for p in sorted(self.output.glob("*.safetensors*"))]


@pytest.fixture
def files(tmp_path):
    files = Files(tmp_path)
    assert files.run.open() == 0
    return files


@pytest.mark.parametrize("until", ["shard", "q_input", "input_ids"])
def test_a_kill_between_two_of_autorounds_files_is_undone(until, files, tmp_path):
    files.tune(0)
    files.tune(1, until)
    again = Files(tmp_path)
    assert again.run.open() == 1
    assert again.chain() == 1
    assert again.shards() == ["model-shard-00001.safetensors"]


def test_a_kill_while_the_inputs_are_put_back_is_undone(files, tmp_path):
    files.tune(0)
    files.tune(1, "input_ids")
    aside = files.group / "resume_input_ids.pt.before-block-1"
    aside.rename(files.group / "resume_input_ids.pt")  # the first of the two
    again = Files(tmp_path)
    assert again.run.open() == 1
    assert again.chain() == 1


def test_the_first_block_starts_anew(files, tmp_path):
    files.tune(0, "input_ids")
    again = Files(tmp_path)
    assert again.run.open() == 0
    assert again.shards() == []


@pytest.mark.parametrize("renamed", [0, 2, 4])
def test_a_tuned_run_that_was_not_exported_tunes_its_last_block_again(
    renamed, files, tmp_path
):
    for block in range(3):
        files.tune(block)
    files.shard(4, 2)  # what is outside the blocks
    for number in range(1, renamed + 1):
        path = files.output / f"model-shard-{number:05d}.safetensors"
        path.rename(files.output / f"model-{number:05d}-of-00004.safetensors")
    (files.output / "model.safetensors.index.json").write_text("{}")
    again = Files(tmp_path)
    assert again.run.open() == 2
    assert again.chain() == 2
    expected = ["model-shard-00001.safetensors", "model-shard-00002.safetensors"]
    assert again.shards() == expected
    files.run.open()  # killed before it tuned anything
    assert again.run.open() == 2
    assert again.chain() == 2
    assert again.shards() == expected


def test_what_a_resumed_run_must_know(files, tmp_path):
    files.tune(0)
    (record,) = Files(tmp_path).run.tuned(1)
    assert record.routers.keys() == RECORD.routers.keys()
    for name, weight in RECORD.routers.items():
        assert torch.equal(record.routers[name], weight)
        assert record.routers[name].dtype == weight.dtype
    assert record.counts["layers.0.gate"]["tokens"].tolist() == [0, 1, 2, 3]


def test_a_finished_run_leaves_the_folders_free(files, tmp_path):
    for block in range(3):
        files.tune(block)
    files.run.finish()
    shutil.rmtree(files.group)  # AutoRound's part
    shutil.rmtree(files.output)
    assert Files(tmp_path, SETTINGS | {"iters": "5"}).run.open() == 0
    left = {p.name for p in (tmp_path / "resume").iterdir()}
    assert left == {"vsraq_resume.json"}


def refused(tmp_path, message, **named):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        Files(tmp_path, **named).run.open()
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_other_settings_are_refused(files, tmp_path):
    files.tune(0)
    other = SETTINGS | {"iters": "5"}
    refused(tmp_path, r"iters was 4, now 5\); allowed are the same", settings=other)


def test_a_run_of_another_algorithm_is_refused(tmp_path):
    files = Files(tmp_path)
    files.group.mkdir(parents=True)
    files.manifest(1)
    refused(tmp_path, "unfinished run of another algorithm")


def test_shards_of_another_run_are_refused(files, tmp_path):
    """The remedy for other settings, half followed: the shards are still there."""
    files.tune(0)
    shutil.rmtree(tmp_path / "resume")
    refused(tmp_path, r"not of this run \(model-shard-00001.safetensors\)")
    refused(tmp_path, "not of this run", settings=SETTINGS | {"iters": "5"})


def test_an_output_folder_without_the_tuned_blocks_is_refused(files, tmp_path):
    files.tune(0)
    refused(tmp_path, "has 1 tuned blocks, and their shards are not", output="other")


def test_an_earlier_export_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out" / "model.safetensors")
    refused(tmp_path, r"not of this run \(model.safetensors\); allowed is a folder")


@pytest.mark.parametrize("name", ["resume_q_input.pt", "resume_input_ids.pt"])
def test_incomplete_inputs_are_refused(name, files, tmp_path):
    files.tune(0)
    path = files.group / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{name} is missing or incomplete"):
        Files(tmp_path).run.open()


def test_a_truncated_shard_of_a_tuned_block_is_refused(files, tmp_path):
    files.tune(0)
    path = files.output / "model-shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"00001.safetensors holds tuned blocks"):
        Files(tmp_path).run.open()


def test_missing_records_are_refused(files, tmp_path):
    files.tune(0)
    shutil.rmtree(tmp_path / "resume" / "vsraq_blocks")
    with pytest.raises(ValueError, match=r"records of layers.0 are missing"):
        Files(tmp_path).run.open()


# ── real runs ─────────────────────────────────────────────────────────────────

KILLED = """
    import os, signal, sys
    import conftest, tiny
    from test_resume_guard import run_of
    from vsraq.autoround.block_tuning import BlockTuning

    log = BlockTuning.log

    def die_in_the_second_block(self, *args):
        if self.name.endswith("1"):
            os.kill(os.getpid(), signal.SIGKILL)
        return log(self, *args)

    BlockTuning.log = die_in_the_second_block
    root, source = sys.argv[1:]
    with tiny.bfloat16():
        run_of(source, root, router_weight=1.0).quantize_and_save(
            f"{root}/out", format="auto_round"
        )
"""


def run_of(source, root, router_weight=1.0, **arguments):
    config = VSRAQConfig(iters=2, router_weight=router_weight)
    run = tiny.RUN | {"dataset": f"{root}/text.jsonl", "group_size": 32} | arguments
    return AutoRound(str(source), alg_configs=config, **run)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders of a real run that died while it tuned its second block."""
    root = tmp_path_factory.mktemp("killed")
    source = tiny.save("solar_open", tmp_path_factory.mktemp("model") / "model")
    tiny.save_text(root / "text.jsonl")
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(root), str(source)],
        env=os.environ
        | {
            "PYTHONPATH": os.path.dirname(__file__),
            "AR_RESUME_DIR": str(root / "resume"),
        },
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    return root, source


@pytest.mark.parametrize(
    ("arguments", "export", "message"),
    [
        ({"router_weight": 2.0}, {}, "router_weight was 1.0, now 2.0"),
        ({"seed": 1}, {}, "seed was 42, now 1"),
        ({"batch_size": 2}, {}, "batch_size was 4, now 2"),
        ({"nsamples": 4}, {}, "calibration was .*, now "),
        ({"seqlen": 16}, {}, "calibration was .*, now "),
        ({}, {"output_dir": "other"}, "output was .*out/model-w4g32, now .*other"),
        ({}, {"format": "auto_gptq"}, "format was auto_round.*, now auto_gptq"),
    ],
    ids=lambda value: str(next(iter(value), "")) if isinstance(value, dict) else "",
)
def test_only_the_same_command_may_go_on(
    arguments, export, message, killed, monkeypatch
):
    root, source = killed
    monkeypatch.setenv("AR_RESUME_DIR", str(root / "resume"))
    folder = root / export.pop("output_dir", "out")
    before = {p: p.read_bytes() for p in (root / "out").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        run_of(source, root, **arguments).quantize_and_save(
            str(folder), **{"format": "auto_round"} | export
        )
    assert before == {
        p: p.read_bytes() for p in (root / "out").rglob("*") if p.is_file()
    }


def test_the_advice_half_followed(killed, tmp_path, monkeypatch):
    """An empty resume folder, and the same output folder as the killed run."""
    root, source = killed
    for resume in (str(tmp_path / "empty"), None):
        monkeypatch.delenv("AR_RESUME_DIR", raising=False)
        if resume is not None:
            monkeypatch.setenv("AR_RESUME_DIR", resume)
        with pytest.raises(ValueError, match=r"model-shard-00001.safetensors"):
            run_of(source, root, router_weight=2.0).quantize_and_save(
                str(root / "out"), format="auto_round"
            )


def test_a_resume_folder_that_autoround_ignores_is_refused(
    killed, tmp_path, monkeypatch
):
    """Its signature differs, so it would start anew beside the tuned blocks."""
    root, source = killed
    shutil.copytree(root, tmp_path / "copy")
    copy = tmp_path / "copy"
    run = json.loads((copy / "resume" / "vsraq_resume.json").read_text())
    text = json.dumps(run).replace(str(root), str(copy))
    (copy / "resume" / "vsraq_resume.json").write_text(text)
    manifest = copy / "resume" / "group_0" / "resume_manifest.json"
    content = json.loads(manifest.read_text()) | {"signature": "another"}
    manifest.write_text(json.dumps(content))
    monkeypatch.setenv("AR_RESUME_DIR", str(copy / "resume"))
    with pytest.raises(RuntimeError, match="1 blocks are tuned already, and AutoRound"):
        run_of(source, copy).quantize_and_save(str(copy / "out"), format="auto_round")


@pytest.mark.parametrize(
    ("arguments", "format", "message"),
    [
        ({"low_cpu_mem_usage": False}, "auto_round", "low_cpu_mem_usage=True"),
        ({}, "auto_round,auto_gptq", "quantize_and_save with one format"),
        ({"nblocks": 2}, "auto_round", "nblocks=1, not 2"),
        ({"quant_lm_head": True}, "auto_round", "no quantized layer outside"),
    ],
    ids=["kept in memory", "two formats", "two blocks at once", "quantized head"],
)
def test_a_run_that_could_not_be_resumed_is_refused_at_its_start(
    arguments, format, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "resume"))
    options = {"nblocks": arguments.pop("nblocks")} if "nblocks" in arguments else {}
    autoround = AutoRound(
        tiny.tiny_model("solar_open"),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=1, router_weight=1.0, **options),
        dataset=tiny.calibration(),
        **tiny.RUN | arguments,
    )
    with pytest.raises(ValueError, match=message):
        autoround.quantize_and_save(str(tmp_path / "out"), format=format)


def test_quantize_alone_cannot_be_resumed(quantize, tmp_path, monkeypatch):
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "resume"))
    with pytest.raises(ValueError, match=r"quantize_and_save .* unset AR_RESUME_DIR"):
        tuned(quantize, VSRAQConfig(iters=1))


def test_blocks_that_an_earlier_run_has_left_are_refused(tmp_path, monkeypatch):
    """AutoRound would load them into this model, by their names alone."""
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "resume"))
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "work"))
    autoround = AutoRound(
        tiny.tiny_model("solar_open"),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=1, router_weight=1.0),
        dataset=tiny.calibration(),
        **tiny.RUN,
    )
    left = tmp_path / "work" / "offload" / f"{autoround._offloader._prefix}_resume"
    left.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, left / "model_layers_0.safetensors")
    with pytest.raises(ValueError, match=r"blocks of an earlier run.*delete that"):
        autoround.quantize_and_save(str(tmp_path / "out"), format="auto_round")


def test_no_resume_folder_no_file(quantize, tmp_path, monkeypatch):
    monkeypatch.delenv("AR_RESUME_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    tuned(quantize, VSRAQConfig(iters=1))
    assert not list(tmp_path.rglob("vsraq_resume.json"))


# ── where the export goes ─────────────────────────────────────────────────────


def in_memory(**options):
    return AutoRound(
        tiny.tiny_model("solar_open"),
        tiny.tiny_tokenizer(),
        alg_configs=VSRAQConfig(iters=1, router_weight=1.0),
        dataset=tiny.calibration(),
        **tiny.RUN | options,
    )


def test_an_export_is_not_mixed_with_an_earlier_one(tmp_path):
    folder = Path(in_memory().quantize_and_save(str(tmp_path / "out"))[1])
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=r"allowed is a folder without weights"):
        in_memory().quantize_and_save(str(tmp_path / "out"))
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_saving_after_tuning_sets_earlier_weights_aside(tmp_path, vsraq_log):
    """A refusal would lose what was tuned."""
    earlier = {"a": torch.ones(3)}
    save_file(earlier, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    autoround = in_memory()
    autoround.quantize()
    autoround.save_quantized(str(tmp_path), format="auto_round")
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    aside = tmp_path / "earlier-weights"
    kept = load_file(aside / "model-00001-of-00002.safetensors")
    assert torch.equal(kept["a"], earlier["a"])
    assert any("held weights of an earlier export" in line for line in vsraq_log)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    """Below a file, because root may write into a read-only folder."""
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DiskError, match=r"file/out.* cannot be written"):
        in_memory().quantize_and_save(str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "kept"
