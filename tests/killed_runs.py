# SPDX-License-Identifier: Apache-2.0
"""Runs of AutoRound that are killed at a write, and what the same command does then.

A process of its own, because it forks: AutoRound is imported once, and every run is a
child. A run's writes below its folder are counted; a child dies at the n-th of them.

    python killed_runs.py FOLDER '{"streamed": 5, "in memory, mixed bits": "all"}'

prints a line of JSON for each run that was killed.
"""

import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import safetensors.torch
import torch
from auto_round import AutoRound
from auto_round.utils.device_manager import get_ar_device
from safetensors import safe_open

import tiny
from vsraq import VSRAQConfig
from vsraq.checkpoint import load_model

SRA = {"token_selection": {"tau": 0.05}}
MIXED = {"layer_config": {"model.layers.1.self_attn.q_proj": {"bits": 8}}}
VARIANTS = {
    "streamed": (True, {}, {}),
    "in memory": (False, {}, {}),
    "streamed, selected tokens": (True, SRA, {}),
    "in memory, selected tokens": (False, SRA, {}),
    "streamed, mixed bits": (True, {}, MIXED),
    "in memory, mixed bits": (False, {}, MIXED),
}
REFUSED, FAILED = 3, 4  # exit codes of a child


def make_source(folder):
    """A model whose routers are float32 on disk, so that those are restored too."""
    torch.manual_seed(0)
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open", num_hidden_layers=3))
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.float()
    model.save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    tiny.save_text(folder / "text.jsonl")


def quantize(source, folder, variant, resume=True):
    streamed, options, arguments = VARIANTS[variant]
    os.environ["AR_WORK_SPACE"] = str(folder / "work")
    os.environ.pop("AR_RESUME_DIR", None)
    if resume:
        os.environ["AR_RESUME_DIR"] = str(folder / "resume")
    given = {"model": str(source / "model")}
    if not streamed:
        model = load_model(source / "model", dtype=torch.bfloat16)
        given = {"model": model, "tokenizer": tiny.tiny_tokenizer()}
    run = tiny.RUN | {"nsamples": 16, "dataset": str(source / "text.jsonl")}
    autoround = AutoRound(
        **given,
        scheme="W4A16",
        group_size=32,
        alg_configs=VSRAQConfig(iters=1, **options),
        **run | arguments,
    )
    autoround.quantize_and_save(str(folder / "out"), format="auto_round")


# ── a process that dies ───────────────────────────────────────────────────────


class Writes:
    """Counts the writes below a folder, and acts at one of them."""

    def __init__(self, folder, at=None, act=None):
        self.folder, self.at, self.act = str(folder), at, act
        self.seen = []
        self.save, self.serialize = torch.save, safetensors.torch.serialize_file

    def event(self, kind, path):
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if not isinstance(path, str) or not path.startswith(self.folder):
            return
        if self.at is not None and len(self.seen) == self.at:
            self.act()
        self.seen.append((kind, path.removeprefix(self.folder)))

    def audit(self, name, arguments):
        if name == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                self.event("open", arguments[0])
        elif name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            self.event(name, arguments[0])

    def torch_save(self, obj, path, *args, **kwargs):
        self.event("before writing", path)
        self.save(obj, path, *args, **kwargs)
        self.event("after writing", path)

    def serialize_file(self, tensors, path, *args, **kwargs):
        self.event("before writing", path)
        self.serialize(tensors, path, *args, **kwargs)
        self.event("after writing", path)

    def watch(self):
        # PyTorch and safetensors open their files where no audit event sees it
        torch.save = self.torch_save
        safetensors.torch.serialize_file = self.serialize_file
        sys.addaudithook(self.audit)


def send(number):
    os.kill(os.getpid(), number)


def die_in_the_middle():
    """The kernel ends the process when a file grows beyond 1000 bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def disk_full():
    """Writing beyond 1000 bytes of a file fails, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))


WAYS = {
    "SIGKILL": lambda: send(signal.SIGKILL),
    "SIGTERM": lambda: send(signal.SIGTERM),
    "SIGINT": lambda: send(signal.SIGINT),
    "in the middle": die_in_the_middle,
    "disk full": disk_full,
}


def child(log, function, *arguments, **named):
    """Run a function in a process of its own; its exit code."""
    # not straight into the file: what limits the size of files would limit the log
    with log.open("wb") as file:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
    pid = os.fork()
    if pid == 0:
        os.dup2(writer.stdin.fileno(), 1)
        os.dup2(writer.stdin.fileno(), 2)
        code = 0
        try:
            function(*arguments, **named)
        except ValueError as error:
            print(f"\nREFUSED {error}", file=sys.stderr)
            traceback.print_exc()
            code = REFUSED
        except BaseException as error:
            traceback.print_exc()
            print(f"\nFAILED {type(error).__name__}: {error}", file=sys.stderr)
            code = FAILED
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    writer.communicate()
    return os.waitstatus_to_exitcode(status)


def watched(source, folder, variant, at=None, way=None):
    writes = Writes(folder, at, WAYS.get(way))
    writes.watch()
    quantize(source, folder, variant)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (folder / "writes.json").write_text(json.dumps(writes.seen))


# ── what is left ──────────────────────────────────────────────────────────────


def export(folder):
    """Digests of every tensor that the export names, and its other files."""
    (path,) = (folder / "out").iterdir()
    found = {}
    index = path / "model.safetensors.index.json"
    files = {path / "model.safetensors"}
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {path / file for file in weight_map.values()}
    for file in sorted(files):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name).contiguous()
                values = tensor.flatten().view(torch.uint8).numpy().tobytes()
                assert name not in found, name
                found[name] = [
                    str(tensor.dtype),
                    list(tensor.shape),
                    hashlib.sha256(values).hexdigest(),
                ]
    if index.is_file():
        assert sorted(found) == sorted(weight_map)
    found["other weights"] = sorted(
        p.name for p in path.glob("*.safetensors") if p not in files
    )
    for name in ("config.json", "quantization_config.json", "expert_coverage.json"):
        text = (path / name).read_text()
        found[name] = json.loads(text.replace(str(folder), ""))
    return found


def last_words(log, mark):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line]
    return next((li for li in reversed(lines) if li.startswith(mark)), lines[-1])


def killed_and_resumed(source, folder, variant, expected, at, way):
    """Kill a run at one write, run the same command again, and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    died = child(log, watched, source, folder, variant, at, way)
    result = {"variant": variant, "at": at, "way": way, "died": died}
    if way == "disk full":
        result["said"] = last_words(log, "FAILED")
    code = child(log, quantize, source, folder, variant)
    if code == REFUSED:
        return result | {"outcome": "refused", "message": last_words(log, "REFUSED")}
    if code != 0:
        return result | {"outcome": "failed", "message": last_words(log, "FAILED")}
    ended = export(folder)
    if ended == expected:
        return result | {"outcome": "same"}
    names = [n for n in sorted({*ended, *expected}) if ended.get(n) != expected.get(n)]
    return result | {"outcome": "mixture", "message": f"other: {names[:6]}"}


def points(writes, wanted, shift):
    """Which writes to die at: all, or some that are spread over the run."""
    if wanted == "all":
        chosen = range(len(writes))
    else:
        step = len(writes) / wanted
        chosen = sorted({int((i + shift) * step) for i in range(wanted)})
    ways = ["SIGKILL", "SIGTERM", "SIGKILL", "SIGINT"]
    for number, at in enumerate(chosen):
        yield at, ways[number % 4]
        if writes[at][0] == "before writing":
            yield at, "in the middle"
            yield at, "disk full"


def main(root, wanted):
    root.mkdir(parents=True, exist_ok=True)
    get_ar_device("cpu")._bf16_supported = True  # as tiny.bfloat16 does
    # a shell's background job ignores interrupts, and its children would too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # AutoRound collects garbage 20 times a run; what is imported is none
    log = root / "log.txt"
    assert child(log, make_source, root) == 0, log.read_text()
    for number, (variant, count) in enumerate(wanted.items()):
        base, counted = root / "base", root / "counted"
        for folder in (base, counted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        assert child(log, quantize, root, base, variant, resume=False) == 0, (
            log.read_text()
        )
        assert child(log, watched, root, counted, variant) == 0, log.read_text()
        expected = export(base)
        assert export(counted) == expected
        writes = json.loads((counted / "writes.json").read_text())
        for at, way in points(writes, count, number / len(wanted)):
            result = killed_and_resumed(
                root, root / "killed", variant, expected, at, way
            )
            print(json.dumps(result | {"write": writes[at]}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), json.loads(sys.argv[2]))
