# SPDX-License-Identifier: Apache-2.0
"""The command line: `vsraq demo | plan | quantize | verify | compare | ...`."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from vsraq import __version__
from vsraq.compare_command import add_compare, run_compare
from vsraq.replay_command import add_replay, run_replay
from vsraq.report_command import add_report, run_report

_EXIT_CODES = """exit status:
  0    fine
  1    the input is at fault, or the library or AutoRound refuses it; also an unexpected
       error, and the message says so
  2    the command line is wrong
  3    verify (or the verification after quantize) found a fault in an export
  130  interrupted
"""
_INPUT, _FAULT_FOUND, _INTERRUPTED = 1, 3, 130


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: allowed is an int >= 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vsraq",
        description="Router-aligned quantization of mixture-of-experts models.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    with_debug = [parser, *_add_commands(commands)]
    for name in ("demo", "quantize"):
        commands.choices[name].add_argument(
            "--verbose", action="store_true", help="show the log instead of one line"
        )
    for command in with_debug:
        command.add_argument(
            "--debug",
            action="store_true",
            default=False if command is parser else argparse.SUPPRESS,
            help="show the traceback of an error",
        )
    return parser


def _add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add every command to what `add_subparsers` returned."""
    demo = commands.add_parser(
        "demo", help="quantize the embedded MoE with and without router alignment"
    )
    demo.add_argument(
        "--output", type=Path, help="keep the exports in this folder (default: delete)"
    )
    demo.add_argument(
        "--iters", type=_positive, help="tuning iterations per block (default: 30)"
    )

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

    verify = commands.add_parser("verify", help="check an export tensor by tensor")
    verify.add_argument("path", type=Path, help="folder of the export")
    verify.add_argument(
        "--reference",
        required=True,
        help="its full-precision checkpoint: a folder, or a model id of the hub",
    )
    verify.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with the reference",
    )
    compare, replay = add_compare(commands), add_replay(commands)
    report = add_report(commands)
    families = commands.add_parser("families", help="what works for each MoE family")
    return [
        *(demo, plan, quantize, select, estimate),
        *(verify, compare, replay, report, families),
    ]


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
        help="bytes more than with one scheme: 3%%, --budget=-1%%, or a number "
        "(default: 0%%)",
    )
    plan.add_argument(
        "--active-budget", help="the same for what a token reads (default: any)"
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
        "--tokens", type=_positive, help="tokens to measure with (default: 4096)"
    )
    plan.add_argument(
        "--lm-head",
        action="store_true",
        default=None,
        help="let the output projection have fewer bits, too",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit status: 0 fine, 1 the input is at fault or refused (or an unexpected
        error), 3 an export is at fault, 130 interrupted. A wrong command
        line exits with 2.
    """
    arguments = _parse(argv)
    run = {
        "demo": _demo,
        "plan": _plan,
        "quantize": _quantize,
        "select-tokens": _select_tokens,
        "estimate": _estimate,
        "verify": _verify,
        "compare": run_compare,
        "replay": run_replay,
        "report": run_report,
        "families": _families,
    }[arguments.command]
    try:
        return run(arguments)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if arguments.debug:
            traceback.print_exc()
        status, message = _explain(error)
        notes = getattr(error, "__notes__", ())
        print(f"vsraq: error: {message}", *notes, sep="\n", file=sys.stderr)
        return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; key=value may stand behind options, too."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    keys = [word for word in rest if "=" in word and not word.startswith("-")]
    if keys != rest or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit status of an error, and its message."""
    from vsraq.checkpoint import CheckpointError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit):  # AutoRound logs an error and leaves
        return _INPUT, (
            f"AutoRound ended the run (exit status {error.code}); the last message of "
            "its log says why"
        )
    if isinstance(error, CheckpointError):
        return _FAULT_FOUND, str(error)  # a line, and one per fault
    if isinstance(error, ValueError | OSError | NotImplementedError):
        return _INPUT, text
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        return _INPUT, text
    return _INPUT, (
        f"unexpected {type(error).__name__}: {text}; run it again with --debug, and "
        "report the traceback"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from vsraq.console import run_console
    from vsraq.demo.run import ITERS, run_demo

    iters = ITERS if arguments.iters is None else arguments.iters
    log = _demo_log(arguments.output)
    with run_console(log, verbose=arguments.verbose) as console:
        report = log.with_suffix(".html")
        found = run_demo(arguments.output, iters=iters, report=report, console=console)
        console.say(found)
    return 0


def _demo_log(output: Path | None) -> Path:
    if output is not None:
        return output / "vsraq_demo.log"
    # the exports are deleted, the log stays
    with NamedTemporaryFile(prefix="vsraq-demo-", suffix=".log", delete=False) as file:
        return Path(file.name)


def _quantize(arguments: argparse.Namespace) -> int:
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


def _plan(arguments: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from vsraq.bits.figure import check_figure
    from vsraq.recipe import check_file, load_recipe, make_plan, with_bits

    figure = arguments.figure
    if figure is not None:
        check_figure(figure)
    elif find_spec("matplotlib") is not None:
        figure = arguments.out.with_suffix(".png")
    for name, path in (("--out", arguments.out), ("--figure", figure)):
        if path is not None:
            check_file(path, name)
    names = ("budget", "active_budget", "engine", "metric", "options", "tokens")
    given = {n: getattr(arguments, n) for n in (*names, "lm_head")}
    if str(given["budget"] or "").lstrip("+-").isdecimal():
        given["budget"] = int(given["budget"])
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


def _select_tokens(arguments: argparse.Namespace) -> int:
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


def _estimate(arguments: argparse.Namespace) -> int:
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


def _verify(arguments: argparse.Namespace) -> int:
    from vsraq.checkpoint import verify

    remote = arguments.trust_remote_code
    found = verify(
        arguments.path,
        arguments.reference,
        trust_remote_code=remote,
        progress=sys.stderr.isatty(),
    )
    print(found)
    return 0


def _families(arguments: argparse.Namespace) -> int:
    table = resources.files("vsraq").joinpath("families.md")
    print(table.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
