# SPDX-License-Identifier: Apache-2.0
"""What selecting tokens costs: time against two forward passes, memory, streamed.

    python benchmarks/token_selection.py
    python benchmarks/token_selection.py --scheme NVFP4 --layers 12

A random Qwen3-MoE is written to disk, AutoRound streams it block by block, and tokens
are selected at the start of the run, which ends there. The two plain passes run the
whole model in memory over the same tokens in the same batches and precision. Wall
time, in turn, in one process; the median of the ratios counts.
"""

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import vsraq
from vsraq.autoround.aligned_tokens import AlignedTokens
from vsraq.autoround.select_tokens import selection_of
from vsraq.checkpoint import load_model
from vsraq.demo.run import load_tokenizer


def build(arguments: argparse.Namespace, folder: Path) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=arguments.hidden // 8,
        moe_intermediate_size=arguments.hidden // 2,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=arguments.seqlen,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def select(path: Path, samples: list[torch.Tensor], scheme: str) -> tuple[float, float]:
    """Seconds, and MiB above what AutoRound held when the selection began."""
    config = vsraq.VSRAQConfig(objective="sra", router_weight="auto", iters=1)
    config.select_only = True
    peaks: list[float] = []
    compute = AlignedTokens._compute

    def measured(self: AlignedTokens, *args: Any) -> Any:
        gc.collect()
        held = mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        selection = compute(self, *args)
        peaks.append(mib("VmHWM") - held)
        return selection

    run = AutoRound(
        str(path),
        scheme=scheme,
        group_size=32 if scheme != "NVFP4" else None,
        alg_configs=config,
        dataset=samples,
        nsamples=len(samples),
        seqlen=samples[0].shape[-1],
        batch_size=BATCH,
        device_map="cpu",
        amp=False,  # float32: bfloat16 on a CPU compiles a kernel for every shape
        enable_torch_compile=False,
    )
    AlignedTokens._compute = measured
    try:
        selection = selection_of(run.quantize)
    finally:
        AlignedTokens._compute = compute
    return selection.seconds, peaks[0]


def two_passes(path: Path, samples: list[torch.Tensor]) -> float:
    model = load_model(path, dtype=torch.float32)
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(2):
            for batch in torch.cat(samples).split(BATCH):
                model(batch, use_cache=False)
    return time.perf_counter() - started


BATCH = 8

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="W4A16", choices=["W4A16", "NVFP4"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("memory is read from /proc: allowed is Linux")
    os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="vsraq-bench-"))
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.samples, arguments.seqlen)
    ids = torch.randint(1, min(arguments.vocab, 4000), shape, generator=generator)
    samples = list(ids.split(1))
    ratios, above = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = build(arguments, Path(folder))
        size = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 2**20
        two_passes(path, samples[:BATCH])  # warm up
        for _ in range(arguments.repeats):
            plain = two_passes(path, samples)
            gc.collect()
            seconds, memory = select(path, samples, arguments.scheme)
            ratios.append(seconds / plain)
            above.append(memory)
            print(
                f"two passes {plain:.1f} s, selection {seconds:.1f} s, ratio "
                f"{ratios[-1]:.2f}, {memory:.0f} MiB more than before",
                flush=True,
            )
    tokens = ids.numel()
    states = 2 * tokens * arguments.hidden * 4 / 2**20
    print(
        f"{arguments.scheme}: median ratio {statistics.median(ratios):.2f}, peak "
        f"{statistics.median(above):.0f} MiB for a model of {size:.0f} MiB "
        f"({size / arguments.layers:.0f} a block) and {states:.0f} MiB of hidden states"
    )
