# SPDX-License-Identifier: Apache-2.0
"""Compare what an export stores in full precision with what the original holds."""

import torch
from torch import Tensor

from vsraq.checkpoint.pairing import Pairs, Parts, Piece
from vsraq.checkpoint.reader import Checkpoint
from vsraq.checkpoint.reference import Reference

REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PlainTensors:
    """Check the tensors of an export that are in full precision.

    Args:
        export: The export.
        reference: The original.
        parts: Of the original.
        pairs: What belongs to what.

    Attributes:
        declared: The dtype that the export's config declares, or None.
        faults: What was found.
    """

    def __init__(
        self, export: Checkpoint, reference: Reference, parts: Parts, pairs: Pairs
    ) -> None:
        self.declared = _declared_dtype(export)
        self.faults: list[str] = []
        self._export = export
        self._reference = reference
        self._parts = parts
        self._pairs = pairs

    def check(self, piece: Piece) -> None:
        """Check one tensor."""
        exported = self._export[piece.target]
        expected = self._parts.get(piece, exported)
        if expected is None:
            self.faults.append(
                f"{piece.target}: shape {tuple(exported.shape)}, the original's is "
                f"{' or '.join(map(str, self._parts.shapes(piece)))}"
            )
            return
        fault = _fault(
            piece.target,
            exported,
            expected,
            self.declared,
            rounded=piece.source in self._reference.rounded,
            beside_quantized=piece.layer in self._pairs.layers,
        )
        if fault:
            self.faults.append(fault)


def _declared_dtype(export: Checkpoint) -> torch.dtype | None:
    config = export.config
    name = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _fault(
    name: str,
    exported: Tensor,
    expected: Tensor,
    declared: torch.dtype | None,
    *,
    rounded: bool,
    beside_quantized: bool,
) -> str | None:
    """What is wrong with a tensor in full precision, or None.

    It must be the original's after the cast to its own dtype. That dtype must be the
    original's, the config's, float32, or, beside a quantized weight, float16.

    Args:
        name: The export's name of it.
        exported: The export's tensor.
        expected: The original's.
        declared: The dtype of the export's config.
        rounded: Whether the original's follows from FP8 numbers and their scales.
        beside_quantized: Whether it belongs to a quantized layer.
    """
    if exported.shape != expected.shape:
        return (
            f"{name}: shape {tuple(exported.shape)}, the original's is "
            f"{tuple(expected.shape)}"
        )
    if expected.dtype not in REAL:
        same = exported.dtype == expected.dtype and torch.equal(exported, expected)
        return None if same else f"{name}: differs from the original's"
    allowed = {expected.dtype, declared, torch.float32}
    if beside_quantized:
        allowed.add(torch.float16)
    if exported.dtype not in REAL or exported.dtype not in allowed:
        return (
            f"{name}: {exported.dtype}, the original's is {expected.dtype} and the "
            f"config declares {declared}"
        )
    if same_numbers(exported, expected):
        return None
    difference = (exported.float() - expected.float()).abs()
    if rounded and bool((difference <= 2**-7 * expected.float().abs()).all()):
        return None
    if not exported.isfinite().all():
        return f"{name}: not finite, unlike the original's"
    return f"{name}: differs from the original's by up to {float(difference.max()):.3g}"


def same_numbers(exported: Tensor, expected: Tensor) -> bool:
    """Whether a tensor is another one in its own dtype; NaN equals NaN here."""
    cast = expected.to(exported.dtype)
    if torch.equal(exported, cast):
        return True
    if not bool(expected.isnan().any()):
        return False
    return torch.equal(exported.nan_to_num(), cast.nan_to_num()) and torch.equal(
        exported.isnan(), cast.isnan()
    )
