# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: what is in them, and the wheel at work on its own.

The code under test is the wheel's: each process runs away from the checkout, in an
environment whose only other packages are those that the wheel's metadata asks for.
"""

import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clean_environments import Environment, closure, interpreter, link, run

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = [
    line.rpartition(" ")[2]
    for line in PROJECT["classifiers"]
    if line.startswith("Programming Language :: Python :: 3.")
]
TABLE = "vsraq/families.md"
DATA = {  # what the package needs beside its modules
    "py.typed",
    "families.md",
    "demo/README.md",
    "demo/model/config.json",
    "demo/model/generation_config.json",
    "demo/model/model.safetensors",
    "demo/model/tokenizer.json",
    "demo/model/tokenizer_config.json",
    "report/template/report.html",
    "report/template/script.js",
    "report/template/style.css",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel of this checkout."""
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", target, folder=ROOT)
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return sdist, wheel


def contents(wheel):
    """Name -> bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(built):
    found = contents(built[1])
    (name,) = (n for n in found if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(found[name])


@pytest.fixture(scope="module")
def clean(built, metadata, tmp_path_factory):
    """An environment with the wheel and its base requirements."""
    environment = Environment(tmp_path_factory.mktemp("clean") / "venv")
    wanted = map(Requirement, metadata.get_all("Requires-Dist"))
    link(closure(wanted).values(), environment.site)
    environment.install(built[1])
    return environment


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(contents(built[1]))
    package = ROOT / "src" / "vsraq"
    there = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there >= DATA
    info = f"vsraq-{PROJECT['version']}.dist-info"
    assert names == {
        *(f"vsraq/{name}" for name in there),
        *(f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")),
        f"{info}/licenses/LICENSE",
    }
    assert built[1].stat().st_size <= 10e6
    assert built[1].name.endswith("-py3-none-any.whl")


def test_the_sdist_has_what_git_has(built):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout to compare with")
    with tarfile.open(built[0]) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    kept = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = {name for name in kept.stdout.splitlines() if (ROOT / name).is_file()}
    assert names == {*files, "PKG-INFO"}


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist")
    run(*command, folder=source)
    (again,) = (source / "dist").glob("*.whl")
    assert contents(again) == contents(built[1])


def normal(text):
    """A requirement as one that says the same."""
    requirement = Requirement(text)
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement)


def test_the_metadata_are_those_of_the_project(metadata):
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    assert extras.keys() >= {"report", "tensorboard", "wandb", "dev"}
    wanted = {normal(text) for text in PROJECT["dependencies"]}
    for extra, texts in extras.items():
        wanted |= {normal(f"{text} ; extra == {extra!r}") for text in texts}
    assert {normal(text) for text in metadata.get_all("Requires-Dist")} == wanted


def test_it_is_what_is_installed(clean):
    code = "import vsraq, sys; print(vsraq.__file__, vsraq.__version__)"
    file, version = clean.run("python", "-c", code).split()
    assert file == str(clean.site / "vsraq" / "__init__.py")
    assert version == clean.run("vsraq", "--version").strip() == PROJECT["version"]
    helped = clean.run("vsraq", "--help")
    assert "quantize" in helped
    assert clean.run("vsraq", "families") == (clean.site / TABLE).read_text()


def test_the_base_install_quantizes_and_has_no_extra(clean, metadata, tmp_path):
    """Recipe, export and verification, without the packages of any extra."""
    base = set(closure(map(Requirement, metadata.get_all("Requires-Dist"))))
    extras = {
        canonicalize_name(Requirement(text).name)
        for texts in PROJECT["optional-dependencies"].values()
        for text in texts
    }
    own = {canonicalize_name(Requirement(t).name) for t in PROJECT["dependencies"]}
    assert extras & (base - own) == {"jinja2"}  # for which torch asks
    for name in ("matplotlib", "tensorboard", "wandb", "lm_eval", "pytest"):
        code = f"import importlib.util as u; print(u.find_spec({name!r}))"
        assert clean.run("python", "-c", code).strip() == "None", name
    model = clean.site / "vsraq" / "demo" / "model"
    text = tmp_path / "text.jsonl"
    words = "Experts are chosen by a router, and tokens go to those it chose. " * 40
    rows = [json.dumps({"text": f"{i} {words}"}) for i in range(8)]
    text.write_text("\n".join(rows))
    recipe = {
        "model": str(model),
        "scheme": "W4A16",
        "output": str(tmp_path / "out"),
        "algorithm": {"iters": 1, "group_size": 32},
        "calibration": {
            "dataset": str(text),
            "nsamples": 4,
            "seqlen": 32,
            "batch_size": 4,
        },
        "runtime": {"device_map": "cpu", "enable_torch_compile": False},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    printed = clean.run("vsraq", "quantize", tmp_path / "recipe.yaml")
    assert "verified: Verification(kind=" in printed
    assert list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("version", VERSIONS)
def test_it_installs_on_each_python(version, built, tmp_path):
    """And its command starts; torch need not be there for that."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    environment = Environment(tmp_path / "venv", python)
    environment.install(built[1])
    # the one package that `import vsraq` imports; it works without its C code
    link(closure([Requirement("wrapt")]).values(), environment.site)
    package = environment.site / "vsraq"
    environment.run("python", "-m", "compileall", "-q", package)
    assert environment.run("vsraq", "--version").strip() == PROJECT["version"]
    assert "quantize" in environment.run("vsraq", "--help")
    assert environment.run("vsraq", "families") == (environment.site / TABLE).read_text(
        encoding="utf-8"
    )


def test_an_older_python_is_refused(built, tmp_path):
    python = interpreter("3.10")
    if python is None:
        pytest.skip("no Python 3.10 on this machine")
    environment = Environment(tmp_path / "venv", python)
    assert "requires a different Python" in environment.install(built[1], fails=True)
