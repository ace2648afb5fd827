# SPDX-License-Identifier: Apache-2.0
"""Layers as AutoRound's rounding to nearest leaves them."""

from collections.abc import Callable
from typing import Any

import torch
from auto_round.wrapper import WrapperLinear
from torch import Tensor, nn


def copy_weight(weight: Tensor) -> nn.Parameter:
    """Copy a weight."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def copy_layer(layer: nn.Module) -> nn.Module:
    """Copy a layer: its weight is copied, everything else is shared."""
    copied: nn.Module = layer.__class__.__new__(layer.__class__)
    names = ("_parameters", "_forward_pre_hooks")  # AutoRound's wrapper clears hooks
    copied.__dict__ = layer.__dict__ | {n: layer.__dict__[n].copy() for n in names}
    copied.weight = copy_weight(layer.weight)  # type: ignore[arg-type]
    return copied


def rounded_layer(layer: nn.Module, device: torch.device | str) -> nn.Module:
    """Return what AutoRound's RTN replaces a layer with; changes the layer."""
    wrapper: Callable[..., Any] = WrapperLinear
    return wrapper(
        layer,
        device=device,
        enable_minmax_tuning=False,
        enable_norm_bias_tuning=False,
        enable_round_tuning=False,
        enable_torch_compile=False,
        disable_opt_rtn=True,
        iters=0,
    ).unwrapper({})
