# SPDX-License-Identifier: Apache-2.0
"""Every supported family through a real AutoRound run, in memory and from a path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from tiny import block_lines
from vsraq import VSRAQConfig
from vsraq.routers import find_routers

# its fixtures are made once per process
pytestmark = pytest.mark.xdist_group("test_families")

# In a hybrid, a MoE layer is norm -> router -> experts: nothing quantized stands
# before its router. Plain transformers blocks have their attention there.
NO_REACH = {"nemotron_h"}


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_in_memory(family, quantize, vsraq_log):
    model = tiny.tiny_model(family)
    before = {
        r.name: model.get_submodule(r.name).weight.detach().clone()
        for r in find_routers(model)
    }
    config = VSRAQConfig(iters=2, router_weight=1.0, next_router_weight=0.1)
    _, quantized = quantize(model, config, group_size=32)
    check_log(family, vsraq_log)
    routers = find_routers(quantized)
    assert [r.name for r in routers] == list(before)
    for router in routers:
        after = quantized.get_submodule(router.name).weight
        assert torch.equal(after, before[router.name].to(after.dtype))
    tuned = [m for m in quantized.modules() if isinstance(m, nn.Linear)]
    assert sum(getattr(m, "bits", 16) == 4 for m in tuned) > 0


def check_log(family, messages):
    lines = block_lines(messages)
    own = [line for line in lines if line["reached"] is not None]
    assert len(own) == tiny.MOE_LAYERS[family]
    for line in own:
        assert (line["reached"] == "0") == (family in NO_REACH)
    warnings = [m for m in messages if "reaches no quantized layer" in m]
    assert len(warnings) == (len(own) if family in NO_REACH else 0)
    # Every block but the last has a MoE router behind it, and all that it quantizes
    # stands before that one.
    following = [line for line in lines if line["next_reached"] is not None]
    blocks = tiny.BLOCKS[family]
    assert [line["block"] for line in following] == [
        f"model.layers.{index}" for index in range(blocks - 1)
    ]
    for line in following:
        assert line["next_reached"] == line["next_quantized"] != "0"


# AutoRound 0.16.1 cannot stream these checkpoints from disk: it misses the renaming
# of Mixtral's experts (w1, w2, w3). Its own switch for loading the model as a whole
# helps; the first run of each asserts that it is still needed.
FULL_LOAD = {"mixtral"}


def run_from_path(families, way="export", **environment):
    script = Path(__file__).with_name("path_families.py")
    done = subprocess.run(
        [sys.executable, script, way, *families],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        check=False,
    )
    results = [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT ")
    ]
    return {r["family"]: r for r in results}, done.stdout + done.stderr


# A Linear router, one with a correction bias, one with groups, a hybrid.
SOME = ("qwen3_moe", "solar_open", "deepseek_v3", "nemotron_h")


@pytest.fixture(scope="module")
def from_path(full):
    """One process for all families; see path_families.py."""
    return run_from_path(tiny.MOE_FAMILIES if full else SOME)


def pytest_generate_tests(metafunc):
    if "streamed" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        metafunc.parametrize("streamed", tiny.MOE_FAMILIES if every else SOME)


def test_from_a_path(streamed, from_path):
    family = streamed
    results, errors = from_path
    assert family in results, errors[-3000:]
    if family in FULL_LOAD:
        assert "Failed to materialize" in results[family]["error"]
        results, errors = run_from_path([family], AR_DISABLE_META_LOAD="1")
        assert family in results, errors[-3000:]
    result = results[family]
    assert "error" not in result, result["error"]
    assert "faults" not in result, result["faults"]
    assert result["verified"] == tiny.MOE_LAYERS[family]
    check_log(family, result["log"])


def test_a_patched_family_whose_blocks_wait_on_disk():
    """AutoRound empties all blocks before it prepares the run, the next one too."""
    environment = {"AR_DISABLE_META_LOAD": "1"}
    results, output = run_from_path(["qwen3_moe"], way="keep", **environment)
    assert "offloading module weights" in output
    result = results["qwen3_moe"]
    assert "error" not in result, result["error"]
    check_log("qwen3_moe", result["log"])
