# SPDX-License-Identifier: Apache-2.0
"""What an expert-balanced choice of calibration samples is worth.

    python benchmarks/balanced_samples.py

Each seed draws candidates. One run of plain AutoRound on the embedded model is tuned on
the first of them, one on those that are chosen for the balance of the experts. Both are
compared with full precision on held-out text.
"""

import argparse

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from torch import Tensor

from routing import autoround_run, heldout_texts, load_bench_model
from routing import calibration_windows as candidates_of
from vsraq.analysis import closeness
from vsraq.calibration import choose_balanced, sample_loads


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    fp_model = load_bench_model("solar_open")
    heldout = heldout_texts(arguments.windows)["heldout"]

    def measure(name: str, seed: int, samples: Tensor) -> None:
        run = autoround_run(
            "solar_open",
            arguments.scheme,
            SignRoundConfig(iters=arguments.iters),
            samples,
            seed=seed,
            device="cpu",
        )
        q_model, _ = run.quantize()
        result = closeness(q_model.cpu().float(), fp_model, heldout)
        print(
            f"| {name} | {seed} | {result.mean_jaccard:.5f} | {result.kl:.5f} | "
            f"{result.excess_nll:.5f} ± {result.excess_nll_error:.5f} |",
            flush=True,
        )

    print("| samples | seed | Jaccard | KL, nats | excess NLL, nats |")
    print("|---|---|---|---|---|")
    for seed in arguments.seeds:
        pool = candidates_of(arguments.candidates, seed)
        choice = choose_balanced(
            sample_loads(fp_model, pool.tolist()), arguments.nsamples
        )
        measure("drawn", seed, pool[: arguments.nsamples])
        measure("balanced", seed, pool[list(choice.chosen)])
        print(f"\n{choice}\n")


if __name__ == "__main__":
    main(parse())
