# SPDX-License-Identifier: Apache-2.0
"""What `vsraq compare` costs: time beside plain forward passes, and memory.

    python benchmarks/compare.py --tokens 10000 100000 1000000

Compares the embedded model with a copy whose weights are rounded to 4 bits; `--wide`
takes a larger one with random weights, whose blocks cost more beside its vocabulary, as
those of real models do. "plain" is a forward pass of each of the two models over the
same tokens, logits included. Times are CPU seconds of one thread, so that other work on
the machine does not count; the ratio is plain / compare, and the median of `--repeats`
with its range. Each number of tokens has a process of its own, whose peak memory is
given before and after.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vsraq.run_record.peak_memory import peak_mebibytes

BATCH = 8
SEQLEN = 256


def rounded(model: nn.Module, bits: int = 4, group: int = 32) -> nn.Module:
    """Round the weights of all matrices in blocks but the routers, to nearest."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or ".layers." not in name or name.endswith("gate.weight"):
            continue
        groups = weight.data.view(-1, group)
        step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        weight.data = ((groups / step).round() * step).view_as(weight)
    return model


def sequences(tokens: int) -> Tensor:
    """Held-out text, repeated as often as it takes, (N, SEQLEN)."""
    from vsraq.demo.run import load_tokenizer, token_windows

    windows = token_windows(load_tokenizer(), "heldout", seqlen=SEQLEN)
    count = -(-tokens // SEQLEN)
    return windows.repeat(-(-count // len(windows)), 1)[:count]


def wide_model() -> nn.Module:
    """12 layers of width 512, 16 experts, 8192 tokens in the vocabulary."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        moe_intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return Qwen3MoeForCausalLM(config).eval()


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(tokens: int, repeats: int, wide: bool) -> dict[str, Any]:
    import vsraq
    from vsraq.demo.run import load_demo_model

    torch.set_num_threads(1)
    load = wide_model if wide else load_demo_model
    fp_model, q_model = load(), rounded(load())
    text = sequences(tokens)

    @torch.no_grad()
    def plain() -> None:
        for model in (fp_model, q_model):
            for ids in text.split(BATCH):
                model(input_ids=ids, use_cache=False)

    # imports and first calls are not what is measured
    vsraq.compare(fp_model, q_model, text[: 2 * BATCH], batch_size=BATCH)
    before = peak_mebibytes()["host"]
    compared = [
        cpu_seconds(lambda: vsraq.compare(fp_model, q_model, text, batch_size=BATCH))
        for _ in range(1)
    ]
    after = peak_mebibytes()["host"]
    plain_seconds = []
    for repeat in range(repeats):
        plain_seconds.append(cpu_seconds(plain))
        if repeat + 1 < repeats:
            compared.append(
                cpu_seconds(
                    lambda: vsraq.compare(fp_model, q_model, text, batch_size=BATCH)
                )
            )
    ratios = [p / c for p, c in zip(plain_seconds, compared, strict=False)]
    return {
        "tokens": text.numel(),
        "before": before,
        "after": after,
        "compare": statistics.median(compared),
        "plain": statistics.median(plain_seconds) if plain_seconds else None,
        "ratios": ratios,
    }


def _child(tokens: int, repeats: int, wide: bool, answer: Any) -> None:
    answer.send(json.dumps(measure(tokens, repeats, wide)))


def in_a_process(tokens: int, repeats: int, wide: bool = False) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(tokens, repeats, wide, send))
    process.start()
    send.close()
    found: dict[str, Any] = json.loads(receive.recv())
    process.join()
    return found


def format_row(found: dict[str, Any]) -> str:
    row = f"{found['tokens']:9d}{found['before']:10.0f}{found['after']:10.0f}"
    row += f"{found['compare'] / found['tokens'] * 1e6:12.0f}"
    if not found["ratios"]:
        return row
    low, high = min(found["ratios"]), max(found["ratios"])
    return row + (
        f"{found['plain'] / found['tokens'] * 1e6:10.0f}"
        f"{statistics.median(found['ratios']):8.2f}  {low:.2f}-{high:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3, help="0 measures memory only")
    parser.add_argument("--wide", action="store_true", help="a model of 70 M weights")
    arguments = parser.parse_args()
    print(
        f"{'':9}{'peak MiB':>20}{'us of CPU per token of both models':>30}\n"
        f"{'tokens':>9}{'before':>10}{'after':>10}{'compare':>12}{'plain':>10}"
        f"{'ratio':>8}  range"
    )
    for tokens in arguments.tokens:
        found = in_a_process(tokens, arguments.repeats, arguments.wide)
        print(format_row(found), flush=True)
