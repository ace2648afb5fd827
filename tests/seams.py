# SPDX-License-Identifier: Apache-2.0
"""What the contract test pins of AutoRound, and what the source touches of it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRACT = ROOT / "tests" / "test_autoround_contract.py"
FOLDERS = ("autoround", "recipe", "realignment", "resume")
# names of objects of AutoRound, as this project writes them
OBJECTS = ("composer", "composed", "context", "module", "offloader", "orchestrator")
OBJECTS += ("quantizer", "run", "runner")


def imported(tree):
    """Names that a file imports from AutoRound."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("auto_r")
        for alias in node.names
    }


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def pinned():
    """Names in the contract test: imported, read from these, or private in a text."""
    tree = ast.parse(CONTRACT.read_text())
    names = imported(tree)
    found = set(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in names | set(OBJECTS) - {"run"}:  # a text there
                found.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"(?<!\w)_[a-z]\w+", node.value))
    return {name for name in found if not name.startswith("__")}


def touched():
    """Private names of AutoRound in the source: imported, overridden or read."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / "src" / "vsraq" / folder).glob("*.py"):
            text = path.read_text()
            found |= set(filter(is_private, imported(ast.parse(text))))
            objects = "|".join(OBJECTS)
            pattern = rf"(?:\b(?:{objects}|\w+_context)|super\([^)]*\))\.(_[a-z]\w*)"
            found |= set(re.findall(pattern, text))
            found |= set(re.findall(r'getattr\(\w+, "(_[a-z]\w+)"', text))
            found |= set(re.findall(r'run_inside\(\s*\w+, "(\w+)"', text))
    return found - {"_name_or_path"}  # of transformers
