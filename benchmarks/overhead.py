# SPDX-License-Identifier: Apache-2.0
"""How much longer VSRAQ tunes than AutoRound: the ratio of their times, in one run.

    python benchmarks/overhead.py --scheme W4A16 --repeats 3
    python benchmarks/overhead.py router_weight=auto next_router_weight=auto

Arguments without a dash are options of VSRAQConfig; without any, its defaults count.

Both quantize the embedded model with the same iterations, data and seed, in turn; the
ratio of each pair is taken, and the median of the ratios is what counts. Seconds are
the process's own time, which other processes change little; `OMP_NUM_THREADS=1` keeps
threads that wait for each other out of it. With `--compile`, every run starts without
compiled code, as in a process of its own.
"""

import argparse
import statistics
import time

import torch

from vsraq.demo import model_path
from vsraq.demo.run import (
    CALIBRATION_SAMPLES,
    SEQLEN,
    load_tokenizer,
    token_windows,
    tune,
)
from vsraq.recipe import Calibration, Recipe
from vsraq.yaml_text import parse_yaml


def tuning_seconds(
    method: str, scheme: str, iters: int, compiled: bool, options: dict[str, object]
) -> float:
    algorithm: dict[str, object] = {"iters": iters}
    if method == "vsraq":
        algorithm |= options
    recipe = Recipe(
        model=str(model_path()),
        scheme=scheme,
        output="out",
        method=method,
        algorithm=algorithm,
        calibration=Calibration(nsamples=CALIBRATION_SAMPLES, seqlen=SEQLEN),
        runtime={"enable_torch_compile": compiled},
    )
    tokenizer = load_tokenizer()
    samples = token_windows(tokenizer, "calibration", CALIBRATION_SAMPLES)
    torch.compiler.reset()
    started = time.process_time()
    tune(recipe, tokenizer, samples)
    return time.process_time() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", nargs="*", metavar="option=value")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    arguments = parser.parse_args()
    pairs = (option.partition("=")[::2] for option in arguments.options)
    options = {name: parse_yaml(value) for name, value in pairs}
    # warm up caches and kernels
    tuning_seconds("auto_round", arguments.scheme, 1, False, {})
    ratios = []
    for repeat in range(arguments.repeats):
        # alternate who goes first, so that a drift of the machine cancels out
        methods = ["auto_round", "vsraq"][:: 1 if repeat % 2 == 0 else -1]
        seconds = {
            method: tuning_seconds(
                method, arguments.scheme, arguments.iters, arguments.compile, options
            )
            for method in methods
        }
        ratios.append(seconds["vsraq"] / seconds["auto_round"])
        print(
            f"{arguments.scheme}: AutoRound {seconds['auto_round']:.1f} s, "
            f"VSRAQ {seconds['vsraq']:.1f} s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(
        f"{arguments.scheme}: median ratio {statistics.median(ratios):.3f} "
        f"of {arguments.repeats} pairs, {arguments.iters} iterations"
    )
