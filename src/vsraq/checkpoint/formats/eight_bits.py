# SPDX-License-Identifier: Apache-2.0
"""INT8 and FP8: one byte per weight, with a scale per output or one for all."""

from collections.abc import Mapping

from torch import Tensor

from vsraq.checkpoint.formats.format import FLOAT8, REAL, Format, Scheme, TensorSpec


class INT8(Format):
    """8-bit integers with a scale per output, or one for all."""

    kind = "int8"
    exports: tuple[str, ...] = ("llm_compressor",)
    compressed_tensors = ("int-quantized", "int")
    suffixes = frozenset({"weight_scale", "input_scale"})
    dtypes = frozenset({"I8"})

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        per_output = scheme.group_size != 0
        layout = {
            "weight": TensorSpec((out_features, in_features), self.dtypes, -2),
            "weight_scale": TensorSpec(
                (out_features if per_output else 1, 1),
                REAL,
                -2 if per_output else None,
                is_scale=True,
            ),
        }
        one = TensorSpec((1,), REAL, is_scale=True)
        return layout | ({"input_scale": one} if scheme.static_inputs else {})

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`: value * scale."""
        values = tensors["weight"].float()
        scale = tensors["weight_scale"].float()  # (O, 1), or (O,) as in some files
        return values * scale.reshape(*values.shape[:-2], -1, 1)

    def step(self, scheme: Scheme) -> float:
        """See `Format`."""
        return 2 / 255


class FP8(INT8):
    """8-bit floats with a scale per output, or one for all."""

    kind = "fp8"
    exports = ("auto_round", "llm_compressor")
    auto_round = ("fp", 8)
    compressed_tensors = ("float-quantized", "float")
    dtypes = FLOAT8

    def step(self, scheme: Scheme) -> float:
        """See `Format`: E4M3's step from 128 on is 16, and 448 its largest number."""
        return 16 / 448
