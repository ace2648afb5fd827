# SPDX-License-Identifier: Apache-2.0
"""The command `vsraq compare`: its arguments, and its run."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vsraq.argument_types import named_path


def add_compare(commands: Any) -> argparse.ArgumentParser:
    """Add the command to what `add_subparsers` returned."""
    compare: argparse.ArgumentParser = commands.add_parser(
        "compare", help="measure how far quantized models are from full precision"
    )
    add = compare.add_argument
    add(
        "fp_model", metavar="FP", help="the full-precision model: a folder, or its name"
    )
    add("q_model", metavar="QUANTIZED", nargs="?", help="the folder of an export")
    add(
        "--method",
        type=named_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another export, with a name for tables; several times",
    )
    add_run_options(compare)
    add(
        "--keep-fp-pass",
        action="store_true",
        help="leave what the full-precision pass stores in DIR/fp_pass; later "
        "comparisons of the same model and text use it",
    )
    add(
        "--fresh",
        action="store_true",
        help="run the full-precision model, whatever lies in DIR/fp_pass",
    )
    return compare


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say on what text models are run, and how."""
    add = command.add_argument
    add(
        "--data",
        required=True,
        help="a text file, PATH.jsonl:FIELD, a .safetensors or .pt file of token ids, "
        "or a data set of Hugging Face",
    )
    add("--out", type=Path, required=True, help="folder for the results", metavar="DIR")
    add("--seqlen", type=int, help="tokens of a window (default: 2048, at most)")
    add("--sequences", type=int, help="windows, spread evenly (default: all)")
    add("--batch-size", type=int, help="windows at once (default: 8)")
    add("--dtype", help="such as float32 (default: that of the checkpoint)")
    add("--device", help="such as cuda:0, or auto (default: the CPU)")
    add("--seed", type=int, help="of intervals and sampled tokens (default: 42)")
    add("--jsd-threshold", type=float, help="a high Sampled-JSD, nats (default: 0.1)")
    add("--shift-threshold", type=float, help="a high routing shift (default: 0.1)")
    add("--trust-remote-code", action="store_true", help="run code of the models")


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return those of the options that are given, as `compare` takes them."""
    from vsraq.analysis import Thresholds
    from vsraq.analysis.preparation import Settings

    given = {
        "sampled_jsd": arguments.jsd_threshold,
        "routing_shift": arguments.shift_threshold,
    }
    names = ("seqlen", "sequences", "batch_size", "dtype", "device", "seed")
    options = {n: getattr(arguments, n) for n in names}
    options = {n: v for n, v in options.items() if v is not None}
    # refuses numbers before anything is opened
    Settings(**{n: v for n, v in options.items() if n not in ("dtype", "device")})
    return {
        "thresholds": Thresholds(**{n: v for n, v in given.items() if v is not None}),
        "trust_remote_code": arguments.trust_remote_code,
        **options,
    }


class _Saying(logging.Handler):
    """Let a console say what is logged."""

    def __init__(self, console: Any) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(record.getMessage())


@contextmanager
def analysis_console(
    log: Path, phase: str, *, verbose: bool, room: str = "vsraq.analysis"
) -> Iterator[Any]:
    """Show what models do on one line, and what the analysis itself says.

    Args:
        log: Gets everything else, such as what a loader logs.
        phase: What is going on.
        verbose: Show all of it instead.
        room: Whose messages are said.
    """
    from vsraq.console import run_console

    logger = logging.getLogger(room)
    with run_console(log, verbose=verbose) as console:
        console.phase(phase)
        handler, level = _Saying(console), logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield console
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)


def run_compare(arguments: argparse.Namespace) -> int:
    """Compare the models, print a table, and return the exit status."""
    from vsraq.analysis import compare

    methods: dict[str, str] = {}
    if arguments.q_model is not None:
        methods[Path(arguments.q_model).resolve().name] = arguments.q_model
    for name, path in arguments.method:
        if name in methods:
            raise ValueError(f"--method {name}=...: allowed is each name once")
        methods[name] = path
    if not methods:
        raise ValueError("no quantized model: allowed is QUANTIZED, --method, or both")
    options = run_options(arguments)
    log = arguments.out / "vsraq_compare.log"
    with analysis_console(log, "comparing", verbose=arguments.verbose) as console:
        found = compare(
            arguments.fp_model,
            methods,
            arguments.data,
            arguments.out,
            keep_fp_pass=arguments.keep_fp_pass,
            fresh=arguments.fresh,
            progress=not arguments.verbose or sys.stderr.isatty(),
            **options,
        )
        console.say(str(found))
    for path in found.paths(arguments.out):
        print(f"written to {path}")
    return 0
