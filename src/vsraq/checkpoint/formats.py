# SPDX-License-Identifier: Apache-2.0
"""How each format stores the weight of a layer, and what that may do to it.

Shapes: O outputs, I inputs, G groups of inputs that share a scale, b bits. `dequantize`
takes leading batch dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from vsraq.checkpoint.packing import e2m1, e8m0, unpack_awq, unpack_last, unpack_rows
from vsraq.checkpoint.schemes import Scheme

Tensors = Mapping[str, Tensor]
Expected = dict[str, tuple[tuple[int, ...], frozenset[str]]]

_INT32 = frozenset({"I32"})
_REAL = frozenset({"F16", "BF16", "F32"})
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})


class Format:
    """One way of storing a quantized weight."""

    weight: str  # the tensor that holds the levels
    scales: tuple[str, ...]  # those that must be finite and not zero
    optional: tuple[str, ...] = ()
    # where the outputs lie: dimension from the end, and whether they are packed
    outputs: Mapping[str, tuple[int, bool]] = MappingProxyType({})

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """Suffix -> (shape, dtypes) of every tensor of a layer that must be there."""
        raise NotImplementedError

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """The weight as numbers, float32, (..., O, I), in the format's arithmetic."""
        raise NotImplementedError

    def rows(
        self, tensors: Tensors, scheme: Scheme, start: int, stop: int
    ) -> dict[str, Tensor]:
        """The tensors of some outputs; both bounds are multiples of 32, or O."""
        found = dict(tensors)
        for suffix, (dim, packed) in self.outputs.items():
            if suffix not in tensors:
                continue
            low, high = start, stop
            if packed:
                low, high = (n * scheme.bits // 32 for n in (start, stop))
            found[suffix] = tensors[suffix].narrow(dim, low, high - low)
        return found

    def step(self, scheme: Scheme) -> float:
        """The step in the middle of a group's range, over its largest |weight|."""
        raise NotImplementedError

    def zero_points(self, tensors: Tensors, scheme: Scheme) -> Tensor | None:
        """The zero points minus the middle level, or None where there are none."""
        return None


@dataclass
class GPTQ(Format):
    """Integers as GPTQ packs them, along the inputs.

    Attributes:
        offset: What is added to the stored zero points; 1 in GPTQ's own files.
    """

    offset: int
    weight = "qweight"
    scales = ("scales",)
    optional: tuple[str, ...] = ("g_idx",)
    outputs = MappingProxyType(
        {"qweight": (-1, False), "qzeros": (-1, True), "scales": (-1, False)}
    )

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`."""
        groups, bits = scheme.groups(in_features), scheme.bits
        return {
            "qweight": ((in_features * bits // 32, out_features), _INT32),
            "qzeros": ((groups, out_features * bits // 32), _INT32),
            "scales": ((groups, out_features), _REAL),
        }

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`: (level - zero point) * scale."""
        levels = unpack_rows(tensors["qweight"], scheme.bits)  # (..., I, O)
        return _scaled(levels, self._zeros(tensors, scheme), tensors["scales"]).mT

    def zero_points(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`."""
        return self._zeros(tensors, scheme) - (1 << (scheme.bits - 1))

    def _zeros(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        return unpack_last(tensors["qzeros"], scheme.bits).short() + self.offset

    def step(self, scheme: Scheme) -> float:
        """See `Format`."""
        return 2 / ((1 << scheme.bits) - 1)


class AWQ(GPTQ):
    """Integers as AutoAWQ packs them, along the outputs, in an order of its own."""

    optional = ()
    outputs = MappingProxyType(
        {"qweight": (-1, True), "qzeros": (-1, True), "scales": (-1, False)}
    )

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`."""
        found = super().expected(scheme, out_features, in_features)
        words = out_features * scheme.bits // 32
        return found | {"qweight": ((in_features, words), _INT32)}

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`."""
        levels = unpack_awq(tensors["qweight"], scheme.bits)  # (..., I, O)
        return _scaled(levels, self._zeros(tensors, scheme), tensors["scales"]).mT

    def _zeros(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        return unpack_awq(tensors["qzeros"], scheme.bits).short()


class Packed(Format):
    """Integers as compressed-tensors packs them (`pack-quantized`)."""

    weight = "weight_packed"
    scales = ("weight_scale",)
    outputs = MappingProxyType(
        {
            "weight_packed": (-2, False),
            "weight_scale": (-2, False),
            "weight_zero_point": (-2, True),
        }
    )

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`."""
        groups, bits = scheme.groups(in_features), scheme.bits
        found: Expected = {
            "weight_packed": ((out_features, -(-in_features * bits // 32)), _INT32),
            "weight_scale": ((out_features, groups), _REAL),
            "weight_shape": ((2,), frozenset({"I64", "I32"})),
        }
        if not scheme.sym:
            shape = (-(-out_features * bits // 32), groups)
            found["weight_zero_point"] = (shape, _INT32)
        return found

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`; both levels and zero points lie 2^(b-1) above their values."""
        levels = unpack_last(tensors["weight_packed"], scheme.bits).mT  # (..., I, O)
        middle = 1 << (scheme.bits - 1)
        zeros = torch.tensor(middle, dtype=torch.short)
        if not scheme.sym:
            zeros = self.zero_points(tensors, scheme).mT + zeros
        return _scaled(levels, zeros, tensors["weight_scale"].mT).mT

    def zero_points(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`."""
        if scheme.sym:
            return torch.zeros((), dtype=torch.short)
        zeros = unpack_rows(tensors["weight_zero_point"], scheme.bits).short()
        return zeros - (1 << (scheme.bits - 1))

    def step(self, scheme: Scheme) -> float:
        """See `Format`."""
        return 2 / ((1 << scheme.bits) - 1)


def _scaled(levels: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(levels - zeros) * scales: (..., I, O) with (..., G, O)."""
    groups = scales.shape[-2]
    values = levels.unflatten(-2, (groups, -1)).float()
    values -= zeros.unsqueeze(-2) if zeros.ndim else zeros
    values *= scales.float().unsqueeze(-2)
    return values.flatten(-3, -2)


class NVFP4(Format):
    """E2M1 values in blocks of 16, E4M3 scales, one float32 scale over them."""

    weight = "weight_packed"
    scales = ("weight_scale", "weight_global_scale", "input_global_scale")

    outputs = MappingProxyType(
        {"weight_packed": (-2, False), "weight_scale": (-2, False)}
    )

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`."""
        one = ((1,), frozenset({"F32"}))
        found: Expected = {
            "weight_packed": ((out_features, in_features // 2), frozenset({"U8"})),
            "weight_scale": (
                (out_features, scheme.groups(in_features)),
                frozenset({"F8_E4M3"}),
            ),
            "weight_global_scale": one,
        }
        return found | ({"input_global_scale": one} if scheme.static_inputs else {})

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`: E2M1 value * block scale / global scale."""
        values = e2m1(tensors["weight_packed"])
        block_scale = tensors["weight_scale"].float()
        global_scale = tensors["weight_global_scale"].float().unsqueeze(-1)
        # The order of AutoRound's own rounding during tuning, two reciprocals included:
        # the plain quotient is the same number up to float32 rounding, but not the
        # same bits.
        scale = (block_scale * global_scale.reciprocal()).reciprocal().reciprocal()
        return _blocks(values, scale)

    def step(self, scheme: Scheme) -> float:
        """See `Format`: from 2 to 3, of 6."""
        return 1 / 6


class MXFP4(Format):
    """E2M1 values in blocks of 32 with powers of two as scales."""

    weight = "weight_packed"
    scales = ("weight_scale",)

    outputs = MappingProxyType(
        {"weight_packed": (-2, False), "weight_scale": (-2, False)}
    )

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`."""
        octets = frozenset({"U8"})
        return {
            "weight_packed": ((out_features, in_features // 2), octets),
            "weight_scale": ((out_features, scheme.groups(in_features)), octets),
        }

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`: E2M1 value * 2^(scale - 127)."""
        return _blocks(e2m1(tensors["weight_packed"]), e8m0(tensors["weight_scale"]))

    def step(self, scheme: Scheme) -> float:
        """See `Format`: from 2 to 3, where 4 is the largest value of the group."""
        return 1 / 4


class MXFP8(Format):
    """E4M3 values in blocks of 32 with powers of two as scales."""

    weight = "weight"
    scales = ("weight_scale",)

    outputs = MappingProxyType({"weight": (-2, False), "weight_scale": (-2, False)})

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`."""
        return {
            "weight": ((out_features, in_features), _FLOAT8),
            "weight_scale": (
                (out_features, scheme.groups(in_features)),
                frozenset({"U8"}),
            ),
        }

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`: E4M3 value * 2^(scale - 127)."""
        return _blocks(tensors["weight"].float(), e8m0(tensors["weight_scale"]))

    def step(self, scheme: Scheme) -> float:
        """See `Format`: 16, where 256 is the largest value of the group."""
        return 1 / 16


class Scaled8(Format):
    """8-bit floats or integers with a scale per output, or one for all."""

    weight = "weight"
    scales = ("weight_scale", "input_scale")

    def __init__(self, dtypes: frozenset[str], step: float) -> None:
        self._dtypes = dtypes
        self._step = step

    def expected(self, scheme: Scheme, out_features: int, in_features: int) -> Expected:
        """See `Format`; a scale per output may be stored as (O, 1) or as (O,)."""
        rows = out_features if scheme.group_size else 1
        found: Expected = {
            "weight": ((out_features, in_features), self._dtypes),
            "weight_scale": ((rows, 1), _REAL),
        }
        one = ((1,), _REAL)
        return found | ({"input_scale": one} if scheme.static_inputs else {})

    def rows(
        self, tensors: Tensors, scheme: Scheme, start: int, stop: int
    ) -> dict[str, Tensor]:
        """See `Format`."""
        found = dict(tensors) | {"weight": tensors["weight"][..., start:stop, :]}
        if scheme.group_size:
            shape = (*tensors["weight"].shape[:-1], 1)  # also where stored as (O,)
            scale = tensors["weight_scale"].reshape(shape)
            found["weight_scale"] = scale[..., start:stop, :]
        return found

    def dequantize(self, tensors: Tensors, scheme: Scheme) -> Tensor:
        """See `Format`: value * scale."""
        values = tensors["weight"].float()
        scale = tensors["weight_scale"].float()
        return values * scale.reshape(*values.shape[:-2], -1, 1)

    def step(self, scheme: Scheme) -> float:
        """See `Format`."""
        return self._step


def _blocks(values: Tensor, scales: Tensor) -> Tensor:
    """(..., O, I) times one scale per block, (..., O, G)."""
    blocks = values.unflatten(-1, (scales.shape[-1], -1))
    return (blocks * scales.unsqueeze(-1)).flatten(-2)


FORMATS: dict[str, Format] = {
    "int": GPTQ(offset=0),
    "gptq": GPTQ(offset=1),
    "awq": AWQ(offset=0),
    "packed": Packed(),
    "int8": Scaled8(frozenset({"I8"}), 2 / 255),
    "nvfp4": NVFP4(),
    "mxfp4": MXFP4(),
    "mxfp8": MXFP8(),
    "fp8": Scaled8(_FLOAT8, 16 / 448),  # E4M3's from 128 on
}
# what may belong to a quantized layer only
OWN_SUFFIXES = frozenset(
    "qweight qzeros scales g_idx weight_packed weight_scale weight_shape "
    "weight_zero_point weight_global_scale input_global_scale input_scale".split()
)
