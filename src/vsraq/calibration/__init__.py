# SPDX-License-Identifier: Apache-2.0
"""Calibration samples: which text, how many of each, and which experts they reach."""

from vsraq.calibration.balance import (
    BalancedChoice,
    ExpertLoads,
    choose_balanced,
    sample_loads,
)
from vsraq.calibration.mixture import SourceReport, draw
from vsraq.calibration.names import ALIASES, Part, count_samples, parse_names
from vsraq.calibration.sources import MIXTURES, Source

__all__ = [
    "ALIASES",
    "MIXTURES",
    "BalancedChoice",
    "ExpertLoads",
    "Part",
    "Source",
    "SourceReport",
    "choose_balanced",
    "count_samples",
    "draw",
    "parse_names",
    "sample_loads",
]
