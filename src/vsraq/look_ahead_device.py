# SPDX-License-Identifier: Apache-2.0
"""The device on which a following block runs ahead of its turn."""

from collections import Counter

import torch
from torch import nn


def look_ahead_device(
    block: nn.Module, default: torch.device | str
) -> torch.device | str:
    """Return the device on which AutoRound's device map puts most of a block.

    A map by name ({"model.layers.1": "cuda:1"}) is what AutoRound writes on the layers
    as `tuning_device` before it tunes. An automatic one is made for each block when its
    turn comes, so it says nothing yet about the following ones.

    Args:
        block: The block as it will run, so without its experts.
        default: Where layers run that no map names.
    """
    elements: Counter[str] = Counter()
    for module in block.modules():
        device = str(getattr(module, "tuning_device", default))
        elements[device] += sum(p.numel() for p in module.parameters(recurse=False))
    most, _ = elements.most_common(1)[0]
    return default if most == str(default) else most
