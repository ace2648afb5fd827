# SPDX-License-Identifier: Apache-2.0
"""How much of NVFP4's damage is rounded activations, which no tuning of weights undoes.

    python benchmarks/nvfp4_floor.py --models solar_open

Rounds a model of `benchmarks/routing.py` to nearest, exports and reloads it, and
compares it with full precision three times: as it is, with the original weights in it
(activations rounded only), and with the activations left alone (weights rounded only).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from auto_round import AutoRound
from torch import Tensor, nn

import routing
from vsraq.analysis import closeness


def nvfp4_run(name: str, samples: Tensor) -> AutoRound:
    return routing.autoround_run(name, "NVFP4", "rtn", samples, seed=42, device="cpu")


def original_weights(name: str, samples: Tensor) -> dict[str, Tensor]:
    """By AutoRound's names, which are the export's: every expert on its own."""
    run = nvfp4_run(name, samples)
    run.post_init()
    layers = run.model_context.model.named_modules()
    return {n: m.weight.float() for n, m in layers if isinstance(m, nn.Linear)}


def replace_method(modules: dict[str, Any], method: str, results: Any) -> None:
    for name, module in modules.items():
        setattr(module, method, results(name, getattr(module, method)))


def report(name: str) -> None:
    samples = routing.calibration_windows(32, seed=0)
    texts = routing.heldout_texts(64)["heldout"]
    fp_model = routing.load_bench_model(name)
    weights = original_weights(name, samples)
    run = nvfp4_run(name, samples)
    run.quantize()
    with tempfile.TemporaryDirectory() as folder:
        q_model = routing.reload_export(run, Path(folder))

    def show(what: str) -> None:
        result = closeness(q_model, fp_model, texts)
        figures = f"Jaccard {result.mean_jaccard:.4f}  KL {result.kl:.4f}"
        print(f"{name:12} {what:12} {figures}")

    layers = {
        n: m for n, m in q_model.named_modules() if hasattr(m, "dequant_weight_online")
    }
    show("both")
    rounded = {n: m.dequant_weight_online for n, m in layers.items()}
    replace_method(layers, "dequant_weight_online", lambda n, _: lambda: weights[n])
    show("activations")
    replace_method(layers, "dequant_weight_online", lambda n, _: rounded[n])
    replace_method(layers, "qdq_input", lambda *_: lambda activation: activation)
    show("weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=routing.MODELS)
    for model in parser.parse_args().models:
        report(model)
