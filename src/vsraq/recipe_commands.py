# SPDX-License-Identifier: Apache-2.0
"""The commands of a recipe: `vsraq quantize | plan | select-tokens | estimate`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vsraq.argument_types import budget, positive


def add_recipe_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add these commands to what `add_subparsers` returned."""
    quantize = commands.add_parser("quantize", help="run a recipe")
    select = commands.add_parser(
        "select-tokens", help="write the token mask of a recipe without tuning"
    )
    plan = commands.add_parser(
        "plan", help="choose the bits of a recipe's layers without tuning"
    )
    _add_plan_options(plan)
    estimate = commands.add_parser(
        "estimate", help="memory, disk and time of a recipe, from the model's config"
    )
    _add_throughput(estimate)
    for command in (quantize, select, plan, estimate):
        _add_recipe(command, runs=command is not estimate)
    return [plan, quantize, select, estimate]


def _add_recipe(command: argparse.ArgumentParser, *, runs: bool) -> None:
    """Add a recipe's file and overrides, and how not to run it."""
    command.add_argument("config", type=Path, help="a YAML file, see configs/")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as algorithm.router_weight=0.1",
    )
    if runs:
        command.add_argument(
            "--dry-run",
            "--check-only",  # its first name
            action="store_true",
            help="check the recipe, the model's config, the disk and the samples, "
            "print the plan of the run, load no weight, and stop",
        )


def _add_throughput(estimate: argparse.ArgumentParser) -> None:
    """Add what the time of `vsraq estimate` supposes of the device."""
    estimate.add_argument(
        "--operations",
        type=float,
        metavar="PER_SECOND",
        help="what the device reaches in matrix products (default: 1e14)",
    )
    estimate.add_argument(
        "--bandwidth",
        type=float,
        metavar="BYTES_PER_SECOND",
        help="what its memory reaches (default: 4.8e11)",
    )


def _add_plan_options(plan: argparse.ArgumentParser) -> None:
    """Add the options of `vsraq plan`; those that are left out are the recipe's."""
    plan.add_argument(
        "--out", type=Path, required=True, help="the plan, a JSON file", metavar="JSON"
    )
    plan.add_argument(
        "--figure",
        type=Path,
        help="a .png or .svg file (default: a .png beside the plan, if matplotlib is "
        "installed)",
    )
    plan.add_argument(
        "--budget",
        type=budget,
        help="bytes more than with one scheme: 3%%, --budget=-1%%, or a number "
        "(default: 0%%)",
    )
    plan.add_argument(
        "--active-budget",
        type=budget,
        help="the same for what a token reads (default: any)",
    )
    plan.add_argument(
        "--engine",
        choices=("vllm", "sglang", "transformers", "none"),
        help="what has to load the export (default: vllm)",
    )
    plan.add_argument(
        "--metric", choices=("kl", "routing"), help="what to make small (default: kl)"
    )
    plan.add_argument(
        "--options",
        type=lambda text: text.split(","),
        metavar="SCHEME,...",
        help="schemes to choose from, such as W3A16,W8A16 (default: by the engine)",
    )
    plan.add_argument(
        "--tokens", type=positive, help="tokens to measure with (default: 4096)"
    )
    plan.add_argument(
        "--lm-head",
        action="store_true",
        default=None,
        help="let the output projection have fewer bits, too",
    )


def run_quantize(arguments: argparse.Namespace) -> int:
    """Run a recipe, verify its exports, and return the exit status."""
    from vsraq.checkpoint import verify
    from vsraq.console import run_console
    from vsraq.recipe import load_recipe, run

    recipe = load_recipe(arguments.config, arguments.overrides)
    if not _check(recipe, arguments):
        return 0
    log = Path(recipe.output) / "vsraq_quantize.log"
    bars = not arguments.verbose or sys.stderr.isatty()
    with run_console(log, verbose=arguments.verbose) as console:
        console.phase(recipe.scheme)
        for path in run(recipe, progress=bars, callbacks=console.callbacks):
            console.say(f"exported to {path}")
            console.phase("verifying")
            remote = bool(recipe.runtime.get("trust_remote_code", False))
            found = verify(path, recipe.model, trust_remote_code=remote, progress=bars)
            console.say(f"verified: {found}")
    return 0


def _check(recipe: Any, arguments: argparse.Namespace) -> bool:
    """Check a recipe, say so, and return whether the run is to begin."""
    from vsraq.recipe import check, describe_run, inspect

    found = inspect(recipe)
    print(f"checked: {check(recipe, found)}")
    if arguments.dry_run:
        print(describe_run(found))
    return not arguments.dry_run


def run_plan(arguments: argparse.Namespace) -> int:
    """Choose the bits of a recipe's layers, and return the exit status."""
    from importlib.util import find_spec

    from vsraq.bits.figure import check_figure
    from vsraq.recipe import check_file, load_recipe, make_plan, with_bits

    check_file(arguments.out, "--out")
    figure = arguments.figure
    if figure is not None:
        check_figure(figure)
    elif find_spec("matplotlib") is not None:
        figure = arguments.out.with_suffix(".png")
    if figure is not None:
        check_file(figure, "--figure")
        if figure.absolute() == arguments.out.absolute():
            raise ValueError(
                f"--out={str(arguments.out)!r}: the figure has that name; allowed are "
                "two names, such as --out plan.json"
            )
    names = ("budget", "active_budget", "engine", "metric", "options", "tokens")
    given = {n: getattr(arguments, n) for n in (*names, "lm_head")}
    recipe = with_bits(
        load_recipe(arguments.config, arguments.overrides),
        {n: v for n, v in given.items() if v is not None},
    )
    if not _check(recipe, arguments):
        return 0
    plan = make_plan(recipe, progress=sys.stderr.isatty())
    print(plan)
    for path, write in ((arguments.out, plan.save), (figure, plan.plot)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            print(f"written to {path}")
    return 0


def run_select_tokens(arguments: argparse.Namespace) -> int:
    """Write the token mask of a recipe, and return the exit status."""
    from vsraq.recipe import (
        load_recipe,
        mask_path,
        refuse_without_token_selection,
        select_tokens,
    )

    recipe = load_recipe(arguments.config, arguments.overrides)
    refuse_without_token_selection(recipe)
    if not _check(recipe, arguments):
        return 0
    print(select_tokens(recipe))
    print(f"written to {mask_path(recipe)}")
    return 0


def run_estimate(arguments: argparse.Namespace) -> int:
    """Print what a recipe takes, and return the exit status."""
    from vsraq.recipe import estimate, inspect, load_recipe

    given = {
        "operations_per_second": arguments.operations,
        "bytes_per_second": arguments.bandwidth,
    }
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: allowed is a finite number > 0")
    found = inspect(load_recipe(arguments.config, arguments.overrides))
    print(estimate(found, **{n: v for n, v in given.items() if v is not None}))
    return 0
