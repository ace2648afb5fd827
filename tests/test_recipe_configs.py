# SPDX-License-Identifier: Apache-2.0
"""Every recipe in configs/, dry-run on its model's public config values."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

import recipe_table
from public_models import public_name, save_public
from vsraq.bits.engines import ENGINES
from vsraq.cli import main
from vsraq.recipe import inspect, load_recipe
from vsraq.recipe.serving import why_not_served

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
COMMANDS = {
    "vllm": r"^#   vllm serve EXPORT(.*)$",
    "sglang": r"^#   python -m sglang\.launch_server --model-path EXPORT(.*)$",
    "transformers": r"^#   transformers serve EXPORT(.*)$",
}
SPLIT = r"--(?:tensor-parallel-size|tp) (\d+)"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The folder of a public model's config.json, by the recipe's name."""
    folders = {}

    def folder(stem):
        name = public_name(stem)
        if name not in folders:
            folders[name] = save_public(name, tmp_path_factory.mktemp("public"))
        return folders[name]

    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_every_config_runs_dry(path, public, tmp_path, capsys, monkeypatch):
    """And the engines that its comment names are those whose rules allow it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**13, 0, 10**13))
    overrides = [f"model={public(path.stem)}", f"output={tmp_path / 'out'}"]
    assert main(["quantize", "--dry-run", str(path), *overrides]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("checked: ")
    assert not (tmp_path / "out").exists()
    for name in ("device memory", "host memory", "disk", "time"):
        assert f"\n{name}: " in printed
    found = inspect(load_recipe(path, overrides))
    assert all(layer.weights for layer in found.layers)
    comment = path.read_text().partition("\nmodel: ")[0]
    assert recipe_table.needs_line(found) in comment
    assert recipe_table.row(path, found) in PAGE
    loads = {name: f"{name} loads it" in printed for name in ENGINES}
    for name, pattern in COMMANDS.items():
        command = re.search(pattern, comment, re.M)
        if command is None:
            assert name == "transformers" or re.search(f"^# {name}: ", comment, re.M)
            continue
        assert loads[name]
        split = re.search(SPLIT, command[1])
        devices = int(split[1]) if split else 1
        assert why_not_served(ENGINES[name], found, devices) == ""
    if not loads["vllm"] and not loads["sglang"]:
        assert re.search(COMMANDS["transformers"], comment, re.M)


def test_what_a_dry_run_prints(public, tmp_path, capsys):
    config = "configs/olmoe_1b_7b_w4a16.yaml"
    path = str(Path(__file__).parents[1] / config)
    overrides = [f"model={public('olmoe_1b_7b')}", f"output={tmp_path / 'out'}"]
    for option in ("--dry-run", "--check-only"):  # the first name still works
        assert main(["quantize", option, path, *overrides]) == 0
        printed = capsys.readouterr().out
        for line in (
            "16 blocks, 16 routers: 16 choose 8 of 64 experts",
            "W4A16: 3,136 layers int of 4 bits in groups of 128",
            "AutoRound, 200 iterations, own router top3k_mse(multiplier=3) x auto",
            "to be made: 48 units choose of W4A16, W8A16, budget 3%, for vllm; 97 str",
            "128 samples of 2048 tokens from NeelNanda/pile-10k, batches of 4",
            "engine      vllm loads it",
        ):
            assert line in printed


@pytest.mark.parametrize(
    ("stem", "override", "engine", "split", "reason"),
    [
        ("glm_4_5_air_w4a16_sra", "runtime.ignore_layers=x", "vllm", 1, "10944"),
        ("glm_4_5_air_w4a16_sra", None, "vllm", 2, "704"),
        ("gpt_oss_20b_mxfp8", "scheme=W8A16", "vllm", 1, "2880 weights in groups"),
        ("qwen3_30b_a3b_w3a16_sra", None, "sglang", 1, "of 4, 8 bits, not 3"),
        ("nemotron_3_nano_30b_nvfp4", None, "vllm", 1, "not from auto_round"),
    ],
)
def test_what_engines_do_not_load(stem, override, engine, split, reason, public):
    path = Path(__file__).parents[1] / "configs" / f"{stem}.yaml"
    overrides = [f"model={public(stem)}", *([override] if override else [])]
    found = inspect(load_recipe(path, overrides))
    assert reason in why_not_served(ENGINES[engine], found, split)


def test_a_model_that_is_only_a_config(public, capsys):
    path = str(Path(__file__).parents[1] / "configs" / "qwen3_30b_a3b_w4a16_sra.yaml")
    model = f"model={public('qwen3_30b_a3b')}"
    assert main(["estimate", path, model]) == 0
    slow = capsys.readouterr().out
    assert "2.7e+14 bytes / 4.8e+11 per second, which are assumptions" in slow
    fast = ["--operations=1e15", "--bandwidth=4e12"]
    assert main(["estimate", path, model, *fast]) == 0
    assert "operations / 1e+15 per second" in capsys.readouterr().out
    assert main(["estimate", path, model, "--bandwidth=0"]) == 1
    assert "bytes_per_second=0.0: allowed is" in capsys.readouterr().err
