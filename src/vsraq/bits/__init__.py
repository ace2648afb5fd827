# SPDX-License-Identifier: Apache-2.0
"""Bit plans: units, sizes, the choice of schemes, what engines load."""

from vsraq.bits.plan import BitPlan

__all__ = ["BitPlan"]
