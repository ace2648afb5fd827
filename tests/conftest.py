# SPDX-License-Identifier: Apache-2.0
import gc
import json
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# where AutoRound keeps offloaded blocks; its default is the current folder
os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="vsraq-tests-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from contextlib import ExitStack

import pytest
from auto_round import AutoRound
from auto_round.modeling.unfused_moe import MODEL_CONFIG
from hypothesis import HealthCheck, settings

import tiny
from vsraq.autoround.block_tuning import BlockTuning
from vsraq.checkpoint.load import _same_classes_afterwards
from vsraq.demo.run import load_tokenizer
from vsraq.demo.text import documents

# AutoRound collects garbage a dozen times a run; skip what the imports have left.
gc.collect()
gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="every family, option, point to be killed at, and more fuzzing",
    )


def pytest_configure(config):
    full = config.getoption("--full")
    settings.register_profile(
        "vsraq",
        max_examples=2_000 if full else 150,
        deadline=None,
        database=None,
        derandomize=not full,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("vsraq")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what the tests' own imports have left


@pytest.fixture(autouse=True, scope="module")
def _skip_what_other_modules_have_left():
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def full(pytestconfig):
    """Whether every case is to run, not some of each kind."""
    return pytestconfig.getoption("--full")


@pytest.fixture(scope="module", autouse=True)
def classes_of_transformers():
    """A run of AutoRound replaces MoE blocks of some families for its process."""
    with ExitStack() as stack:
        for family in MODEL_CONFIG:
            stack.enter_context(_same_classes_afterwards(family))
        yield


@pytest.fixture
def vsraq_log():
    with tiny.LogLines() as messages:
        yield messages


@pytest.fixture
def terms(monkeypatch):
    """The terms of every block of a run: [(block, {label: term})]."""
    seen = []
    probe = BlockTuning.probe

    def spy(self, *args):
        seen.append((self.name, {term.label: term for term in self.terms}))
        probe(self, *args)

    monkeypatch.setattr(BlockTuning, "probe", spy)
    return seen


@pytest.fixture
def bfloat16():
    """For tests that stream a checkpoint, or export what was tuned in bfloat16."""
    with tiny.bfloat16():
        yield


@pytest.fixture
def quantize():
    """Run real AutoRound on a tiny model; the run and its model come back."""

    def run(model, config, scheme="W4A16", *, dataset=None, **kwargs):
        arguments = {
            "tokenizer": tiny.tiny_tokenizer(),
            "scheme": scheme,
            "alg_configs": config,
            "dataset": tiny.calibration() if dataset is None else dataset,
            **tiny.RUN,
        } | kwargs
        autoround = AutoRound(model, **arguments)
        quantized, _ = autoround.quantize()
        return autoround, quantized

    yield run
    gc.collect()


@pytest.fixture
def small_bench_model(tmp_path, monkeypatch):
    """The benchmarks' model as small as the tests' own, with the demo's vocabulary."""
    size = {"vocab_size": len(load_tokenizer()), "num_hidden_layers": 4}
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open", **size))
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("routing.bench_model_path", lambda _: tmp_path / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Calibration text as a local file, the way AutoRound reads one."""
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    with path.open("w") as file:
        for document in documents("calibration"):
            for start in range(0, len(document) - 2000, 2000):
                text = document[start : start + 2000]
                file.write(json.dumps({"text": text}) + "\n")
    return str(path)
