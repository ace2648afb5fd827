# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

import pytest

import tiny
from vsraq.autoround import VSRAQConfig
from vsraq.cli import main
from vsraq.demo import model_path
from vsraq.objectives import OBJECTIVES
from vsraq.options import Alignment
from vsraq.recipe import Recipe, load_recipe, parse_recipe
from vsraq.tokens import TokenMask
from vsraq.yaml_text import parse_yaml, write_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = {"model": "some/model", "scheme": "W4A16", "output": "out"}


# the paper's weight and calibration size of each model, and what we add
SOLAR = Alignment(0.01, objective="vsraq")
NEMOTRON = Alignment(0.1, "auto", True, objective="vsraq")
SRA = Alignment("auto", 0.0, True, objective="sra", token_selection=True)
DEFAULT = VSRAQConfig().alignment
SETTINGS = {
    "deepseek_v3_w4a16": (VSRAQConfig(rank_by="selection").alignment, 128, 2048),
    "gpt_oss_20b_mxfp8": (DEFAULT, 128, 2048),
    "olmoe_1b_7b_w4a16": (DEFAULT, 128, 2048),
    "qwen3_30b_a3b_w4a16": (DEFAULT, 128, 2048),
    "solar_open_100b_w4a16": (SOLAR, 512, 2048),
    "solar_open_100b_nvfp4": (SOLAR, 512, 2048),
    "nemotron_3_nano_30b_nvfp4": (NEMOTRON, 512, 1024),
    **{
        f"{name}_sra": (SRA, 128, 2048)
        for name in (
            "glm_4_5_air_w4a16",
            "qwen3_30b_a3b_w3a16",
            "qwen3_30b_a3b_w4a16",
            "solar_open_100b_w4a16",
        )
    },
}


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_every_config_is_valid(path):
    recipe = load_recipe(path)
    alignment, nsamples, seqlen = SETTINGS[path.stem]
    config = recipe.algorithm_config()
    assert isinstance(config, VSRAQConfig)
    assert config.alignment == alignment
    assert (recipe.calibration.nsamples, recipe.calibration.seqlen) == (
        nsamples,
        seqlen,
    )
    assert recipe.runtime["low_gpu_mem_usage"]


def test_defaults_and_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(write_yaml(MINIMAL))
    recipe = load_recipe(
        path,
        [
            "scheme=NVFP4",
            "algorithm.router_weight=0.1",
            "algorithm.objective=top3k_mse",
            "algorithm.group_size=32",
            "algorithm.lr=5e-3",
            "calibration.nsamples=4",
            "runtime.device_map=cpu",
        ],
    )
    assert recipe.scheme == "NVFP4"
    assert recipe.algorithm_config().router_weight == 0.1
    assert recipe.algorithm_config().group_size == 32
    assert recipe.algorithm_config().lr == 0.005
    assert recipe.calibration.nsamples == 4
    assert recipe.calibration.seqlen == 2048
    assert recipe.runtime == {"device_map": "cpu"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shceme": "W4A16"}, r"shceme: unknown key; did you mean scheme\?"),
        (
            {"algorithm": {"router_wieght": 1}},
            r"algorithm.router_wieght: unknown key; did you mean "
            r"algorithm.router_weight\?",
        ),
        ({"calibration": {"nsample": 3}}, r"did you mean calibration.nsamples\?"),
        ({"runtime": {"device": "cpu"}}, r"did you mean runtime.device_map\?"),
        (
            {"algorithm": {"objective": {"name": "vsraq", "alpha": 3}}},
            r"alpha=3: allowed is a number from 0 to 1",
        ),
        ({"algorithm": {"objective": "vsrag"}}, r"objective='vsrag'"),
        ({"algorithm": {"iters": 0}}, r"iters=0"),
        ({"algorithm": {"iters": "many"}}, r"iters='many': allowed is an int"),
        ({"algorithm": {"nblocks": 0}}, r"nblocks=0: allowed is an int >= 1"),
        ({"algorithm": {"objective": 3}}, r"objective=3 is a int"),
        ({"method": "gptq"}, r"method='gptq': allowed is vsraq or auto_round"),
        (
            {"method": "auto_round", "algorithm": {"objective": "vsraq"}},
            r"algorithm.objective: unknown key",
        ),
        ({"scheme": 4}, r"scheme=4: allowed is a str"),
        ({"calibration": {"seqlen": "long"}}, r"calibration.seqlen='long'"),
        ({"calibration": {"nsamples": True}}, r"calibration.nsamples=True"),
        ({"calibration": {"nsamples": 0}}, r"calibration.nsamples=0: .*>= 1"),
        ({"algorithm": ["vsraq"]}, r"algorithm=\['vsraq'\]: allowed is a mapping"),
        ({"runtime": {"low_gpu_mem_usage": "yes"}}, r"allowed is a bool"),
    ],
)
def test_bad_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(MINIMAL | change)


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="model, output: missing"):
        parse_recipe({"scheme": "W4A16"})


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("- a\n", [], "holds a list; allowed is a mapping"),
        ("a: [", [], "not YAML"),
        ("{}", ["scheme"], "override 'scheme': allowed is key=value"),
        ("{model: a}", ["model.name=b"], "model is not a section"),
    ],
)
def test_bad_files_and_overrides(text, overrides, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    "options",
    [{"objective": name} for name in OBJECTIVES]
    + [
        {"objective": {"name": "topk_mse", "multiplier": "all"}},
        {"objective": "sra", "token_mask": "mask.safetensors"},
        {"token_selection": {"tau": 0.01, "shift_threshold": 0.1}},
        {"realign_routers": True},
    ],
    ids=str,
)
def test_a_resolved_recipe_is_a_recipe(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.safetensors").touch()
    recipe = parse_recipe(MINIMAL | {"algorithm": {"router_weight": 0.5} | options})
    again = parse_recipe(parse_yaml(write_yaml(recipe.resolved())))
    configs = again.algorithm_config(), recipe.algorithm_config()
    assert configs[0].alignment.plain() == configs[1].alignment.plain()
    assert again.resolved() == recipe.resolved()


def test_the_resolved_recipe_is_complete_and_runs_again():
    recipe = parse_recipe(MINIMAL | {"algorithm": {"objective": "topk_mse"}})
    resolved = recipe.resolved()
    assert resolved["algorithm"]["iters"] == 200
    assert resolved["algorithm"]["router_weight"] == "auto"
    assert resolved["algorithm"]["next_router_weight"] == "auto"
    refit = {"ridge": 1e-3, "weighting": "uniform"}
    assert resolved["algorithm"]["realign_routers"] == refit
    assert resolved["algorithm"]["objective"] == {"name": "topk_mse", "multiplier": 1}
    assert resolved["calibration"]["seed"] == 42
    again = parse_recipe(parse_yaml(write_yaml(resolved)))
    assert isinstance(again, Recipe)
    assert again.resolved()["algorithm"] == resolved["algorithm"]


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
@pytest.mark.usefixtures("bfloat16")
def test_quantize_streams_exports_and_verifies(scheme, text_file, tmp_path, capsys):
    path = next(path for path in CONFIGS if path.stem == "solar_open_100b_w4a16")
    status = main(
        [
            "quantize",
            str(path),
            f"model={model_path()}",
            f"scheme={scheme}",
            f"output={tmp_path / 'out'}",
            "format=auto_round",
            "algorithm.iters=1",
            *(["algorithm.group_size=32"] if scheme == "W4A16" else []),
            f"calibration.dataset={text_file}",
            "calibration.nsamples=4",
            "calibration.seqlen=64",
            "runtime.enable_torch_compile=false",
            "runtime.device_map=cpu",
        ]
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "verified: Verification(" in out
    assert "routers=6, realigned_routers=0, experts=192" in out
    folder = Path(out.split("exported to ")[1].splitlines()[0])
    assert "# auto-round 0.16" in (folder / "vsraq_recipe.yaml").read_text()
    written = load_recipe(folder / "vsraq_recipe.yaml")
    assert written.calibration.nsamples == 4
    assert written.scheme == scheme
    assert f"quantized_layers={6 * (4 + 3 * 32 + 3)}," in out


def test_a_fault_is_one_line_and_a_status(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(write_yaml(MINIMAL | {"shceme": 1}))
    assert main(["quantize", str(path)]) == 1
    assert "vsraq: error: shceme: unknown key" in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "--reference", str(tmp_path)]) == 1
    assert "no config.json" in capsys.readouterr().err


def selecting(output, model, text):
    return [
        "configs/qwen3_30b_a3b_w4a16_sra.yaml",
        f"model={model}",
        f"output={output}",
        "algorithm.iters=1",
        "algorithm.group_size=32",
        f"calibration.dataset={text}",
        "calibration.nsamples=8",
        f"calibration.seqlen={tiny.SEQLEN}",
        "runtime.device_map=cpu",
        "runtime.enable_torch_compile=false",
    ]


@pytest.mark.usefixtures("bfloat16")
def test_selected_tokens_are_written_and_found_again(
    tmp_path, capsys, monkeypatch, vsraq_log
):
    monkeypatch.chdir(ROOT)
    model = tiny.save("solar_open", tmp_path / "model")
    text = tiny.save_text(tmp_path / "text.jsonl")
    arguments = selecting(tmp_path / "out", model, text)
    assert main(["select-tokens", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "selected " in printed
    assert "of 256 tokens" in printed
    path = tmp_path / "out" / "token_mask.safetensors"
    assert f"written to {path}" in printed
    first = TokenMask.load(path).digest
    assert main(["select-tokens", *arguments]) == 0
    assert TokenMask.load(path).digest == first
    vsraq_log.clear()
    assert main(["quantize", *arguments]) == 0
    assert any(f"tokens were selected before, in {path}" in m for m in vsraq_log)
    assert not any(m.startswith("vsraq: selected ") for m in vsraq_log)
    vsraq_log.clear()
    again = [*arguments, "algorithm.token_selection.tau=0.2"]
    assert main(["quantize", *again]) == 1
    assert "holds weights that are not of this run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "model-w4g32")
    assert main(["quantize", *again]) == 0
    assert any("tokens are selected anew" in m for m in vsraq_log)
    assert any(m.startswith("vsraq: selected ") for m in vsraq_log)
    vsraq_log.clear()
    assert main(["quantize", *arguments, "scheme=W3A16"]) == 0
    assert any("tokens are selected anew" in m for m in vsraq_log)
    shutil.rmtree(tmp_path / "out" / "model-w4g32")
    other = [*arguments, "calibration.seed=1"]
    assert main(["quantize", *other]) == 1
    assert "token mask: calibration sample" in capsys.readouterr().err


def test_a_recipe_that_selects_no_tokens(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = "configs/solar_open_100b_w4a16.yaml"
    assert main(["select-tokens", config]) == 1
    assert "selects no tokens, so there is no mask" in capsys.readouterr().err
