# SPDX-License-Identifier: Apache-2.0
"""autoround_before.py with aligned routers: an import, and an argument."""

from auto_round import AutoRound

import vsraq

autoround = AutoRound(
    "Qwen/Qwen3-30B-A3B",
    scheme="W4A16",
    alg_configs=vsraq.VSRAQConfig(),
    nsamples=128,
    seqlen=2048,
)
autoround.quantize_and_save("Qwen3-30B-A3B-W4A16", format="auto_round")
