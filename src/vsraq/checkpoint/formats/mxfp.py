# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and MXFP8: floats in blocks of 32 with powers of two as scales."""

from collections.abc import Mapping

from torch import Tensor

from vsraq.checkpoint.formats.decode import e2m1, e8m0, scale_blocks
from vsraq.checkpoint.formats.format import FLOAT8, UINT8, Format, Scheme, TensorSpec


class MXFP4(Format):
    """E2M1 values in blocks of 32 with powers of two as scales."""

    kind = "mxfp4"
    exports = ("auto_round", "llm_compressor")
    auto_round = ("mx_fp", 4)
    compressed_tensors = ("mxfp4-pack-quantized", "float")
    suffixes = frozenset({"weight_packed", "weight_scale"})

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        groups = scheme.groups(in_features)
        return {
            "weight_packed": TensorSpec((out_features, in_features // 2), UINT8, -2),
            "weight_scale": TensorSpec(
                (out_features, groups), UINT8, -2, is_scale=True
            ),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`: E2M1 value * 2^(scale - 127)."""
        values = e2m1(tensors["weight_packed"])
        return scale_blocks(values, e8m0(tensors["weight_scale"]))

    def step(self, scheme: Scheme) -> float:
        """See `Format`: from 2 to 3, where 4 is the largest value of the group."""
        return 1 / 4


class MXFP8(Format):
    """E4M3 values in blocks of 32 with powers of two as scales."""

    kind = "mxfp8"
    exports = ("auto_round", "llm_compressor")
    auto_round = ("mx_fp", 8)
    compressed_tensors = ("mxfp8-quantized", "float")
    suffixes = frozenset({"weight_scale"})

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        groups = scheme.groups(in_features)
        return {
            "weight": TensorSpec((out_features, in_features), FLOAT8, -2),
            "weight_scale": TensorSpec(
                (out_features, groups), UINT8, -2, is_scale=True
            ),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`: E4M3 value * 2^(scale - 127)."""
        return scale_blocks(tensors["weight"].float(), e8m0(tensors["weight_scale"]))

    def step(self, scheme: Scheme) -> float:
        """See `Format`: 16, where 256 is the largest value of the group."""
        return 1 / 16
