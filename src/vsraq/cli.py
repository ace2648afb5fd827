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
from vsraq.argument_types import positive
from vsraq.compare_command import add_compare, run_compare
from vsraq.evaluate_command import add_evaluate, run_evaluate
from vsraq.recipe_commands import (
    add_recipe_commands,
    run_estimate,
    run_plan,
    run_quantize,
    run_select_tokens,
)
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
    for name in ("demo", "quantize", "compare", "replay", "evaluate"):
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
        "--iters", type=positive, help="tuning iterations per block (default: 30)"
    )

    with_recipe = add_recipe_commands(commands)
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
    evaluate, report = add_evaluate(commands), add_report(commands)
    families = commands.add_parser("families", help="what works for each MoE family")
    return [
        *(demo, *with_recipe, verify),
        *(compare, replay, evaluate, report, families),
    ]


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
        "plan": run_plan,
        "quantize": run_quantize,
        "select-tokens": run_select_tokens,
        "estimate": run_estimate,
        "verify": _verify,
        "compare": run_compare,
        "replay": run_replay,
        "evaluate": run_evaluate,
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
    # The exports are deleted, the log stays. Its name is free again here, because
    # --verbose writes none.
    with NamedTemporaryFile(prefix="vsraq-demo-", suffix=".log") as file:
        return Path(file.name)


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
