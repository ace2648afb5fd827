# SPDX-License-Identifier: Apache-2.0
"""English text that every CPython carries, split by document.

The demo needs text on a machine without a network. The language reference
(`pydoc_data.topics`) and the docstrings of the standard library are read from the
running interpreter; nothing of it is stored in this package.

A document is one help topic, or all docstrings below one top-level module. The
split follows a hash of the document's name, so it is the same for every Python
version and a module is never in two splits. A paragraph that occurred before (in
the order train, calibration, held-out) is dropped, so no paragraph is in two splits
of one Python version.
"""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "calibration", "heldout"]

# Tests and bundled tools carry little prose; site-packages is not the interpreter's.
_SKIPPED_FOLDERS = frozenset(
    "test tests site-packages dist-packages lib-dynload __pycache__".split()
)
_MIN_PARAGRAPH = 40  # characters; shorter ones are headings and signatures


def split_of(name: str) -> Split:
    """Return the split that the document `name` belongs to (80 / 8 / 12 %)."""
    percent = zlib.crc32(name.encode()) % 100
    if percent < 80:
        return "train"
    return "calibration" if percent < 88 else "heldout"


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic:{name}", text


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # lib2to3 and friends keep Python 2 files as data
            continue
        # _pydecimal and decimal, _pyio and io: one document.
        document = relative.parts[0].removesuffix(".py").removeprefix("_py").strip("_")
        for node in ast.walk(tree):
            if isinstance(
                node,
                ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
            ):
                text = ast.get_docstring(node)
                if text:
                    yield f"module:{document}", text


@cache
def _splits() -> dict[Split, tuple[str, ...]]:
    texts: dict[Split, dict[str, list[str]]] = {s: {} for s in get_args(Split)}
    for name, text in (*_topics(), *_docstrings()):
        texts[split_of(name)].setdefault(name, []).extend(text.split("\n\n"))
    seen: set[str] = set()
    splits: dict[Split, tuple[str, ...]] = {}
    for split, documents in texts.items():
        unique = []
        for paragraphs in documents.values():
            fresh = []
            for paragraph in paragraphs:
                key = " ".join(paragraph.split())
                if len(key) >= _MIN_PARAGRAPH and key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            if fresh:
                unique.append("\n\n".join(fresh))
        splits[split] = tuple(unique)
    return splits


def documents(split: Split) -> tuple[str, ...]:
    """Return all documents of one split, in a fixed order.

    Args:
        split: `"train"`, `"calibration"` or `"heldout"`.

    Returns:
        One string per document.

    Raises:
        ValueError: `split` is none of the three.
    """
    if split not in get_args(Split):
        raise ValueError(f"split={split!r}: allowed are {', '.join(get_args(Split))}")
    return _splits()[split]
