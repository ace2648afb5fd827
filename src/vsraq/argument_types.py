# SPDX-License-Identifier: Apache-2.0
"""What words of a command line may be."""

import argparse
import re


def positive(text: str) -> int:
    """Read an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: allowed is an int >= 1")
    return value


def named_path(text: str) -> tuple[str, str]:
    """Read NAME=PATH as a name and a path."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is NAME=PATH")
    return name, path


def budget(text: str) -> str | int:
    """Read a budget: a number of bytes, or a share of them as it is."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text
