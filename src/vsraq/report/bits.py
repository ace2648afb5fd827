# SPDX-License-Identifier: Apache-2.0
"""Bits of an export's layers, from its config and the headers of its files."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vsraq.checkpoint.formats import own_suffixes

_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I64": 8, "F64": 8}
_PACKED = ("qweight", "weight_packed", "weight")
# what models call alike
_SHORT = ("self_attn.", "mlp.", "mixer.", "linear_attn.", "block_sparse_moe.")


@dataclass(frozen=True)
class Bits:
    """Bits per weight, without scales.

    Attributes:
        blocks: Blocks that have linear layers, ascending.
        kinds: Kinds of layers, in the order of the files; see `places`.
        cells: Mean bits by kind and block.
        outside: Bits of layers outside of the blocks, such as the output projection.
    """

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[str, int], float]
    outside: dict[str, float]


def read_bits(path: Path) -> Bits | None:
    """Read the bits of an export's linear layers.

    Args:
        path: Folder of the export.

    Returns:
        The bits, or None if it is no quantized checkpoint.

    Raises:
        CheckpointError: A file of it cannot be read.
        ValueError: It is quantized in a way that cannot be read.
    """
    from vsraq.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(path)
    if "quantization_config" not in checkpoint.config:
        return None
    sums: dict[tuple[str, int | None], list[float]] = {}
    with checkpoint:
        layers = {name: (bits, size) for name, bits, size in _layers(checkpoint)}
    found = places({name: size for name, (_, size) in layers.items()})
    for layer, (bits, size) in layers.items():
        total = sums.setdefault(found[layer], [0.0, 0.0])
        total[0] += bits * size
        total[1] += size
    means = {key: total[0] / total[1] for key, total in sums.items()}
    return Bits(
        blocks=tuple(sorted({b for _, b in means if b is not None})),
        kinds=tuple(dict.fromkeys(kind for kind, b in means if b is not None)),
        cells={(kind, b): v for (kind, b), v in means.items() if b is not None},
        outside={kind: v for (kind, b), v in means.items() if b is None},
    )


def places(weights: Mapping[str, float]) -> dict[str, tuple[str, int | None]]:
    """Find the kind and the block of each layer.

    A model may have several stacks of blocks: text, images, the prediction of further
    tokens. The stack with the most weights has plain kinds; those of the others begin
    with the name of their stack. Routed experts are one kind.

    Args:
        weights: How many weights each layer has, by its name.

    Returns:
        The kind, and the block's number in its stack, None outside of blocks; by name.
    """
    matches = {name: _BLOCK.match(name) for name in weights}
    sizes: dict[str, float] = {}
    for name, match in matches.items():
        if match is not None:
            sizes[match[1]] = sizes.get(match[1], 0) + weights[name]
    largest = max(sizes, key=sizes.__getitem__, default="")
    names = _stack_names([stack for stack in sizes if stack != largest])
    found: dict[str, tuple[str, int | None]] = {}
    for name, match in matches.items():
        if match is None:
            found[name] = (_short_kind(name), None)
            continue
        kind = _short_kind(re.sub(r"(^|\.)experts\b.*$", r"\1experts", match[3]))
        stack = names.get(match[1])
        found[name] = (f"{stack}: {kind}" if stack else kind, int(match[2]))
    return found


def _stack_names(stacks: list[str]) -> dict[str, str]:
    """Short names of stacks, "visual" for "model.visual.blocks", if they differ."""
    short = {s: s.removeprefix("model.").rpartition(".")[0] or s for s in stacks}
    return short if len(set(short.values())) == len(stacks) else {s: s for s in stacks}


def _short_kind(kind: str) -> str:
    """A kind of layers without what all models call alike."""
    for words in _SHORT:
        kind = kind.replace(words, "")
    return kind


def _layers(checkpoint: Any) -> Iterator[tuple[str, float, int]]:
    """Names of linear layers, their bits per weight, and how many weights they have."""
    own = own_suffixes()
    for layer, suffixes in checkpoint.suffixes().items():
        packed = next((s for s in _PACKED if s in suffixes), None)
        if suffixes & own and packed is not None:
            scheme = checkpoint.schemes(layer)
            if scheme is not None:
                header = checkpoint.header(f"{layer}.{packed}")
                size = prod(header.shape) * _BYTES.get(header.dtype, 1)
                yield layer, float(scheme.bits), size * 8 // scheme.bits
            continue
        # experts that are one tensor have no ".weight"
        for suffix in sorted(suffixes):
            header = checkpoint.header(f"{layer}.{suffix}" if layer else suffix)
            name = layer if suffix == "weight" else f"{layer}.{suffix}"
            fused = "experts" in name and len(header.shape) == 3
            linear = suffix == "weight" and len(header.shape) == 2
            if (fused or linear) and "embed" not in name:
                size = _BYTES.get(header.dtype, 1)
                yield name, 8.0 * size, prod(header.shape)
