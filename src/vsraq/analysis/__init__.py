# SPDX-License-Identifier: Apache-2.0
"""Compare a quantized model with the full-precision one."""

from vsraq.analysis.compare import Comparison, compare
from vsraq.analysis.replay import replay_routing
from vsraq.analysis.routing_record import RoutingRecord, record_routing

__all__ = [
    "Comparison",
    "RoutingRecord",
    "compare",
    "record_routing",
    "replay_routing",
]
