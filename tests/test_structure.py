# SPDX-License-Identifier: Apache-2.0
"""What CONTRIBUTING says of the structure is so."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "vsraq"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FILE, LONGEST_BODY = 400, 50


def floors():
    """Room -> row of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("| room | what it knows |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {
        room.rstrip("/"): floor
        for floor, row in enumerate(rows)
        for room in re.findall(r"`([^`]+)`", row)
    }


def room_of(path):
    return path.relative_to(SOURCE).parts[0]


def imported(path):
    """The files of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vsraq"):
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("vsraq")]
        else:
            continue
        for name in names:
            target = ROOT / "src" / Path(*name.split("."))
            for found in (target.with_suffix(".py"), target / "__init__.py"):
                if found.is_file():
                    yield found


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in FILES} == floors().keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    rows = floors()
    for found in imported(path):
        if found == SOURCE / "__init__.py":  # the package holds every room
            continue
        assert rows[room_of(found)] <= rows[room_of(path)], found.relative_to(SOURCE)


def test_no_file_and_no_function_is_long():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= LONGEST_BODY, f"{path}: {node.name}"
