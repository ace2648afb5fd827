# SPDX-License-Identifier: Apache-2.0
"""The command `vsraq replay`: its arguments, and its run."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vsraq.compare_command import add_run_options, analysis_console, run_options


def add_replay(commands: Any) -> argparse.ArgumentParser:
    """Add the command to what `add_subparsers` returned."""
    replay: argparse.ArgumentParser = commands.add_parser(
        "replay", help="measure what the full-precision routing would be worth"
    )
    add = replay.add_argument
    add(
        "fp_model", metavar="FP", help="the full-precision model: a folder, or its name"
    )
    add("q_model", metavar="QUANTIZED", help="the folder of an export")
    add(
        "--region",
        choices=("A", "B", "C", "D", "all"),
        default="B",
        help="which tokens get the full-precision routing (default: B, those whose "
        "routing and output have changed)",
    )
    add("--name", help="of the export, in tables (default: that of its folder)")
    add_run_options(replay)
    return replay


def run_replay(arguments: argparse.Namespace) -> int:
    """Measure the replay, print its figures, and return the exit status."""
    from vsraq.analysis import measure_replay

    options = run_options(arguments)
    log = arguments.out / "vsraq_replay.log"
    with analysis_console(log, "replaying", verbose=arguments.verbose) as console:
        found = measure_replay(
            arguments.fp_model,
            arguments.q_model,
            arguments.data,
            arguments.region,
            arguments.out,
            name=arguments.name or Path(arguments.q_model).resolve().name,
            progress=not arguments.verbose or sys.stderr.isatty(),
            **options,
        )
        console.say(str(found))
    print(f"written to {arguments.out / 'replay.json'}")
    return 0
