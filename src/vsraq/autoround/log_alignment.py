# SPDX-License-Identifier: Apache-2.0
"""What a run is about to do, in its log."""

import logging
from collections.abc import Sequence

from torch import nn

from vsraq.autoround.checks import within_reach
from vsraq.autoround.config import VSRAQConfig
from vsraq.options import Alignment
from vsraq.routers import Router

logger = logging.getLogger("autoround.vsraq")


def log_alignment(
    model: nn.Module,
    routers: Sequence[Router],
    alignment: Alignment,
    config: VSRAQConfig,
) -> None:
    """Log the parts of a run, and warn if the own-router loss reaches nothing."""
    one_block = config.nblocks == 1 and not config.enable_norm_bias_tuning
    if alignment.router_weight != 0 and one_block and not within_reach(model, routers):
        logger.log(
            logging.WARNING if alignment.next_router_weight == 0 else logging.INFO,
            "vsraq: router_weight=%s: no MoE block of %s has a quantized layer "
            "before its router, so the own-router loss tunes nothing; "
            'next_router_weight="auto" reaches the layers before a MoE block and '
            "its experts",
            alignment.router_weight,
            type(model).__name__,
        )
    logger.info(
        "vsraq: %d routers; router_weight=%s, objective %s; next_router_weight=%s, "
        "objective %s; realign_routers=%s",
        len(routers),
        alignment.router_weight,
        alignment.own_objective,
        alignment.next_router_weight,
        alignment.next_objective,
        alignment.realign_routers,
    )
