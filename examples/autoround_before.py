# SPDX-License-Identifier: Apache-2.0
"""A script for plain AutoRound; autoround_after.py is the same with aligned routers."""

from auto_round import AutoRound

autoround = AutoRound(
    "Qwen/Qwen3-30B-A3B",
    scheme="W4A16",
    nsamples=128,
    seqlen=2048,
)
autoround.quantize_and_save("Qwen3-30B-A3B-W4A16", format="auto_round")
