# SPDX-License-Identifier: Apache-2.0
"""How far quantized models are from full precision, measured from Python.

A model is a module in memory or the folder of an export, and both may stand beside each
other: here plain rounding to 4 bits in groups of 128, done in memory, and an export.
"""

import torch
from transformers import AutoModelForCausalLM

import vsraq

MODEL = "Qwen/Qwen3-30B-A3B"
EXPORT = "Qwen3-30B-A3B-W4A16"  # the folder that the run printed

rounded = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
for name, weight in rounded.named_parameters():
    if "layers" in name and "mlp.gate." not in name and weight.shape[-1] % 128 == 0:
        groups = weight.data.unflatten(-1, (-1, 128))
        step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 7
        weight.data = (torch.round(groups / step) * step).flatten(-2)

result = vsraq.compare(
    MODEL,
    {"rounded": rounded, "export": EXPORT},
    "held-out.txt",
    "compared",  # for `vsraq report compared`
    seqlen=2048,
)
print(result)
for name, method in result.methods.items():
    for metric in ("kl", "jaccard"):
        value = method.metrics[metric]
        print(f"{name}: {metric} {value.value:.5f} ({value.low:.5f}-{value.high:.5f})")
