# SPDX-License-Identifier: Apache-2.0
"""How much of a quantized model's damage is its routing, and what a re-fit can undo.

    python benchmarks/routing_ceiling.py --models solar_open --schemes W4A16

Tunes a model of `benchmarks/routing.py` with plain AutoRound and compares it with full
precision four times: as it is; with its routers re-fitted on the calibration text;
re-fitted on the held-out text itself, which no method may do; and with every router
reading its full-precision input, so that each token goes to its full-precision experts
with its full-precision weights. What KL is left then is not the routing's.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from torch import Tensor, nn

import routing
from vsraq.analysis import closeness
from vsraq.capture import RouterCapture
from vsraq.metrics import StreamingMean, output_kl
from vsraq.realignment import realign_routers
from vsraq.routers import find_routers


def tuned_model(name: str, scheme: str, seed: int, samples: Tensor) -> nn.Module:
    config = SignRoundConfig(iters=50)
    run = routing.autoround_run(name, scheme, config, samples, seed=seed, device="cpu")
    q_model, _ = run.quantize()
    if scheme == "NVFP4":
        with tempfile.TemporaryDirectory() as folder:
            return routing.reload_export(run, Path(folder))
    return q_model.float()


@contextmanager
def reading(model: nn.Module, inputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Let each router read what is given instead of what reaches it."""

    def replace(value: Tensor, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        return value.view_as(args[0]).to(args[0]), *args[1:]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(replace, value))
        for name, (value,) in inputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def kl_with_routing(
    q_model: nn.Module, fp_model: nn.Module, batches: Iterable[Tensor]
) -> float:
    """KL(fp || q), nats, of a model whose tokens are routed as in full precision."""
    routers = find_routers(fp_model)
    kl = StreamingMean()
    for input_ids in batches:
        with RouterCapture[Tensor](fp_model, routers, compared="inputs") as capture:
            fp_logits = fp_model(input_ids=input_ids).logits
            inputs = capture.take()
        with reading(q_model, inputs):
            kl.update(output_kl(q_model(input_ids=input_ids).logits, fp_logits))
    return kl.compute()


def report(name: str, scheme: str, seed: int) -> None:
    samples = routing.calibration_windows(32, seed)
    texts: Sequence[Tensor] = routing.heldout_texts(64)["heldout"]
    fp_model = routing.load_bench_model(name)
    q_model = tuned_model(name, scheme, seed, samples)

    def show(what: str, jaccard: float, kl: float) -> None:
        print(
            f"{name:10} {scheme:5} {what:22} Jaccard {jaccard:.4f}  KL {kl:.4f}",
            flush=True,
        )

    def compared(model: nn.Module) -> tuple[float, float]:
        result = closeness(model, fp_model, texts)
        return result.mean_jaccard, result.kl

    show("AutoRound", *compared(q_model))
    for what, text in (("re-fit", samples), ("re-fit to held-out", torch.cat(texts))):
        refitted = copy.deepcopy(q_model)
        realign_routers(refitted, fp_model, text.split(1))
        show(what, *compared(refitted))
    kl = kl_with_routing(q_model, fp_model, texts)
    show("full-precision routing", 1.0, kl)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=routing.MODELS)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W3A16", "NVFP4"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for model in arguments.models:
        for scheme in arguments.schemes:
            report(model, scheme, arguments.seed)
