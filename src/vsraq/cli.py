# SPDX-License-Identifier: Apache-2.0
"""The command line: `vsraq demo | quantize | select-tokens | verify | families`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vsraq import __version__


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: allowed is an int >= 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vsraq",
        description="Router-aligned quantization of mixture-of-experts models.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="quantize the embedded MoE with and without router alignment"
    )
    demo.add_argument(
        "--output", type=Path, help="keep the exports in this folder (default: drop)"
    )
    demo.add_argument(
        "--iters", type=_positive, help="tuning iterations per block (default: 50)"
    )

    quantize = commands.add_parser("quantize", help="run a recipe")
    select = commands.add_parser(
        "select-tokens", help="write the token mask of a recipe, tune nothing"
    )
    for command in (quantize, select):
        command.add_argument("config", type=Path, help="a YAML file, see configs/")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="such as algorithm.router_weight=0.1",
        )

    verify = commands.add_parser("verify", help="check an export tensor by tensor")
    verify.add_argument("path", type=Path, help="folder of the export")
    verify.add_argument(
        "--reference",
        required=True,
        help="its full-precision checkpoint: a folder, or a model id of the hub",
    )
    commands.add_parser("families", help="what works for each MoE family")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit status: 0, or 1 when the input or an export is at fault.
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "demo":
            return _demo(arguments)
        if arguments.command == "quantize":
            return _quantize(arguments)
        if arguments.command == "select-tokens":
            return _select_tokens(arguments)
        if arguments.command == "verify":
            return _verify(arguments)
        return _families()
    except (ValueError, FileNotFoundError) as error:
        print(f"vsraq: error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace) -> int:
    from vsraq.demo.run import ITERS, run_demo

    iters = ITERS if arguments.iters is None else arguments.iters
    print(run_demo(arguments.output, iters=iters))
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    from vsraq.checkpoint import verify
    from vsraq.recipe import load_recipe, run

    recipe = load_recipe(arguments.config, arguments.overrides)
    for path in run(recipe):
        print(f"exported to {path}")
        remote = bool(recipe.runtime.get("trust_remote_code", False))
        print(f"verified: {verify(path, recipe.model, trust_remote_code=remote)}")
    return 0


def _select_tokens(arguments: argparse.Namespace) -> int:
    from vsraq.recipe import load_recipe, mask_path, select_tokens

    recipe = load_recipe(arguments.config, arguments.overrides)
    print(select_tokens(recipe))
    print(f"written to {mask_path(recipe)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from vsraq.checkpoint import verify

    print(verify(arguments.path, arguments.reference))
    return 0


def _families() -> int:
    table = resources.files("vsraq").joinpath("families.md")
    print(table.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
