# SPDX-License-Identifier: Apache-2.0
"""A bit plan as a figure: damage per MiB, and KL over the budget."""

from pathlib import Path

from vsraq.bits.plan import BitPlan


def plot_plan(plan: BitPlan, path: Path) -> None:
    """Draw a plan; see `BitPlan.plot`."""
    raise NotImplementedError
