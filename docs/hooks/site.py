# SPDX-License-Identifier: Apache-2.0
"""What the site has besides docs/: pages of other folders, recipes, and the API.

Pages that lie elsewhere are shown, not copied. The pages of the API are made from the
public names of each module; nothing is imported, so no torch is needed.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"

# page of the site -> file of the repository
SHOWN = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "demo_model.md": "src/vsraq/demo/README.md",
    "families.md": "src/vsraq/families.md",
}

MODULES = {
    "vsraq": "what most users need; all of it is `import vsraq`",
    "vsraq.losses": "losses of router logits, per token",
    "vsraq.loss_modules": "the same as modules",
    "vsraq.metrics": "metrics of routing and of outputs",
    "vsraq.callbacks": "what hears of a run",
    "vsraq.calibration": "calibration samples",
    "vsraq.routers": "routers: found, and what they compute",
    "vsraq.tokens": "selected tokens",
    "vsraq.realignment": "the re-fit of routers",
    "vsraq.bits": "bit plans",
    "vsraq.analysis": "models compared",
    "vsraq.evaluation": "models on the papers' tasks",
    "vsraq.checkpoint": "exports, read and verified",
    "vsraq.checkpoint.formats.format": "what an export format is",
    "vsraq.recipe": "recipes, and runs of them",
    "vsraq.run_record.file": "what a run has written down",
    "vsraq.report": "the report",
    "vsraq.demo": "the embedded model",
}


def page_of(module: str) -> str:
    """Return the API page of a module."""
    return f"api/{module.removeprefix('vsraq.')}.md"


def _file_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(module: str) -> list[str]:
    """List the public names of a module: `__all__`, or what it defines itself."""
    tree = ast.parse(_file_of(module).read_text(encoding="utf-8"))
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def _imports(module: str) -> dict[str, str]:
    """Map the names that a module imports from this package to their full names."""
    tree = ast.parse(_file_of(module).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vsraq")
        for alias in node.names
    }


def defined_at(name: str) -> str:
    """Return the full name of an object where it is defined."""
    module, _, attribute = name.rpartition(".")
    found = _imports(module).get(attribute)
    return name if found is None else defined_at(found)


def _api_page(module: str, documented: dict[str, str]) -> str:
    """Write the page of a module; `documented` says what earlier pages have."""
    tree = ast.parse(_file_of(module).read_text(encoding="utf-8"))
    lines = [f"# {module}", "", ast.get_docstring(tree) or "", ""]
    for name in public_names(module):
        full = f"{module}.{name}"
        if name.startswith("__"):  # __version__
            continue
        place = defined_at(full)
        if place in documented:
            heading = f"## {name} {{ #{full} }}"
            lines += [heading, "", f"See [`{documented[place]}`][].", ""]
            continue
        documented[place] = full
        lines += [f"::: {full}", ""]
    return "\n".join(lines)


def _api_index() -> str:
    rows = [
        f"| [`{module}`]({posixpath.basename(page_of(module))}) | {what} |"
        for module, what in MODULES.items()
    ]
    return "\n".join(
        [
            "# API",
            "",
            "Public are the names on these pages. Everything else may change without",
            "notice. Shapes, units, errors and sources stand with each name.",
            "",
            "| module | what it has |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of docs/ (a hook of MkDocs)."""
    for page, path in SHOWN.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path in sorted(ROOT.glob("configs/*.yaml")):
        source = str(path)
        files.append(
            File.generated(config, f"configs/{path.name}", abs_src_path=source)
        )
    files.append(File.generated(config, "api/index.md", content=_api_index()))
    documented: dict[str, str] = {}
    for module in MODULES:
        content = _api_page(module, documented)
        files.append(File.generated(config, page_of(module), content=content))
    return files


def _place_of(path: str) -> str:
    """Return where the site has a file of the repository."""
    places = {file: page for page, file in SHOWN.items()}
    places |= {
        str(_file_of(module).relative_to(ROOT)): page_of(module) for module in MODULES
    }
    return places.get(path, path.removeprefix("docs/"))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links of the site."""
    here = SHOWN.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def translated(link: re.Match[str]) -> str:
        path, hash_, anchor = link[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        start = posixpath.dirname(page.file.src_uri) or "."
        place = posixpath.relpath(_place_of(target), start)
        return f"]({place}{hash_}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|[#/])([^)\s]+)\)", translated, markdown)
