# SPDX-License-Identifier: Apache-2.0
"""Quantize Qwen3-30B-A3B with its routers aligned on selected tokens (SRA).

    python examples/quantize_qwen3_sra.py W4A16
    python examples/quantize_qwen3_sra.py W3A16 --mask qwen3-w3.safetensors

Tokens count whose output changes when the model is rounded to nearest. With `--mask`
the selection is kept in a file and taken from there by the next run.
"""

import argparse
from pathlib import Path

from auto_round import AutoRound

from vsraq import VSRAQConfig
from vsraq.checkpoint import verify

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("scheme", choices=["W4A16", "W3A16"])
parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="id or local path")
parser.add_argument("--output", help="folder of the export")
parser.add_argument("--mask", type=Path, help="file of the token mask")
parser.add_argument("--dataset", default="NeelNanda/pile-10k")
parser.add_argument("--nsamples", type=int, default=128)
parser.add_argument("--seqlen", type=int, default=2048)
parser.add_argument("--iters", type=int, default=200)
parser.add_argument("--group-size", type=int, help="where 128 is too wide")
arguments = parser.parse_args()

there = arguments.mask is not None and arguments.mask.exists()
autoround = AutoRound(
    arguments.model,
    scheme=arguments.scheme,
    alg_configs=VSRAQConfig(
        objective="sra",
        router_weight="auto",
        realign_routers=True,
        token_mask=arguments.mask if there else None,
        iters=arguments.iters,
        **({"group_size": arguments.group_size} if arguments.group_size else {}),
    ),
    dataset=arguments.dataset,
    nsamples=arguments.nsamples,
    seqlen=arguments.seqlen,
    batch_size=8,
    low_gpu_mem_usage=True,  # calibration activations wait on the CPU
    low_cpu_mem_usage=True,  # one block in memory at a time
)
output = arguments.output or f"Qwen3-30B-A3B-{arguments.scheme}-SRA"
_, folder = autoround.quantize_and_save(output, format="auto_round")
if arguments.mask is not None and not there:
    autoround.alg_composer.block_quantizer.token_mask.save(arguments.mask)
print(f"exported to {folder}")

print(verify(folder, arguments.model))
