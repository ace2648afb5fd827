# SPDX-License-Identifier: Apache-2.0
"""Compare quantized models with the full-precision one."""

from vsraq.analysis.closeness import Closeness, closeness
from vsraq.analysis.compare_models import compare
from vsraq.analysis.intervals import Interval
from vsraq.analysis.measure_replay import measure_replay
from vsraq.analysis.recording import record_routing
from vsraq.analysis.replay import replay_routing
from vsraq.analysis.replay_effect import ReplayEffect
from vsraq.analysis.results import Comparison
from vsraq.analysis.routing_record import RoutingRecord
from vsraq.analysis.tally import Thresholds

__all__ = [
    "Closeness",
    "Comparison",
    "Interval",
    "ReplayEffect",
    "RoutingRecord",
    "Thresholds",
    "closeness",
    "compare",
    "measure_replay",
    "record_routing",
    "replay_routing",
]
