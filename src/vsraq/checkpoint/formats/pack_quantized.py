# SPDX-License-Identifier: Apache-2.0
"""Integers as compressed-tensors packs them (`pack-quantized`)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vsraq.checkpoint.formats.decode import scale_levels, unpack_last, unpack_rows
from vsraq.checkpoint.formats.format import INT32, REAL, Format, Scheme, TensorSpec


class PackQuantized(Format):
    """Levels packed along the inputs, zero points along the outputs."""

    kind = "int"
    exports = ("llm_compressor",)
    compressed_tensors = ("pack-quantized", "int")
    suffixes = frozenset(
        {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
    )

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        groups, bits = scheme.groups(in_features), scheme.bits
        words = -(-in_features * bits // 32)
        layout = {
            "weight_packed": TensorSpec((out_features, words), INT32, -2),
            "weight_scale": TensorSpec((out_features, groups), REAL, -2, is_scale=True),
            "weight_shape": TensorSpec((2,), frozenset({"I64", "I32"})),
        }
        if not scheme.sym:
            shape = (-(-out_features * bits // 32), groups)
            layout["weight_zero_point"] = TensorSpec(shape, INT32, -2)
        return layout

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`: levels and zero points are both stored plus 2^(bits - 1)."""
        levels = unpack_last(tensors["weight_packed"], scheme.bits).mT  # (..., I, O)
        middle = 1 << (scheme.bits - 1)
        zeros = torch.tensor(middle, dtype=torch.short)
        if not scheme.sym:
            zeros = self.zero_points(tensors, scheme).mT + zeros
        return scale_levels(levels, zeros, tensors["weight_scale"].mT).mT

    def zero_points(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`."""
        if scheme.sym:
            return torch.zeros((), dtype=torch.short)
        zeros = unpack_rows(tensors["weight_zero_point"], scheme.bits).short()
        return zeros - (1 << (scheme.bits - 1))

    def step(self, scheme: Scheme) -> float:
        """See `Format`."""
        return 2 / ((1 << scheme.bits) - 1)

    def faults(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int
    ) -> list[str]:
        """See `Format`: `weight_shape` is the layer's."""
        said = tuple(tensors["weight_shape"].tolist())
        if said[1:] == (in_features,):
            return []
        return [f"weight_shape: {said}, of {in_features} inputs"]
