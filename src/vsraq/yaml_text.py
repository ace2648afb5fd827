# SPDX-License-Identifier: Apache-2.0
"""YAML 1.2 as a recipe uses it: mappings, lists and plain values, by ruamel.yaml.

`no` and `1:30` are text, `010` is ten, `1e-3` is a number, and a key that stands twice
is an error. What a recipe does not need and what could hide something is refused:
tags, aliases, directives, several documents, deep nesting.
"""

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
)

_MOST_CHARACTERS = 2**20
_DEEPEST = 16


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def read_text(path: str | Path) -> str:
    """Read a file's text, UTF-8 whatever the locale, with or without a BOM.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, or not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; allowed is a YAML file, see configs/")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; allowed is a YAML file")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} is not UTF-8; save the file as UTF-8"
        ) from None


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: It is not YAML, or more than a recipe needs; one line, with the
            line of the text.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(
            f"not YAML of a recipe: {len(text)} characters; allowed are "
            f"{_MOST_CHARACTERS}"
        )
    try:
        _refuse_events(text)
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ValueError(f"not YAML: {where}{problem}") from None
    except YAMLError as error:  # characters that YAML does not allow
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, OverflowError) as error:  # 2001-99-99, or an int of 5000 digits
        problem = str(error).removeprefix("not YAML: ")
        raise ValueError(f"not YAML: {' '.join(problem.split())}") from None


def write_yaml(values: Any) -> str:
    """Write YAML that `parse_yaml` reads as the same values."""
    stream = StringIO()
    _yaml().dump(values, stream)
    return stream.getvalue()


def _refuse_events(text: str) -> None:
    depth = 0
    for event in _yaml().parse(text):
        line = f"line {event.start_mark.line + 1}"
        depth += isinstance(event, CollectionStartEvent)
        depth -= isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"{line}: nested deeper than {_DEEPEST} levels")
        if getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, AliasEvent) else "&"
            raise ValueError(
                f"{line}: {sign}{event.anchor}: an alias; write the value out"
            )
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            raise ValueError(f"{line}: a directive (%...); a recipe is YAML 1.2")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{line}: a tag (!...); allowed are plain values")
