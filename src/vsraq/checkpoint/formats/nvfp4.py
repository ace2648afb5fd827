# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 values in blocks of 16, E4M3 scales, one float32 scale over them."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vsraq.checkpoint.formats.decode import e2m1, scale_blocks
from vsraq.checkpoint.formats.format import (
    UINT8,
    Declared,
    Format,
    Scheme,
    TensorSpec,
)


class NVFP4(Format):
    """E2M1 values with two levels of scales."""

    kind = "nvfp4"
    exports = ("auto_round", "llm_compressor")
    auto_round = ("nv_fp", 4)
    compressed_tensors = ("nvfp4-pack-quantized", "float")
    suffixes = frozenset(
        {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}
    )

    def scheme(self, declared: Declared) -> Scheme:
        """See `Format`."""
        scheme = super().scheme(declared)
        if declared.is_compressed_tensors and declared.quantized_inputs:
            # Inputs have a stored global scale even where `dynamic` is "local".
            return replace(scheme, static_inputs=True)
        return scheme

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        groups = scheme.groups(in_features)
        e4m3 = frozenset({"F8_E4M3"})
        one = TensorSpec((1,), frozenset({"F32"}), is_scale=True)
        layout = {
            "weight_packed": TensorSpec((out_features, in_features // 2), UINT8, -2),
            "weight_scale": TensorSpec((out_features, groups), e4m3, -2, is_scale=True),
            "weight_global_scale": one,
        }
        return layout | ({"input_global_scale": one} if scheme.static_inputs else {})

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`: E2M1 value * block scale / global scale."""
        values = e2m1(tensors["weight_packed"])
        block_scale = tensors["weight_scale"].float()
        global_scale = tensors["weight_global_scale"].float().unsqueeze(-1)
        # The order of AutoRound's own rounding during tuning, two reciprocals included:
        # the plain quotient is the same number up to float32 rounding, but not the
        # same bits.
        scale = (block_scale * global_scale.reciprocal()).reciprocal().reciprocal()
        return scale_blocks(values, scale)

    def step(self, scheme: Scheme) -> float:
        """See `Format`: from 2 to 3, where 6 is the largest value of the group."""
        return 1 / 6
