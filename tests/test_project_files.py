# SPDX-License-Identifier: Apache-2.0
"""Files of the project that agree with each other: metadata, licences, CI."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vsraq.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
MAKEFILE = (ROOT / "Makefile").read_text()
# files that can say their licence; the others have it from LICENSE
SAYING = {".py", ".toml", ".yaml", ".yml", ".cff", ".css", ".js", ".html"}
NAMED = {"Makefile", "constraints.txt", "run"}


def tracked():
    """The files that git has, or those of an unpacked sdist."""
    if not (ROOT / ".git").exists():
        hidden = (p for p in ROOT.rglob("*") if p.is_file())
        return [p for p in hidden if ".venv" not in p.parts]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_every_file_says_its_licence():
    files = [p for p in tracked() if p.suffix in SAYING or p.name in NAMED]
    assert len(files) > 200
    missing = [
        str(path.relative_to(ROOT))
        for path in files
        if "SPDX-License-Identifier: Apache-2.0"
        not in "".join(path.read_text().splitlines(True)[:2])
    ]
    assert missing == []


def targets(text):
    """The make targets of commands, which may go on in the next line."""
    lines = re.findall(r"^\s*(?:- run: )?make ([a-z -]+)$", text, re.M)
    return {target for line in lines for target in line.split()}


def test_the_workflow_runs_what_the_gate_runs():
    gate = targets((ROOT / ".ci" / "run").read_text())
    assert gate >= {"test", "lint", "test-report", "test-package"}
    workflow = parse_yaml((WORKFLOWS / "test.yml").read_text())
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert set(matrix["target"]) == gate
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"
    assert {f"Programming Language :: Python :: {v}" for v in matrix["python"]} == {
        line
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    }
    assert PROJECT["requires-python"] == f">={min(matrix['python'])}"


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda p: p.stem)
def test_a_workflow_is_one(path):
    """Its actions have a major version, its commands are targets of the Makefile."""
    workflow = parse_yaml(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    known = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])
        elif "matrix" not in step["run"]:
            assert targets(f"{step['run']}\n") <= known
            assert step["run"].startswith("make ")


def test_the_makefile_has_every_target_that_is_named():
    known = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    phony = re.search(r"\.PHONY: (.*?)\n\n", MAKEFILE, re.S)[1]
    assert set(phony.replace("\\", "").split()) == known
    said = re.findall(
        r"^    make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    assert {"test", "lint"} <= set(said) <= known


def test_the_citation_is_valid():
    """The fields that the Citation File Format 1.2.0 requires, and its types."""
    citation = parse_yaml((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"message", "title", "authors"}
    assert citation["type"] in ("software", "dataset")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    for entry in (citation, *citation["references"]):
        assert entry["title"]
        for author in entry["authors"]:
            entity, person = {"name"}, {"family-names", "given-names"}
            assert author.keys() in (entity, person)
    for reference in citation["references"]:
        assert reference["type"] == "article"
        assert isinstance(reference["year"], int)
        assert reference["url"].startswith("https://")


def test_what_make_installs_is_what_the_metadata_allow():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
    }
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"]]:
        wanted = Requirement(text)
        version = versions[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), text
    # one range for one package, wherever it is named
    ranges = {}
    for text in [*PROJECT["dependencies"], *(t for e in extras.values() for t in e)]:
        wanted = Requirement(text)
        ranges.setdefault(canonicalize_name(wanted.name), set()).add(wanted.specifier)
    assert [name for name, found in ranges.items() if len(found) > 1] == []
