# SPDX-License-Identifier: Apache-2.0
"""Which tensors of an export belong to which tensors of the original."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vsraq.checkpoint.formats import own_suffixes
from vsraq.checkpoint.names import Part, StoredNames, pattern_of, unfused
from vsraq.checkpoint.reader import Checkpoint
from vsraq.checkpoint.reference import Reference


@dataclass(frozen=True)
class Piece:
    """A tensor of the original, or a part of one, and what it became.

    Attributes:
        source: The original's tensor.
        target: The export's name of it; of a quantized layer "<layer>.weight".
        part: Which part of a fused tensor it is.
    """

    source: str
    target: str
    part: Part | None = None

    @property
    def layer(self) -> str:
        """The target without its last part."""
        return self.target.rpartition(".")[0]


@dataclass
class Pairs:
    """Every tensor of the original, and every tensor of the export.

    Attributes:
        quantized: Pieces whose weight is stored quantized.
        plain: Pieces in full precision.
        missing: Targets that are not in the export.
        left_out: Tensors of the original's files that its model does not hold, and
            that the export does not have.
        extra: Tensors of the export that belong to nothing.
        layers: Layers with quantized weights, and the suffixes that each has.
    """

    quantized: list[Piece] = field(default_factory=list)
    plain: list[Piece] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    layers: dict[str, set[str]] = field(default_factory=dict)

    def _add(self, piece: Piece, export: Checkpoint) -> None:
        if piece.target.endswith(".weight") and piece.layer in self.layers:
            self.quantized.append(piece)
        elif piece.target in export:
            self.plain.append(piece)
        else:
            self.missing.append(piece.target)


def pair(export: Checkpoint, reference: Reference) -> Pairs:
    """Find for every tensor of both sides what it belongs to.

    Args:
        export: The export.
        reference: The original.
    """
    pairs = Pairs()
    of_quantized = own_suffixes()
    for owner, suffixes in export.suffixes().items():
        packed = suffixes & of_quantized
        if any(f"{owner}.{suffix}" not in reference.shapes for suffix in packed):
            pairs.layers[owner] = suffixes & (of_quantized | {"weight"})
    tied = _tied(reference)
    for name, shape in reference.shapes.items():
        targets = _targets(name, shape, export, pairs.layers)
        if targets is not None:
            for target, part in targets:
                pairs._add(Piece(name, target, part), export)
        elif name in tied and _holds(export, pairs, tied[name]):
            pairs.left_out.append(name)
        elif reference.needed(name):
            pairs.missing.append(name)
        else:
            pairs.left_out.append(name)
    for name, other in tied.items():  # stored twice, where the original has it once
        if name not in reference.shapes and other in reference.shapes:
            if name in export or name.removesuffix(".weight") in pairs.layers:
                pairs._add(Piece(other, name), export)
    used = {piece.target for piece in pairs.plain}
    known = {piece.layer for piece in pairs.quantized}
    for name in export:
        owner, _, suffix = name.rpartition(".")
        belongs = owner in known and suffix in pairs.layers[owner]
        if name not in used and not belongs:
            pairs.extra.append(name)
    return pairs


def _targets(
    name: str,
    shape: tuple[int, ...],
    export: Checkpoint,
    layers: Mapping[str, set[str]],
) -> list[tuple[str, Part | None]] | None:
    """What a tensor became, or None if the export has nothing of it."""
    if name in export or name.removesuffix(".weight") in layers:
        return [(name, None)]
    found = unfused(name, shape)
    if any(t in export or t.removesuffix(".weight") in layers for t, _ in found):
        return found
    return None


def _tied(reference: Reference) -> dict[str, str]:
    """Stored name -> the other stored name of the same tensor."""
    tied = getattr(reference.module, "all_tied_weights_keys", None) or {}
    stored = StoredNames(reference.module)
    return {stored(name): stored(other) for name, other in tied.items()}


def _holds(export: Checkpoint, pairs: Pairs, name: str) -> bool:
    return name in export or name.removesuffix(".weight") in pairs.layers


class Parts:
    """Parts of the original's tensors, as the export's layers have them.

    A fused tensor of experts may be transposed, and its gate and up projections may
    lie one after the other or in turn. All tensors of a pattern lie alike: whichever
    way fits the first of them best is taken for all.

    Args:
        reference: The original.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._ways: dict[str, int] = {}
        self._name = ""
        self._tensor: Tensor | None = None

    def whole(self, name: str) -> Tensor:
        """A tensor of the original; the last one read stays in memory."""
        if self._tensor is None or self._name != name:
            self._tensor = None  # before the next one is read
            self._tensor, self._name = self._reference[name], name
        return self._tensor

    def shapes(self, piece: Piece) -> list[tuple[int, ...]]:
        """The shapes that a piece can have."""
        shape = self._reference.shapes[piece.source]
        if piece.part is None:
            return [shape]
        one = list(shape[1:])
        found = []
        for sizes in (one, one[::-1]):
            rows = sizes[0] if piece.part.half is None else sizes[0] // 2
            found.append((rows, *sizes[1:]))
        return list(dict.fromkeys(found))

    def ways(self, piece: Piece) -> list[Tensor]:
        """Every reading of a piece."""
        tensor = self.whole(piece.source)
        if piece.part is None:
            return [tensor]
        one = tensor[piece.part.expert]
        views = [one, one.mT] if one.ndim == 2 else [one]
        half = piece.part.half
        if half is None:
            return views
        halves = [view.chunk(2)[half] for view in views]
        return halves + [view[half::2] for view in views]

    def get(self, piece: Piece, like: Tensor) -> Tensor | None:
        """A piece, or None if it cannot have the shape of what it became.

        Args:
            piece: The piece.
            like: What it became, as numbers.
        """
        if piece.part is None:
            whole = self.whole(piece.source)
            return whole if whole.shape == like.shape else None
        ways = self.ways(piece)
        pattern = pattern_of(piece.source)
        if pattern not in self._ways:
            fitting = [i for i, way in enumerate(ways) if way.shape == like.shape]
            if not fitting:
                return None
            self._ways[pattern] = min(
                fitting, key=lambda i: float((ways[i].float() - like).norm())
            )
        way = ways[self._ways[pattern]]
        return way if way.shape == like.shape else None
