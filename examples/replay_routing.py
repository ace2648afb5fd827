# SPDX-License-Identifier: Apache-2.0
"""What the changed routing of a quantized model costs: replay that of full precision.

The second comparison gives every token the experts and routing weights that it has in
full precision. What is left is what the weights do to the experts' outputs.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vsraq.analysis import record_routing, replay_routing
from vsraq.checkpoint import load_model

SEQLEN = 2048
MODEL = "Qwen/Qwen3-30B-A3B"
EXPORT = "Qwen3-30B-A3B-W4A16"  # the folder that the run printed

tokenizer = AutoTokenizer.from_pretrained(MODEL)
with open("held-out.txt", encoding="utf-8") as file:
    tokens = tokenizer(file.read())["input_ids"]
count = len(tokens) // SEQLEN
batches = torch.tensor(tokens[: count * SEQLEN]).view(count, SEQLEN).split(4)

fp_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
q_model = load_model(EXPORT)


@torch.no_grad()
def divergence():
    """Mean KL(full precision || quantized) of the next token, nats."""
    total = 0.0
    for ids in batches:
        q, fp = (m(ids).logits.float().log_softmax(-1) for m in (q_model, fp_model))
        total += (fp.exp() * (fp - q)).sum().item()
    return total / (count * SEQLEN)


print(f"with its own routing: KL {divergence():.5f}")
with replay_routing(q_model, record_routing(fp_model, batches)):
    print(f"with that of full precision: KL {divergence():.5f}")
