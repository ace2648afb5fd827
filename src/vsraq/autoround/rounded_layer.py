# SPDX-License-Identifier: Apache-2.0
"""A layer as AutoRound's rounding to nearest leaves it."""

from collections.abc import Callable
from typing import Any

import torch
from auto_round.wrapper import WrapperLinear
from torch import Tensor, nn


def own_weight(weight: Tensor) -> nn.Parameter:
    """A copy of a weight."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def copy_of(layer: nn.Module) -> nn.Module:
    """A layer with a weight of its own and everything else shared."""
    copied: nn.Module = layer.__class__.__new__(layer.__class__)
    own = ("_parameters", "_forward_pre_hooks")  # AutoRound's wrapper clears hooks
    copied.__dict__ = layer.__dict__ | {n: layer.__dict__[n].copy() for n in own}
    copied.weight = own_weight(layer.weight)  # type: ignore[arg-type]
    return copied


def rounded_layer(layer: nn.Module, device: torch.device | str) -> nn.Module:
    """What AutoRound's RTN replaces a layer with; changes the layer."""
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
