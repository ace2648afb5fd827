# SPDX-License-Identifier: Apache-2.0
"""`vsraq report`: its options, and what it does."""

import argparse
from pathlib import Path
from typing import Any


def add_report(commands: Any) -> argparse.ArgumentParser:
    """Add the command to what `add_subparsers` returned.

    Args:
        commands: See above.
    """
    report: argparse.ArgumentParser = commands.add_parser(
        "report", help="show comparisons and exports as one HTML file"
    )
    report.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="a folder of `vsraq compare`, or an export",
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="HTML",
        help="the file (default: report.html in the first folder)",
    )
    report.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="write each figure into this folder, too, as PNG and SVG",
    )
    return report


def run_report(arguments: argparse.Namespace) -> int:
    """Write the report, and the figures if they are wanted.

    Args:
        arguments: As parsed.

    Returns:
        The exit status.
    """
    from vsraq.report import write_figures, write_report

    print(f"written to {write_report(arguments.folders, arguments.out)}")
    if arguments.figures is not None:
        written = write_figures(arguments.folders, arguments.figures)
        print(f"{len(written)} figures written to {arguments.figures}")
    return 0
