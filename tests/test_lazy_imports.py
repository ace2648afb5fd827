# SPDX-License-Identifier: Apache-2.0
"""What is imported when: light modules need no AutoRound; it is registered anyway."""

import subprocess
import sys

import pytest

import vsraq

LIGHT = (
    "vsraq, vsraq.losses, vsraq.loss_modules, vsraq.metrics, vsraq.objectives, "
    "vsraq.ranks, vsraq.routers, vsraq.cli"
)


def words_of(code):
    """The words that a fresh interpreter prints last."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.rpartition("words:")[2].split()


def test_light_modules_import_neither_autoround_nor_transformers():
    modules = words_of(f"import sys, {LIGHT}; print('words:', *sys.modules)")
    assert "vsraq.ranks" in modules
    assert not {"auto_round", "transformers"} & set(modules)


def test_light_commands_do_not_even_import_torch():
    modules = words_of(
        "import sys\nfrom vsraq.cli import main\n"
        "for arguments in (['families'], ['--help'], ['verify', '--help']):\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "print('words:', *sys.modules)"
    )
    assert "vsraq.cli" in modules
    assert not {"auto_round", "transformers", "torch"} & set(modules)


@pytest.mark.parametrize("first", ["vsraq", "vsraq.autoround"])
def test_the_algorithm_is_registered_though_vsraq_comes_first(first):
    words = words_of(
        f"import {first}\nimport auto_round\n"
        "from auto_round.algorithms.registry import list_registered_algorithms\n"
        "print('words:', *list_registered_algorithms())"
    )
    assert "vsraq" in words


def test_every_name_is_there():
    for name in vsraq.__all__:
        assert getattr(vsraq, name) is not None
        assert name in dir(vsraq)
    with pytest.raises(AttributeError, match="no attribute 'VSRAQconfig'"):
        vsraq.VSRAQconfig  # noqa: B018
