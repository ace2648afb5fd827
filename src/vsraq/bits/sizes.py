# SPDX-License-Identifier: Apache-2.0
"""How many bytes a layer takes in an export, to the byte: what `verify` will read."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from vsraq.checkpoint.formats import find_format
from vsraq.checkpoint.formats.format import Declared

_BYTES = {
    "I32": 4,
    "I64": 8,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
}
_COMPRESSED_TENSORS = {
    "int": ("pack-quantized", "int"),
    "int-inputs": ("int-quantized", "int"),
    "nv_fp4": ("nvfp4-pack-quantized", "float"),
    "mx_fp4": ("mxfp4-pack-quantized", "float"),
    "mx_fp8": ("mxfp8-quantized", "float"),
}


def layer_bytes(
    fields: Mapping[str, Any],
    out_features: int,
    in_features: int,
    export_format: str,
) -> int:
    """Compute the bytes of a quantized weight: numbers, scales and zero points.

    Args:
        fields: Its scheme, by AutoRound's names, of less than 16 bits.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        export_format: AutoRound's name of the export format.

    Raises:
        ValueError: `verify` knows no format for such weights.
    """
    declared = _declared(fields, export_format)
    form = find_format(declared)
    if form is None:
        raise ValueError(
            f"scheme {fields['data_type']} of {fields['bits']} bits in format "
            f"{export_format}: its size is not known; allowed are schemes that "
            "`verify` reads, see docs/verify.md"
        )
    layout = form.layout(form.scheme(declared), out_features, in_features)
    total = sum(math.prod(s.shape) * _width(s.dtypes) for s in layout.values())
    # AutoRound stores the order of the inputs in this format only
    return total + (in_features * _BYTES["I32"] if export_format == "auto_gptq" else 0)


def _width(dtypes: Collection[str]) -> int:
    """Return the bytes of a number: AutoRound takes 16-bit scales, 64-bit shapes."""
    widths = [_BYTES[dtype] for dtype in dtypes]
    return max(widths) if "I64" in dtypes else min(widths)


def _declared(fields: Mapping[str, Any], export_format: str) -> Declared:
    """Return what the config of the export will say of the layer."""
    data_type, bits = str(fields["data_type"]), int(fields["bits"])
    quantized_inputs = (fields.get("act_bits") or 16) < 16
    packing = "auto_round:auto_awq" if "awq" in export_format else "auto_gptq"
    method = "auto-round"
    declared_type = data_type
    if export_format == "llm_compressor":
        method = "compressed-tensors"
        family = f"{data_type.rstrip('48')}{bits}"
        if data_type == "int":
            family = "int-inputs" if quantized_inputs else "int"
        packing, declared_type = _COMPRESSED_TENSORS.get(family, ("", data_type))
    return Declared(
        quant_method=method,
        packing=packing,
        data_type=declared_type,
        bits=bits,
        group_size=int(fields["group_size"]),
        sym=bool(fields["sym"]),
        quantized_inputs=quantized_inputs,
        static_inputs=quantized_inputs
        and (
            fields.get("act_dynamic") is False
            or "static" in str(fields.get("act_data_type"))
        ),
    )


def plain_bytes(
    model: nn.Module,
    quantized: Collection[str],
    widths: Mapping[str, int] | None = None,
) -> int:
    """Compute the bytes of all tensors that stay as they are.

    Args:
        model: The model, in the dtype of the export; tensors may be on meta.
        quantized: Names of the layers whose weights do not count.
        widths: Bytes of a number of those tensors whose dtype the model does not have
            yet, by name.

    Returns:
        Bytes of parameters, tied ones once, and of buffers that are stored.
    """
    left_out = {id(model.get_submodule(name).weight) for name in quantized}
    counted = {n: p for n, p in model.named_parameters() if id(p) not in left_out}
    for owner, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                counted[f"{owner}.{name}" if owner else name] = buffer
    return sum(_size(tensor, name, widths) for name, tensor in counted.items())


def weight_bytes(
    model: nn.Module, layer: str, widths: Mapping[str, int] | None = None
) -> int:
    """Compute the bytes of a layer's weight that stays as it is.

    Args:
        model: See `plain_bytes`.
        layer: Name of the layer.
        widths: See `plain_bytes`.
    """
    weight: torch.Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
    return _size(weight, f"{layer}.weight", widths)


def unit_bytes(
    model: nn.Module,
    schemes: Mapping[str, Mapping[str, Any]],
    export_format: str,
    widths: Mapping[str, int] | None = None,
) -> int:
    """Compute the bytes of a unit's weights.

    Args:
        model: The model, in the dtype of the export.
        schemes: The scheme of each of the unit's layers.
        export_format: AutoRound's name of the export format.
        widths: See `plain_bytes`.
    """
    total = 0
    for layer, fields in schemes.items():
        if fields["bits"] >= 16:
            total += weight_bytes(model, layer, widths)
        else:
            weight: torch.Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
            rows, columns = weight.shape
            total += layer_bytes(fields, rows, columns, export_format)
    return total


def _size(tensor: torch.Tensor, name: str, widths: Mapping[str, int] | None) -> int:
    return tensor.numel() * (widths or {}).get(name, tensor.element_size())
