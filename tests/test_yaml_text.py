# SPDX-License-Identifier: Apache-2.0
"""Recipes are YAML 1.2, UTF-8, and nothing that could hide something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vsraq.recipe import load_recipe, parse_recipe, write_resolved
from vsraq.yaml_text import parse_yaml, read_text, write_yaml

MINIMAL = "model: some/model\nscheme: W4A16\noutput: out\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("1:30", "1:30"),
        ("12:30:45", "12:30:45"),
        ("010", 10),
        ("0o10", 8),
        ("0o8", "0o8"),
        ("0x1F", 31),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("true", True),
        ("~", None),
        ("'~'", "~"),
        ("4.", 4.0),
    ],
)
def test_yaml_1_2(text, value):
    read = parse_yaml(f"a: {text}")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r'^not YAML: line 3: found duplicate key "a"'),
        ("a: &x 1\nb: *x\n", r"^not YAML: line 1: &x: an alias"),
        ("a: {b: 1}\n<<: *c\n", r"^not YAML: line 2: \*c: an alias"),
        ("a: 1\n---\nb: 2\n", r"^not YAML: line 2: .*another document"),
        ("%YAML 1.1\n---\na: yes\n", r"^not YAML: line 2: a directive"),
        ("a: !!python/object/apply:os.system [ls]\n", r"^not YAML: line 1: a tag"),
        ("a: !!int x\n", r"^not YAML: line 1: a tag"),
        ("a: [\n", r"^not YAML: line 2: "),
        ("a: b: c\n", r"^not YAML: line 1: "),
        ("a: 2001-99-99\n", r"^not YAML: month must be"),
        ("a: " + "9" * 5000, r"^not YAML: Exceeds the limit"),
        ("[" * 100_000, r"^not YAML: line 1: nested deeper than 16"),
        ("a: \x07\n", r"^not YAML: .*special characters"),
        ("a" * 2_000_000, r"^not YAML of a recipe: 2000000 characters"),
    ],
    ids=lambda value: value[:24],
)
def test_what_a_recipe_does_not_need_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse_yaml(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        *("no", "1e-3", "0o7", "010", "1:30", "~", "null", "", "é ü 漢", "2001-01-01"),
        *("=", "<<", "1_000", "- a", "a: b", "#", "*a", "x " * 100),
        *(1e-3, 1e22, 10, True),
    ],
)
def test_what_is_written_is_read_again(value):
    values = {"z": value, "a": {"b": [value, None]}}
    again = parse_yaml(write_yaml(values))
    assert again == values
    assert list(again) == ["z", "a"]


def test_values_of_yaml_1_1_are_refused_by_their_type(tmp_path):
    path = tmp_path / "recipe.yaml"
    for line, message in [
        ("runtime: {amp: no}", r"runtime.amp='no': allowed is a bool"),
        (
            "calibration: {seqlen: 1:30}",
            r"calibration.seqlen='1:30': allowed is an int",
        ),
        ("algorithm: {lr: 2001-01-01}", r"lr=datetime.date.*: allowed is a finite"),
        ("algorithm: {lr: .nan}", r"lr=nan: allowed is a finite number"),
        ("1: 2", r"1: unknown key"),
        ("[a, b]: 2", r"\('a', 'b'\): unknown key"),
        ("null: 2", r"None: unknown key"),
        ("model: some/other", r'line 4: found duplicate key "model"'),
    ]:
        path.write_text(MINIMAL + line)
        with pytest.raises(ValueError, match=message):
            load_recipe(path)


def test_a_resolved_recipe_keeps_awkward_text(tmp_path):
    recipe = parse_recipe(
        {"model": "1e-3", "scheme": "W4A16", "output": "no"}
        | {"calibration": {"dataset": "0o7"}, "runtime": {"ignore_layers": "é,1:30"}}
    )
    assert load_recipe(write_resolved(recipe, tmp_path)).resolved() == recipe.resolved()


def test_utf_8_whatever_the_locale(tmp_path):
    for name, prefix in [("plain", b""), ("bom", b"\xef\xbb\xbf")]:
        text = MINIMAL.replace("some", "für").encode()
        (tmp_path / name).write_bytes(prefix + text)
    code = (
        "from pathlib import Path; from vsraq.yaml_text import read_text; "
        f"assert all(read_text(path).startswith('model: f\\xfcr') "
        f"for path in Path({str(tmp_path)!r}).iterdir())"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | locale)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match=r"recipe.yaml: no such file"):
        read_text(path)
    with pytest.raises(ValueError, match="a folder; allowed is a YAML file"):
        read_text(tmp_path)
    path.write_bytes(MINIMAL.encode() + b"format: \xff\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: line 4 is not UTF-8"):
        load_recipe(path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mask.safetensors").touch()
    recipe = parse_recipe(
        {"model": "~/model", "scheme": "W4A16", "output": "~/out"}
        | {"algorithm": {"objective": "sra", "token_mask": "~/mask.safetensors"}}
        | {"calibration": {"dataset": "~/a.jsonl:num=3,pile-10k,~/b.jsonl"}}
    )
    home = str(Path.home())
    assert (recipe.model, recipe.output) == (f"{home}/model", f"{home}/out")
    assert recipe.algorithm["token_mask"] == f"{home}/mask.safetensors"
    data = f"{home}/a.jsonl:num=3,pile-10k,{home}/b.jsonl"
    assert recipe.calibration.dataset == data
