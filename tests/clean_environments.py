# SPDX-License-Identifier: Apache-2.0
"""Environments that have a wheel, and what its metadata asks for; no network."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST", "COV"))
} | {
    "HF_HUB_OFFLINE": "1",
    # the embedded model has 16 bits, which not every CPU can stream
    "AR_DISABLE_META_LOAD": "1",
}


def run(*command, folder, fails=False):
    """Run a command away from the checkout; its output comes back."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=CLEAN,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert bool(done.returncode) == fails, output[-3000:]
    return done.stdout if not fails else output


def asks_for(requirement, extras=()):
    """Whether a requirement is one of this Python, with these extras."""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))


def closure(requirements):
    """Name -> distribution, of these requirements and of what they ask for."""
    found, waiting = {}, [(r, ()) for r in requirements]
    seen = set()
    while waiting:
        requirement, extras = waiting.pop()
        if not asks_for(requirement, extras):
            continue
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            raise AssertionError(f"{requirement} is not installed") from None
        below = (Requirement(text) for text in found[name].requires or ())
        waiting += [(r, tuple(requirement.extras)) for r in below]
    return found


def link(distributions, site):
    """Put distributions into an environment as links to where they are."""
    for dist in distributions:
        assert dist.files, f"{dist.name} has no list of its files"
        for top in {file.parts[0] for file in dist.files}:
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(dist.locate_file(top)).resolve())


class Environment:
    """A virtual environment without pip."""

    def __init__(self, folder, python=sys.executable):
        run(python, "-m", "venv", "--without-pip", folder, folder=folder.parent)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def install(self, wheel, **how):
        """Install a wheel alone, with this test's pip."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install")
        options = ("-q", "--disable-pip-version-check", "--no-deps", "--no-index")
        return run(*pip, *options, wheel, folder=self.site, **how)

    def run(self, *command, **how):
        """Run a program of the environment, in a folder of its own."""
        program, *arguments = command
        return run(self.bin / program, *arguments, folder=self.bin.parent, **how)


def interpreter(version):
    """The path of a Python of this version, or None."""
    name = f"python{version}"
    roots = (Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser(),)
    candidates = [
        shutil.which(name),
        *(p for root in roots for p in root.glob(f"versions/{version}.*/bin/python")),
    ]
    for path in candidates:
        ask = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        if path is None:
            continue
        # what pyenv puts on the PATH may stand for a version that is not chosen
        done = subprocess.run(
            [str(path), "-c", ask],
            env=CLEAN,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.stdout.strip() == version:
            return str(path)
    return None
