# SPDX-License-Identifier: Apache-2.0
"""Quantize Nemotron-3-Nano-30B-A3B, a hybrid of Mamba, attention and MoE layers.

    python examples/quantize_nemotron.py NVFP4
    python examples/quantize_nemotron.py W4A16 --output Nemotron-3-Nano-W4A16-VSRAQ

Each layer of this model is one mixer. In a MoE layer nothing quantized stands before
the router, so the paper's own-router loss tunes nothing there. The next-router term
reaches the Mamba and attention layers before a MoE layer and the experts of the MoE
layer before it; the re-fit moves the routers themselves.
"""

import argparse

from auto_round import AutoRound

from vsraq import VSRAQConfig
from vsraq.checkpoint import verify

MODEL_ID = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
ROUTER_WEIGHT = 0.1  # lambda of the paper for this model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("scheme", choices=["W4A16", "NVFP4"])
parser.add_argument("--model", default=MODEL_ID, help="model id or local path")
parser.add_argument("--output", help="folder of the export")
parser.add_argument("--dataset", default="NeelNanda/pile-10k")
parser.add_argument("--nsamples", type=int, default=512)
parser.add_argument("--seqlen", type=int, default=1024)
parser.add_argument("--iters", type=int, default=200)
parser.add_argument("--group-size", type=int, help="of W4A16, where 128 is too wide")
arguments = parser.parse_args()

autoround = AutoRound(
    arguments.model,
    scheme=arguments.scheme,
    alg_configs=VSRAQConfig(
        objective="vsraq",
        router_weight=ROUTER_WEIGHT,
        next_router_weight="auto",
        realign_routers=True,
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
output = arguments.output or f"Nemotron-3-Nano-{arguments.scheme}-VSRAQ"
# vLLM has no compressed-tensors NVFP4 for experts without a gate (vllm#31782), so the
# export is AutoRound's own format.
_, folder = autoround.quantize_and_save(output, format="auto_round")
print(f"exported to {folder}")

print(verify(folder, arguments.model))
