# SPDX-License-Identifier: Apache-2.0
"""The code blocks of the README and of the documentation.

A block that cannot run here has a comment in the line before it, with the reason:

    <!-- not run: it needs the hub -->

What it says of vsraq is checked all the same.
"""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

import vsraq
from vsraq.cli import _parse
from vsraq.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "diff", "json", "python", "text", "yaml"}
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(language=None, pages=PAGES):
    found = []
    for page in pages:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code"))
            name, code = match["language"], match["code"]
            if language in (None, name):
                found.append(Block(page.name, line, name, code, match["reason"]))
    return found


def check_python(code, where):
    """Compile a block; resolve what it imports from vsraq and what it calls there."""
    tree = ast.parse(code, where)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vsraq"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name, None)
                if value is None:  # a module that is not imported yet
                    value = importlib.import_module(f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = value
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "vsraq":
                    importlib.import_module(alias.name)
                    known["vsraq"] = vsraq
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, known, where)
        if isinstance(node, ast.Call):
            check_call(node, known, where)


def resolve(node, known, where):
    """The object that a dotted name means, None if it does not begin in vsraq."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolve(node.value, known, where)
    if not (inspect.ismodule(owner) or inspect.isclass(owner)):
        return None
    assert hasattr(owner, node.attr), f"{where}: {owner.__name__} has no {node.attr}"
    return getattr(owner, node.attr)


def check_call(node, known, where):
    called = resolve(node.func, known, where)
    if not callable(called):
        return
    parameters = inspect.signature(called).parameters
    if inspect.isclass(called) and issubclass(called, SignRoundConfig):
        parameters = parameters | inspect.signature(SignRoundConfig).parameters
    elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for keyword in node.keywords:
        name = ast.unparse(node.func)
        assert keyword.arg is None or keyword.arg in parameters, (
            f"{where}: {name} has no argument {keyword.arg}"
        )


def commands(code):
    """The commands of a shell block, as words; comments are left out."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words, where):
    """Parse a command as its program would."""
    program, *arguments = words
    if program == "vsraq":
        parsed = _parse(arguments)
        config = getattr(parsed, "config", None)
        if config is not None and config.parts[0] in ("configs", "examples"):
            load_recipe(ROOT / config, parsed.overrides)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets), where
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), where
    else:
        assert (program, arguments[0]) == ("pip", "install"), f"{where}: {program}"
        for wanted in arguments[1:]:
            name, extras = re.fullmatch(r"([\w.]+)(?:\[([\w,]+)\])?", wanted).groups()
            assert name in (".", "vsraq"), where
            known = re.findall(r"^(\w+) = \[", EXTRAS, re.M)
            assert not extras or set(extras.split(",")) <= set(known), where


EXTRAS = (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2]
EXTRAS = EXTRAS.partition("\n[")[0]
