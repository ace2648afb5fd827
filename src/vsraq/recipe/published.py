# SPDX-License-Identifier: Apache-2.0
"""What a model's files hold, where they are published quantized.

The rules are those of transformers' `FineGrainedFP8Config` (a float32 scale per block
of `weight_block_size`) and `Mxfp4Config` (experts only; a scale of one byte per 32
values), and of compressed-tensors' config groups. Files of any other method count as if
they were not quantized.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers.quantizers_utils import should_convert_module

from vsraq.recipe.layers import Layer

_FP8_BLOCK = (128, 128)
_FP8_SCALE, _MX_SCALE = 4, 1  # bytes
_MX_GROUP = 32


def published_bytes(
    config: Any, layers: Sequence[Layer], parameters: int, width: int
) -> float:
    """Estimate the bytes of a model's files.

    Layers that transformers does not build, such as those that predict several tokens,
    are not counted.

    Args:
        config: The model's transformers config.
        layers: The linear layers of its blocks.
        parameters: All weights.
        width: Bytes of a weight that is not quantized.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return float(width * parameters)
    settings = said if isinstance(said, Mapping) else said.to_dict()
    inside = sum(
        layer.weights * _bytes_per_weight(layer, settings, width) for layer in layers
    )
    return inside + width * (parameters - sum(layer.weights for layer in layers))


def _bytes_per_weight(layer: Layer, settings: Mapping[str, Any], width: int) -> float:
    kept = settings.get("modules_to_not_convert") or settings.get("ignore") or ()
    patterns = [str(name).removeprefix("re:") for name in kept]
    if not should_convert_module(layer.name, patterns):
        return width
    method = settings.get("quant_method")
    if method == "fp8":
        rows, columns = settings.get("weight_block_size") or _FP8_BLOCK
        return 1 + _FP8_SCALE / (rows * columns)
    if method == "mxfp4" and layer.copies > 1:
        return 0.5 + _MX_SCALE / _MX_GROUP
    if method == "compressed-tensors":
        return _compressed(settings, width)
    return width


def _compressed(settings: Mapping[str, Any], width: int) -> float:
    """Return the bytes per weight of the first config group."""
    groups = list((settings.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") if groups else None) or {}
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if not bits:
        return width
    is_float = weights.get("type") == "float"  # MX and NV scales have one byte
    scale = (1 if is_float else 2) / group if group and group > 0 else 0.0
    return float(bits / 8 + scale)
