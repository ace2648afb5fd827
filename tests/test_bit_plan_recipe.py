# SPDX-License-Identifier: Apache-2.0
"""`bits` in recipes, and `vsraq plan`: made, kept, found again, or refused."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiny
from vsraq.bits import BitPlan
from vsraq.checkpoint.planned import PLAN_FILE
from vsraq.cli import main
from vsraq.recipe import bits as recipe_bits
from vsraq.recipe import load_recipe, parse_recipe, plan_path
from vsraq.recipe.bits import run_layer_config
from vsraq.recipe.run import write_resolved
from vsraq.yaml_text import parse_yaml, write_yaml

MINIMAL = {"model": "some/model", "scheme": "W4A16", "output": "out"}
FAST = ["bits.tokens=64", "bits.budget=3%"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model, text, a recipe, and a plan that `vsraq plan` has made of it."""
    root = tmp_path_factory.mktemp("plans")
    tiny.save("solar_open", root / "model")
    tiny.save("llama", root / "dense")
    tiny.save_text(root / "text.jsonl")
    recipe = {
        "model": str(root / "model"),
        "scheme": "W4A16",
        "output": str(root / "out"),
        "algorithm": {"group_size": 32, "iters": 2},
        "calibration": {
            "dataset": str(root / "text.jsonl"),
            "nsamples": 4,
            "seqlen": tiny.SEQLEN,
            "batch_size": 4,
        },
        "runtime": {"device_map": "cpu", "enable_torch_compile": False},
    }
    (root / "recipe.yaml").write_text(write_yaml(recipe))
    with tiny.bfloat16():
        arguments = ["--out", str(root / "plan.json"), "--tokens=64", "--budget=3%"]
        assert main(["plan", str(root / "recipe.yaml"), *arguments]) == 0
    return root


def refused(capsys, status):
    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.startswith("vsraq: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def check_only(root, *overrides):
    return main(["quantize", "--check-only", str(root / "recipe.yaml"), *overrides])


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("bfloat16")
def test_a_run_makes_a_plan_keeps_it_and_its_recipe_repeats_it(root, capsys, vsraq_log):
    """And a second run with the same output folder takes the plan of the first."""
    recipe, out = str(root / "recipe.yaml"), root / "made"
    assert main(["quantize", recipe, f"output={out}", *FAST]) == 0
    printed = capsys.readouterr().out
    (folder,) = out.glob("model-*")
    assert "planned_layers=62)" in printed
    assert any(f"bit plan, kept in {out}/vsraq_bit_plan.json" in m for m in vsraq_log)
    plan = BitPlan.load(folder / "vsraq_bit_plan.json")
    assert plan == BitPlan.load(out / "vsraq_bit_plan.json")
    assert plan.engine == "vllm"
    assert plan.units == BitPlan.load(root / "plan.json").units
    resolved = folder / "vsraq_recipe.yaml"
    assert load_recipe(resolved).bits == str(folder / "vsraq_bit_plan.json")

    for path in folder.iterdir():
        path.rename(root / path.name) if path.suffix == ".safetensors" else None
    vsraq_log.clear()
    assert main(["quantize", str(resolved), f"output={root / 'again'}"]) == 0
    (again,) = (root / "again").glob("model-*")
    assert same(root, again)

    vsraq_log.clear()
    assert main(["quantize", recipe, f"output={out}", *FAST]) == 0
    assert any("the bit plan was made before" in m for m in vsraq_log)
    assert same(root, folder)


@pytest.mark.usefixtures("bfloat16")
def test_plain_autoround_with_a_plan_and_a_layer_config(root, tmp_path, capsys):
    """The plan is made with the recipe's exceptions, and then replaces them."""
    layers = "runtime.layer_config={model.layers.1.self_attn: {bits: 8}}"
    arguments = [
        "method=auto_round",
        layers,
        "bits.engine=none",
        "bits.options=[W6A16]",
    ]
    recipe = str(root / "recipe.yaml")
    status = main(["quantize", recipe, f"output={tmp_path / 'out'}", *arguments, *FAST])
    assert status == 0
    assert "planned_layers=62)" in capsys.readouterr().out
    (folder,) = (tmp_path / "out").glob("model-*")
    written = load_recipe(folder / "vsraq_recipe.yaml")
    assert "layer_config" not in written.runtime
    plan = BitPlan.load(written.bits)
    assert plan.settings["runtime"] == {
        "layer_config": {"model.layers.1.self_attn": {"bits": 8}}
    }
    # the same recipe with the plan: the entry is the one that the plan was made with
    with_plan = load_recipe(recipe, [f"bits={written.bits}", *arguments[:2]])
    assert run_layer_config(with_plan, plan) == plan.layer_config


@pytest.mark.usefixtures("bfloat16")
def test_the_plan_command(root, tmp_path, capsys):
    recipe, out = str(root / "recipe.yaml"), tmp_path / "new" / "plan.json"
    arguments = ["--out", str(out), "--tokens", "64", "--engine", "none"]
    more = ["--budget", "1000", "--metric", "routing", "--options", "W3A16,W8A16"]
    # key=value may stand behind the options
    assert main(["plan", recipe, *arguments, *more, "calibration.seed=7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("checked: solar_open")
    assert "budget 1000, metric routing, 64 tokens" in printed
    assert printed.endswith(f"written to {out}\nwritten to {out.with_suffix('.png')}\n")
    plan = BitPlan.load(out)
    assert (plan.engine, plan.metric, plan.budget) == (None, "routing", "1000")
    assert plan.settings["calibration"]["seed"] == 7
    assert plan.model == str(root / "model")
    assert plan.bytes - plan.uniform.bytes <= 1000
    assert check_only(root, f"bits={out}") == 0
    assert not (root / "out").exists()


@pytest.mark.usefixtures("bfloat16")
def test_bad_arguments_of_the_plan_command(root, tmp_path, capsys, monkeypatch):
    recipe, out = str(root / "recipe.yaml"), ["--out", str(tmp_path / "p.json")]
    for arguments, message in (
        (["--budget", "three"], "bits.budget='three': allowed is a share of"),
        (["--budget=-99%"], "budget='-99%': it allows 1,512 bytes, and with the small"),
        (["--active-budget=-9%"], "active_budget='-9%': it allows"),
        (["--budget=-2000"], "budget=-2000: it allows 149,168 bytes"),
        (["--budget=--5"], "bits.budget='--5': allowed is a share"),
        (["--active-budget", "three"], "bits.active_budget='three': allowed is a"),
        (["--options", "W3A61"], "bits.options=['W3A61']: allowed is a list"),
        (["--options", "W3A16"], "bits: W3A16 is not allowed, because vllm loads int"),
        (["--figure", "plan.pdf"], "figure='plan.pdf': allowed is a name that ends"),
        (["--figure", "/proc/plan.png"], "--figure='/proc': /proc cannot be written"),
        ([f"bits={root / 'plan.json'}"], "the recipe has a bit plan already"),
        ([f"model={root / 'dense'}"], "a llama has no MoE router"),
    ):
        assert message in refused(capsys, main(["plan", recipe, *out, *arguments]))
    for path, message in (
        (str(tmp_path), "a folder; allowed is a file"),
        (".", "--out='.': a folder; allowed is a file"),
        (str(tmp_path / "plan.png"), "the figure has that name; allowed are two names"),
    ):
        assert message in refused(capsys, main(["plan", recipe, "--out", path]))
    assert main(["plan", "--check-only", recipe, *out]) == 0
    assert not (tmp_path / "p.json").exists()
    monkeypatch.setattr("vsraq.bits.figure.find_spec", lambda _: None)
    figure = ["--figure", str(tmp_path / "plan.png")]
    line = refused(capsys, main(["plan", recipe, *out, *figure]))
    assert "run `pip install matplotlib`" in line
    for arguments in (["--engine", "vlm"], ["--tokens", "0"], ["--budgt", "3%"]):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", recipe, *out, *arguments])
    with pytest.raises(SystemExit, match="2"):
        main(["plan", recipe])


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (None, r"bits=None: allowed is the path of a bit plan, or a mapping of keys"),
        (3, r"bits=3: allowed is the path"),
        ("", r"bits='': allowed is the path"),
        ({"budgt": "3%"}, r"bits.budgt: unknown key; did you mean bits.budget\?"),
        ({"budget": 0.03}, r"bits.budget=0.03: allowed is a share"),
        ({"budget": True}, r"bits.budget=True: allowed is a share"),
        ({"budget": "nan%"}, r"bits.budget='nan%': allowed is a share"),
        ({"active_budget": None}, r"bits.active_budget: no value; leave it out"),
        ({"active_budget": 0.5}, r"bits.active_budget=0.5: allowed is a share"),
        ({"budget": 10**400}, r"bits.budget=1000.*: allowed is a share"),
        ({"engine": "vlm"}, r"bits.engine='vlm': allowed is one of vllm, sglang, tran"),
        ({"engine": None}, r"bits.engine=None: allowed is one of"),
        ({"metric": "kld"}, r"bits.metric='kld': allowed is kl, routing, or a mapping"),
        ({"metric": {"kl": -1, "routing": 1}}, r"bits.metric={.*allowed is kl"),
        ({"metric": {"kl": 0}}, r"bits.metric={.*allowed is kl"),
        ({"metric": {}}, r"bits.metric={}: allowed is kl"),
        ({"options": []}, r"bits.options=\[\]: allowed is a list of schemes"),
        ({"options": "W8A16"}, r"bits.options='W8A16': allowed is a list"),
        ({"options": ["W8A16", "w8a16"]}, r"bits.options=.*: allowed is a list"),
        ({"options": ["w4a16"]}, r"W4A16 is the recipe's scheme"),
        ({"tokens": 0}, r"bits.tokens=0: allowed is an int >= 1"),
        ({"lm_head": 1}, r"bits.lm_head=1: allowed is a bool"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(MINIMAL | {"bits": bits})


def test_two_ways_to_say_what_the_head_is():
    runtime = {"quant_lm_head": True}
    with pytest.raises(ValueError, match="leave one of them out"):
        parse_recipe(MINIMAL | {"bits": {"lm_head": True}, "runtime": runtime})


@pytest.mark.parametrize(
    "bits",
    [{}, {"budget": -5, "metric": {"kl": 1, "routing": 0.5}}, "~/plan.json"],
    ids=str,
)
def test_a_resolved_recipe_has_the_same_bits(bits):
    recipe = parse_recipe(MINIMAL | {"bits": bits})
    again = parse_recipe(parse_yaml(write_yaml(recipe.resolved())))
    assert again.bit_settings == recipe.bit_settings
    assert again.resolved() == recipe.resolved()
    if isinstance(bits, str):
        assert not recipe.bits.startswith("~")
    else:
        assert recipe.bit_settings["engine"] == "vllm"
        assert recipe.bit_settings["tokens"] == 4096
    assert "bits" not in parse_recipe(MINIMAL).resolved()


def test_refused_before_a_weight_is_loaded(root, tmp_path, capsys):
    plan = root / "plan.json"
    replace(BitPlan.load(plan), config_digest="sha256:0").save(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{}")
    layers = "runtime.layer_config="
    for overrides, message in (
        (["bits=no.json"], "bits='no.json': no such file; allowed is a plan that"),
        ([f"bits={tmp_path / 'broken.json'}"], "no bit plan ("),
        ([f"bits={tmp_path / 'other.json'}"], "this model's config differs"),
        ([f"bits={plan}", "scheme=W8A16"], "the bit plan was made for W4A16"),
        (
            [f"bits={plan}", "algorithm.group_size=64"],
            "made for group_size=32",
        ),
        (
            [f"bits={plan}", "algorithm.act_bits=8"],
            "made for act_bits=16, the recipe has 8",
        ),
        (
            [f"bits={plan}", "runtime.quant_lm_head=true"],
            "made for quant_lm_head=None, the recipe has True",
        ),
        (
            [f"bits={plan}", "runtime.to_quant_block_names=model.layers.0"],
            "made for to_quant_block_names=None, the recipe has 'model.layers.0'",
        ),
        (
            [f"bits={plan}", "format=auto_round,auto_awq"],
            "because vllm",
        ),
        (
            [f"bits={plan}", f"{layers}{{o_proj: {{bits: 3}}}}"],
            "runtime.layer_config.o_proj={'bits': 3}: the bit plan has bits=",
        ),
        (
            [f"bits={plan}", f"{layers}{{o_proj: W3A16}}"],
            "runtime.layer_config.o_proj='W3A16': the bit plan has bits=",
        ),
        (
            [f"bits={plan}", "runtime.ignore_layers=o_proj"],
            "runtime.ignore_layers='o_proj': the bit plan has bits=",
        ),
        (["bits={}", "format=auto_gptq"], "bits: W4A16 is not allowed, because vllm"),
        (["bits={}", "scheme=W8A16", "format=auto_awq"], "bits: W8A16 is not allowed"),
        (["bits={}", f"model={root / 'dense'}", "method=auto_round"], "no MoE router"),
    ):
        line = refused(capsys, check_only(root, *overrides))
        assert message in line, line


def test_a_plan_is_looked_up_beside_the_recipe(root, tmp_path, monkeypatch):
    """From wherever it is run, and after its folder has been moved."""
    folder = tmp_path / "moved"
    folder.mkdir()
    plan = BitPlan.load(root / "plan.json")
    recipe = load_recipe(root / "recipe.yaml", [f"bits={root / 'plan.json'}"])
    path = write_resolved(recipe, folder, plan)
    assert parse_yaml(path.read_text())["bits"] == PLAN_FILE
    for here in (root, folder, tmp_path):
        monkeypatch.chdir(here)
        for given in (path, os.path.relpath(path)):
            found = load_recipe(given).bits
            assert recipe_bits._load(found) == plan
            assert os.path.samefile(found, folder / PLAN_FILE)
    # what the command line says is where the user is
    monkeypatch.chdir(root)
    assert load_recipe(path, ["bits=plan.json"]).bits == "plan.json"
    (folder / PLAN_FILE).unlink()
    assert load_recipe(path).bits == PLAN_FILE


def test_entries_that_a_plan_agrees_with_or_does_not_have(root):
    plan = BitPlan.load(root / "plan.json")
    path = str(root / "plan.json")
    recipe = load_recipe(root / "recipe.yaml", [f"bits={path}"])
    head = {"lm_head": {"bits": 8}}
    given = {"experts": {"group_size": 32}} | head
    recipe = replace(recipe, runtime=dict(recipe.runtime) | {"layer_config": given})
    assert run_layer_config(recipe, plan) == dict(plan.layer_config) | head


def test_the_estimate_is_the_plans(root, tmp_path, capsys):
    plan = BitPlan.load(root / "plan.json")
    larger = replace(plan, planned=replace(plan.planned, bytes=12_000_000))
    larger.save(tmp_path / "plan.json")
    assert check_only(root, f"bits={tmp_path / 'plan.json'}") == 0
    assert "export about 0.012 GB" in capsys.readouterr().out
    assert check_only(root, "bits.budget=8000000") == 0
    assert "export about 0.00815 GB" in capsys.readouterr().out


def test_a_kept_plan_of_other_settings_is_not_used(root, tmp_path, vsraq_log):
    recipe = load_recipe(root / "recipe.yaml", [f"output={tmp_path}", *FAST])
    plan = BitPlan.load(root / "plan.json")
    kept = replace(plan, settings=recipe_bits.plan_settings(recipe))
    kept.save(plan_path(recipe))
    assert recipe_bits.bit_plan(recipe) == kept
    text = tmp_path / "text.jsonl"
    for override, name in (
        ("bits.tokens=65", "bits"),
        ("runtime.model_dtype=float32", "runtime"),
        ("calibration.nsamples=5", "calibration"),
    ):
        given = [f"output={tmp_path}", *FAST, override]
        other = load_recipe(root / "recipe.yaml", given)
        assert recipe_bits._kept(other, warn=True) is None
        assert f"made with another {name}: a plan is made anew" in vsraq_log[-1]
    given = [f"output={tmp_path}", *FAST, f"calibration.dataset={text}"]
    recipe = load_recipe(root / "recipe.yaml", given)
    tiny.save_text(text)
    replace(plan, settings=recipe_bits.plan_settings(recipe)).save(plan_path(recipe))
    assert recipe_bits._kept(recipe) is not None
    plan_path(recipe).write_text("{}")  # of an older version, or broken
    assert recipe_bits._kept(recipe, warn=True) is None
    assert vsraq_log[-1].endswith(": a plan is made anew")
    replace(plan, settings=recipe_bits.plan_settings(recipe)).save(plan_path(recipe))
    tiny.save_text(text, samples=17)
    assert recipe_bits._kept(recipe) is None
