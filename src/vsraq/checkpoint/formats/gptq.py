# SPDX-License-Identifier: Apache-2.0
"""Integers in the words of GPTQ and of AWQ, with a scale and a zero point per group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vsraq.checkpoint.formats.decode import (
    scale_levels,
    unpack_awq,
    unpack_last,
    unpack_rows,
)
from vsraq.checkpoint.formats.format import (
    INT32,
    REAL,
    Declared,
    Format,
    Scheme,
    TensorSpec,
)


def _packing(declared: Declared) -> str:
    """Which of the packings below AutoRound's own config names."""
    if "awq" in declared.packing:
        return "awq"
    if "gptq" in declared.packing and "gptqmodel" not in declared.packing:
        return "gptq"
    return "auto_round"


class GPTQ(Format):
    """Integers as GPTQ packs them, along the inputs.

    Attributes:
        packing: Its packing, as above.
        offset: What is added to the stored zero points.
    """

    kind = "int"
    exports: tuple[str, ...] = ("auto_round", "auto_round:auto_gptq", "auto_gptq")
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    optional = frozenset({"g_idx"})
    packing = "gptq"
    offset = 1

    def recognises(self, declared: Declared) -> bool:
        """See `Format`."""
        is_integer = declared.data_type == "int" and 2 <= declared.bits <= 8
        if declared.is_compressed_tensors or declared.quantized_inputs:
            return False
        return is_integer and _packing(declared) == self.packing

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        groups, bits = scheme.groups(in_features), scheme.bits
        words = out_features * bits // 32
        return {
            "qweight": TensorSpec((in_features * bits // 32, out_features), INT32, -1),
            "qzeros": TensorSpec((groups, words), INT32, -1),
            "scales": TensorSpec((groups, out_features), REAL, -1, is_scale=True),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`: (level - zero point) * scale."""
        levels = unpack_rows(tensors["qweight"], scheme.bits)  # (..., I, O)
        return scale_levels(levels, self._zeros(tensors, scheme), tensors["scales"]).mT

    def zero_points(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`."""
        return self._zeros(tensors, scheme) - (1 << (scheme.bits - 1))

    def _zeros(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        return unpack_last(tensors["qzeros"], scheme.bits).short() + self.offset

    def step(self, scheme: Scheme) -> float:
        """See `Format`."""
        return 2 / ((1 << scheme.bits) - 1)

    def faults(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int
    ) -> list[str]:
        """See `Format`: a group is made of neighbouring inputs."""
        if "g_idx" not in tensors:
            return []
        size = scheme.group_size if scheme.group_size > 0 else in_features
        groups = torch.arange(in_features) // size
        if torch.equal(tensors["g_idx"].long(), groups):
            return []
        return [f"g_idx: not the groups of {size} inputs in order"]


class AutoRoundGPTQ(GPTQ):
    """The same with zero points stored as they are: AutoRound's and GPTQModel's."""

    exports = ("auto_round", "auto_round:gptqmodel")
    packing = "auto_round"
    offset = 0


class AWQ(GPTQ):
    """Integers as AutoAWQ packs them, along the outputs, in an order of its own."""

    exports = ("auto_round:auto_awq", "auto_awq")
    packing = "awq"

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `Format`."""
        words = out_features * scheme.bits // 32
        layout = super().layout(scheme, out_features, in_features)
        return layout | {"qweight": TensorSpec((in_features, words), INT32, -1)}

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """See `Format`."""
        levels = unpack_awq(tensors["qweight"], scheme.bits)  # (..., I, O)
        return scale_levels(levels, self._zeros(tensors, scheme), tensors["scales"]).mT

    def _zeros(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        return unpack_awq(tensors["qzeros"], scheme.bits).short()
