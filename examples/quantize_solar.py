# SPDX-License-Identifier: Apache-2.0
"""Quantize Solar-Open-100B with router alignment, W4A16 or NVFP4.

    python examples/quantize_solar.py W4A16
    python examples/quantize_solar.py NVFP4 --output Solar-Open-100B-NVFP4-VSRAQ

A model given by name or path is read from disk block by block, so the CPU needs room
for about one block and the calibration activations, the GPU for one block and a batch.
"""

import argparse

from auto_round import AutoRound

from vsraq import VSRAQConfig
from vsraq.checkpoint import verify

MODEL_ID = "upstage/Solar-Open-100B"
ROUTER_WEIGHT = 0.01  # lambda of the paper for this model
FORMATS = {"W4A16": "auto_round", "NVFP4": "llm_compressor"}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("scheme", choices=FORMATS)
parser.add_argument("--model", default=MODEL_ID, help="model id or local path")
parser.add_argument("--output", help="folder of the export")
parser.add_argument("--dataset", default="NeelNanda/pile-10k")
parser.add_argument("--nsamples", type=int, default=512)
parser.add_argument("--seqlen", type=int, default=2048)
parser.add_argument("--iters", type=int, default=200)
parser.add_argument("--group-size", type=int, help="of W4A16, where 128 is too wide")
arguments = parser.parse_args()

autoround = AutoRound(
    arguments.model,
    scheme=arguments.scheme,
    alg_configs=VSRAQConfig(
        objective="vsraq",
        router_weight=ROUTER_WEIGHT,
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
output = arguments.output or f"Solar-Open-100B-{arguments.scheme}-VSRAQ"
_, folder = autoround.quantize_and_save(output, format=FORMATS[arguments.scheme])
print(f"exported to {folder}")

print(verify(folder, arguments.model))
