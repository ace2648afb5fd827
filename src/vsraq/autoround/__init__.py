# SPDX-License-Identifier: Apache-2.0
"""The package that imports `auto_round`; importing it registers "vsraq" there.

The data sets of `vsraq.calibration` are registered, too.
"""

from auto_round.algorithms.registry import register_algorithm
from auto_round.auto_scheme.register import register_scheme_methods

from vsraq.autoround.auto_scheme import choose_by_damage
from vsraq.autoround.calibration_data import (
    CalibrationSamples,
    calibration_samples,
    register,
)
from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.plan_bits import plan_bits
from vsraq.autoround.quantizer import VSRAQQuantizer
from vsraq.autoround.select_tokens import select_tokens

register_algorithm(
    "vsraq",
    config_factory=VSRAQConfig,
    summary="SignRound with router alignment for mixture-of-experts models.",
)
register_scheme_methods("vsraq")(choose_by_damage)
register()

__all__ = [
    "CalibrationSamples",
    "VSRAQConfig",
    "VSRAQQuantizer",
    "calibration_samples",
    "plan_bits",
    "select_tokens",
]
