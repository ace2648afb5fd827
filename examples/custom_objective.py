# SPDX-License-Identifier: Apache-2.0
"""An objective of your own for both routers: the margin at the boundary, one-sided.

An objective gets the quantized logits, (..., E), and the full-precision logits in rank
order, and returns a value per token. Here a selected expert may move away from those
that are not selected, and pays only where the gap to the first of them shrinks.
"""

from auto_round import AutoRound

import vsraq


def shrunk_margin(q_logits, fp_logits, *, top_k):
    """The square of what the gap behind the last selected expert has lost."""
    around = slice(top_k - 1, top_k + 1)
    experts = fp_logits.indices[..., around].long()
    q_gap = -q_logits.float().gather(-1, experts).diff(dim=-1)
    fp_gap = -fp_logits.values[..., around].diff(dim=-1)
    return (fp_gap - q_gap).clamp(min=0).square().squeeze(-1)


config = vsraq.VSRAQConfig(
    objective=vsraq.Objective(
        "shrunk_margin",
        shrunk_margin,
        ranks_read=lambda top_k, *_: top_k + 1,  # no more are kept of full precision
    ),
    router_weight="auto",  # a number needs the right scale; "auto" finds it per block
    next_router_weight="auto",
    realign_routers=True,
)
autoround = AutoRound(
    "Qwen/Qwen3-30B-A3B",
    scheme="W4A16",
    alg_configs=config,
    nsamples=128,
    seqlen=2048,
)
autoround.quantize_and_save("Qwen3-30B-A3B-W4A16", format="auto_round")
