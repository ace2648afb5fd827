# SPDX-License-Identifier: Apache-2.0
"""Mutated recipes: a recipe in order, or one line that names what is wrong."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsraq.autoround import VSRAQConfig
from vsraq.autoround.option_types import SignRoundOptions
from vsraq.cli import main
from vsraq.demo import model_path
from vsraq.hyperparameters import ALLOWED
from vsraq.recipe import load_recipe, parse_recipe
from vsraq.recipe.keys import CalibrationKeys, RecipeKeys, RuntimeKeys
from vsraq.recipe.recipe import config_arguments
from vsraq.yaml_text import parse_yaml, write_yaml

CONFIGS = [
    re.sub(r"(?m)^#.*\n", "", path.read_text())
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
]
OPTIONS = sorted(config_arguments(VSRAQConfig))
SECTIONS = {
    "": list(RecipeKeys.model_fields),
    "algorithm.": OPTIONS,
    "calibration.": list(CalibrationKeys.model_fields),
    "runtime.": list(RuntimeKeys.model_fields),
}
KEYS = [section + key for section, keys in SECTIONS.items() for key in keys]
VALUES = [
    *("no", "yes", "true", "null", "~", "''", "x", "W4A16", "NVFP4", "auto", "all"),
    *("0", "1", "-1", "2", "16", "007", "0o17", "1:30", "1_000", "9" * 30, "9" * 5000),
    *("0.5", "-0.5", "1e-3", "1e400", ".inf", "-.inf", ".nan", "2001-01-01", "0x10"),
    *("[]", "[1]", "{}", "{a: 1}", "[[[[[[", "*a", "&a 1", "!!int 3", "!x y", "%", "@"),
    *("'\"", '"\\0"', '"\\ud800"', "é", "a: b", "<<", "=", "- 1", "| ", "sra", "vsraq"),
    *(
        "{layers.0: W8A16}",
        "{a: {bits: 8}}",
        "{a: {bits: x}}",
        "{1: 2}",
        "cpu",
        "0,1",
        "{name: vsraq, alpha: 0.5}",
        "{name: vsraq, alpha: x}",
    ),
]
KINDS = ["value", "key", "double", "cut", "indent", "drop"]
WHOLE = {"iters", "nblocks", "gradient_accumulate_steps", "lookahead"}
REAL = {"lr", "minmax_lr", "momentum", "auto_ratio"}


@st.composite
def mutated(draw):
    """The bytes of a mutated recipe, and overrides."""
    lines = draw(st.sampled_from(CONFIGS)).splitlines()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(
            st.sampled_from(["value", "key", "double", "cut", "indent", "drop"])
        )
        head, colon, _ = lines[at].partition(":")
        if kind == "value":
            lines[at] = f"{head}{colon} {draw(st.sampled_from(VALUES))}"
        elif kind == "key":
            key = draw(st.sampled_from(KEYS)).rpartition(".")[2]
            key = draw(st.sampled_from([key, key[1:], key.upper(), "x", "1", "? [a]"]))
            blank = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            lines.insert(at, f"{blank}{key}: {draw(st.sampled_from(VALUES))}")
        elif kind == "double":
            lines.insert(at, lines[at])
        elif kind == "cut":
            lines[at:] = [lines[at][: draw(st.integers(0, 20))]]
        elif kind == "indent":
            lines[at] = draw(st.sampled_from([" ", "   ", "\t"])) + lines[at]
        else:
            del lines[at]
            lines = lines or [""]
    data = bytearray("\n".join(lines).encode())
    if draw(st.integers(0, 4)) == 0 and data:
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    pairs = st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)).map("=".join)
    return bytes(data), draw(st.lists(pairs | st.text(max_size=8), max_size=2))


def is_whole(value):
    return type(value) is int


def is_real(value):
    return type(value) in (int, float) and math.isfinite(value)


def check_accepted(recipe):
    """By other means than the recipe's own: types, and the way to a file and back."""
    assert all(type(v) is str and v for v in (recipe.model, recipe.output))
    calibration = recipe.calibration
    for value in (calibration.nsamples, calibration.seqlen, calibration.batch_size):
        assert is_whole(value)
        assert value >= 1
    resolved = recipe.resolved()
    for name, value in resolved["algorithm"].items():
        default = SignRoundOptions.model_fields.get(name)
        if name in WHOLE:
            assert is_whole(value)
            assert value >= 1 or (name, recipe.method) == ("iters", "auto_round")
        elif name in REAL:
            assert is_real(value)
            assert value >= 0
        elif default is not None and type(default.default) is bool:
            assert type(value) is bool
    for name, value in recipe.runtime.items():
        if type(RuntimeKeys.model_fields[name].default) is bool:
            assert type(value) is bool
    again = parse_recipe(parse_yaml(write_yaml(resolved)))
    assert again.resolved() == resolved
    assert again.algorithm_config().bits == recipe.algorithm_config().bits


def check_refused(error):
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 3000
    names = [
        *KEYS,
        *OPTIONS,
        *ALLOWED,
        "not YAML",
        "override",
        "unknown key",
        "missing",
        "line ",
    ]
    assert any(name in message for name in names) or "holds a" in message, message


def test_mutated_recipes(tmp_path, full):
    path = tmp_path / "recipe.yaml"
    seen = {"accepted": 0, "refused": 0}

    @settings(max_examples=20_000 if full else 2_000)
    @given(mutated())
    def run(case):
        data, overrides = case
        path.write_bytes(data)
        try:
            recipe = load_recipe(path, overrides)
        except (ValueError, FileNotFoundError) as error:
            seen["refused"] += 1
            check_refused(error)
        else:
            seen["accepted"] += 1
            check_accepted(recipe)

    run()
    assert sum(seen.values()) >= 2_000
    assert min(seen.values()) >= 100, seen


BAD = {
    bool: ["no", "yes", "1", "0", "'true'", "[]", "1.0"],
    int: ["true", "x", "1.5", "-5", "'3'", "[3]", "{}", ".inf", "1:30"],
    float: ["true", "fast", "-1", ".nan", ".inf", "'0.9'", "[]", "{}", "1:30"],
    str: ["1", "1.5", "true", "[]", "{a: 1}", "''"],
}
WHAT = {
    bool: [
        *("runtime.amp", "runtime.low_gpu_mem_usage", "runtime.trust_remote_code"),
        *("algorithm.enable_adam", "algorithm.enable_minmax_tuning", "algorithm.sym"),
        *("algorithm.enable_lfq", "algorithm.realign_routers", "algorithm.act_dynamic"),
        *("algorithm.token_selection", "runtime.quant_lm_head"),
    ],
    int: [
        *("calibration.nsamples", "calibration.seqlen", "calibration.batch_size"),
        *("calibration.seed", "algorithm.iters", "algorithm.nblocks", "algorithm.bits"),
        *("algorithm.gradient_accumulate_steps", "algorithm.group_size"),
        *("algorithm.act_bits", "algorithm.dynamic_max_gap", "algorithm.super_bits"),
        *("algorithm.min_tokens_per_expert", "algorithm.boundary"),
    ],
    float: [
        *("algorithm.lr", "algorithm.minmax_lr", "algorithm.momentum"),
        *("algorithm.router_weight", "algorithm.alpha", "algorithm.eps"),
    ],
    str: [
        *("model", "scheme", "output", "format", "method", "algorithm.objective"),
        *("calibration.dataset", "runtime.ignore_layers", "runtime.model_dtype"),
        *("algorithm.data_type", "algorithm.rank_by", "algorithm.on_unreached"),
    ],
}


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.__name__)
def test_values_of_another_type_are_never_accepted(kind, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a/b\nscheme: W4A16\noutput: out\n")
    accepted = []
    for key in WHAT[kind]:
        for value in BAD[kind]:
            overrides = ["algorithm.objective=vsraq", f"{key}={value}"]
            try:
                load_recipe(path, overrides)
            except ValueError as error:
                check_refused(error)
                if key.rpartition(".")[2] not in str(error):
                    accepted.append(f"{key}={value}: {error}")
            else:
                accepted.append(f"{key}={value}")
    assert not accepted


def test_mutated_command_lines(tmp_path, capsys, full):
    path = tmp_path / "recipe.yaml"
    statuses = set()

    @settings(max_examples=400 if full else 40)
    @given(mutated(), st.sampled_from(["quantize", "select-tokens"]))
    def run(case, command):
        data, overrides = case
        path.write_bytes(data)
        here = [f"model={model_path()}", f"output={tmp_path / 'out'}"]
        overrides = [o for o in overrides if not o.startswith("-")]
        status = main([command, "--check-only", str(path), *here, *overrides])
        captured = capsys.readouterr()
        statuses.add(status)
        assert "Traceback" not in captured.err
        assert "error: unexpected" not in captured.err
        if status:
            assert captured.err.startswith("vsraq: error: ")
            assert captured.err.count("\n") == 1
        else:
            assert captured.out.startswith("checked: ")

    run()
    assert statuses == {0, 1}
    assert not (tmp_path / "out").exists()
