# SPDX-License-Identifier: Apache-2.0
"""The command `vsraq compare`: its arguments, and its run."""

import argparse
import sys
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
        help="leave what the full-precision pass stores in DIR/fp_pass",
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

    given = {
        "sampled_jsd": arguments.jsd_threshold,
        "routing_shift": arguments.shift_threshold,
    }
    names = ("seqlen", "sequences", "batch_size", "dtype", "device", "seed")
    options = {n: getattr(arguments, n) for n in names}
    return {
        "thresholds": Thresholds(**{n: v for n, v in given.items() if v is not None}),
        "trust_remote_code": arguments.trust_remote_code,
        **{n: v for n, v in options.items() if v is not None},
    }


def run_compare(arguments: argparse.Namespace) -> int:
    """Compare the models, print a table, and return the exit status."""
    import logging

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
    log = logging.getLogger("vsraq.analysis")
    log.setLevel(logging.INFO)
    log.addHandler(handler := logging.StreamHandler())
    try:
        found = compare(
            arguments.fp_model,
            methods,
            arguments.data,
            arguments.out,
            keep_fp_pass=arguments.keep_fp_pass,
            progress=sys.stderr.isatty(),
            **run_options(arguments),
        )
    finally:
        log.removeHandler(handler)
    print(found)
    for path in found.paths(arguments.out):
        print(f"written to {path}")
    return 0
