# SPDX-License-Identifier: Apache-2.0
"""Calibrate on texts of your own, as token ids that you have made yourself.

Documents are joined with the end-of-sequence token between them, and cut into windows
of equal length, so nothing is padded and nothing is too short.
"""

from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

import vsraq

SEQLEN = 2048
MODEL = "Qwen/Qwen3-30B-A3B"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokens = []
for path in sorted(Path("texts").glob("*.txt")):
    tokens += tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    tokens.append(tokenizer.eos_token_id)
count = len(tokens) // SEQLEN
samples = torch.tensor(tokens[: count * SEQLEN]).view(count, SEQLEN)

autoround = AutoRound(
    MODEL,
    scheme="W4A16",
    alg_configs=vsraq.VSRAQConfig(on_unreached="warn"),  # names experts without tokens
    dataset=list(samples.split(1)),  # (1, SEQLEN) each
    nsamples=count,
    seqlen=SEQLEN,
)
autoround.quantize_and_save("Qwen3-30B-A3B-W4A16", format="auto_round")
