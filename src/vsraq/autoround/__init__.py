# SPDX-License-Identifier: Apache-2.0
"""The package that imports `auto_round`; importing it registers "vsraq" there."""

from auto_round.algorithms.registry import register_algorithm

from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.plan_bits import plan_bits
from vsraq.autoround.quantizer import VSRAQQuantizer
from vsraq.autoround.select_tokens import select_tokens

register_algorithm(
    "vsraq",
    config_factory=VSRAQConfig,
    summary="SignRound with router alignment for mixture-of-experts models.",
)

__all__ = ["VSRAQConfig", "VSRAQQuantizer", "plan_bits", "select_tokens"]
