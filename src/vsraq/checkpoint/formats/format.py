# SPDX-License-Identifier: Apache-2.0
"""What an export format is: how a config names it, its tensors, and their numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

INT32 = frozenset({"I32"})
UINT8 = frozenset({"U8"})
REAL = frozenset({"F16", "BF16", "F32"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class Declared:
    """What a config says of some layers, in its own words.

    Attributes:
        quant_method: "compressed-tensors"; all others are AutoRound's own config.
        packing: `format` of compressed-tensors; AutoRound's `packing_format` and
            `quant_method`, with a blank between.
        data_type: `type` of compressed-tensors, or AutoRound's `data_type`.
        bits: Bits of a weight.
        group_size: Inputs that share a scale; -1 for a whole row, 0 for the tensor.
        sym: Whether zero is the middle level.
        quantized_inputs: Whether the layers' inputs are quantized, too.
        static_inputs: Whether a scale of these inputs is stored.
    """

    quant_method: str
    packing: str
    data_type: str
    bits: int
    group_size: int
    sym: bool
    quantized_inputs: bool = False
    static_inputs: bool = False

    @property
    def is_compressed_tensors(self) -> bool:
        """Whether the config is one of compressed-tensors."""
        return self.quant_method == "compressed-tensors"


@dataclass(frozen=True)
class Scheme:
    """How one layer's weight is stored.

    Attributes:
        format: Its format.
        bits: Bits of a weight.
        group_size: Inputs that share a scale; -1 for a whole row, 0 for the tensor.
        sym: Whether zero is the middle level.
        static_inputs: Whether a scale of the layer's inputs is stored.
    """

    format: "Format"
    bits: int
    group_size: int
    sym: bool
    static_inputs: bool = False

    def groups(self, in_features: int) -> int:
        """How many scales one row has."""
        if self.group_size <= 0:
            return 1
        return -(-in_features // self.group_size)


class TensorSpec(NamedTuple):
    """What a tensor of a quantized layer must be.

    Attributes:
        shape: Its shape. A dimension of size 1 may be left out at the end.
        dtypes: Allowed dtypes, as safetensors names them.
        outputs: The dimension that runs along the layer's outputs, packed or not,
            counted from the end; None if the tensor belongs to all outputs.
        is_scale: Whether its numbers must be finite and not zero.
    """

    shape: tuple[int, ...]
    dtypes: frozenset[str]
    outputs: int | None = None
    is_scale: bool = False

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is the one."""
        one_less = self.shape[-1:] == (1,) and shape == self.shape[:-1]
        return shape == self.shape or one_less


class Format:
    """One way of storing a quantized weight.

    A new format is a subclass and one row in `vsraq.checkpoint.formats.FORMATS`.
    O is a layer's number of outputs, I that of its inputs.

    Attributes:
        kind: What `Verification.kind` calls it.
        exports: AutoRound's names of the formats that can yield it.
        auto_round: `data_type` and `bits` that name it in AutoRound's own config.
        compressed_tensors: `format` and the weights' `type` that name it in a config
            of compressed-tensors.
        suffixes: The tensors that a layer of it can have, "weight" left out: a layer
            with one of these is a quantized layer.
        optional: Those of `suffixes` that may be present although `layout` does not
            ask for them.
    """

    kind: str
    exports: tuple[str, ...]
    auto_round: tuple[str, int] | None = None
    compressed_tensors: tuple[str, str] | None = None
    suffixes: frozenset[str]
    optional: frozenset[str] = frozenset()

    def recognises(self, declared: Declared) -> bool:
        """Whether a config that says this means this format."""
        if declared.is_compressed_tensors:
            named = declared.packing, declared.data_type
            return named == self.compressed_tensors
        return (declared.data_type, declared.bits) == self.auto_round

    def scheme(self, declared: Declared) -> Scheme:
        """The scheme of layers of which a config says this."""
        return Scheme(
            self,
            declared.bits,
            declared.group_size,
            declared.sym,
            declared.static_inputs,
        )

    def layout(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """Suffix -> what it must be, of every tensor that a layer must have."""
        raise NotImplementedError

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The weight as numbers, in the format's own arithmetic.

        Args:
            tensors: Suffix -> tensor, of one layer, or of several layers of one shape
                with leading batch dimensions.
            scheme: Of these layers.

        Returns:
            (..., O, I), float32.
        """
        raise NotImplementedError

    def step(self, scheme: Scheme) -> float:
        """The step in the middle of a group's range, over its largest |weight|."""
        raise NotImplementedError

    def zero_points(
        self, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> Tensor | None:
        """The zero points minus the middle level, or None if it stores none."""
        return None

    def faults(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int
    ) -> list[str]:
        """Faults in one layer's tensors, each beginning with a suffix.

        Missing tensors, shapes, dtypes, scales and zero points are checked for every
        format; this is what only this format can know.

        Args:
            tensors: Suffix -> tensor, optional ones included.
            scheme: Of the layer.
            in_features: I.
        """
        return []


def some_outputs(
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, TensorSpec],
    start: int,
    stop: int,
    out_features: int,
) -> dict[str, Tensor]:
    """The tensors of some outputs of a layer.

    Args:
        tensors: Suffix -> tensor, with or without leading batch dimensions.
        layout: Of the whole layer.
        start: The first output, a multiple of 32: a packed word ends there.
        stop: The output after the last one, a multiple of 32, or O.
        out_features: O.
    """
    found = dict(tensors)
    for suffix, spec in layout.items():
        if spec.outputs is not None:
            size = tensors[suffix].shape[spec.outputs]
            low, high = (n * size // out_features for n in (start, stop))
            found[suffix] = tensors[suffix].narrow(spec.outputs, low, high - low)
    return found
