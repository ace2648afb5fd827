# SPDX-License-Identifier: Apache-2.0
"""Which schemes need the ranges of activations over all calibration tokens."""

from typing import Any

from auto_round.compressors.utils import is_nv_fp


def needs_activation_ranges(scheme: Any) -> bool:
    """Whether a scheme's activation scales come from all calibration tokens.

    Args:
        scheme: AutoRound's `QuantizationScheme`.
    """
    static = scheme.act_dynamic is not None and not scheme.act_dynamic
    return static or is_nv_fp(scheme.act_data_type)
