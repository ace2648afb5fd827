# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: in the module, in the original's files, in the export's files.

transformers renames tensors between its modules and files, AutoRound takes fused
experts apart, and keeps the names of its own parts:

    original's file                         export
    mlp.experts.3.up_proj.weight            mlp.experts.3.up_proj.*
    mlp.experts.gate_up_proj (E, 2I, H)     mlp.experts.3.{gate,up}_proj.*
    block_sparse_moe.experts.3.w1.weight    block_sparse_moe.experts.3.gate_proj.*
    block_sparse_moe.input_linear.weight    block_sparse_moe.experts.3.{gate,up}_proj.*
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ONE_EXPERT = re.compile(r"^(.*\.experts\.\d+)\.(w1|w2|w3)\.(weight|bias)$")
_UNFUSED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_FUSED = re.compile(
    r"^(.*?)(\.experts)?\.(gate_up_proj|down_proj|gate_proj|up_proj|input_linear|"
    r"output_linear|fc1|fc2)(|\.weight|\.bias|_bias)$"
)
_GATE_AND_UP = ("gate_proj", "up_proj")
_HALVES: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": _GATE_AND_UP,
    "input_linear": _GATE_AND_UP,
    "fc1": _GATE_AND_UP,
    "down_proj": ("down_proj",),
    "output_linear": ("down_proj",),
    "fc2": ("down_proj",),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
}


class StoredNames:
    """Names of a model's tensors on disk, where transformers renames them.

    Mixtral's `model.layers.3.mlp.gate.weight`, for example, is stored as
    `model.layers.3.block_sparse_moe.gate.weight`. Names that differ only in their
    numbers are renamed alike, so each pattern is looked up once.

    Args:
        module: The model. If it is not one of transformers, names stay as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._model = module if isinstance(module, PreTrainedModel) else None
        self._patterns: dict[str, list[str]] = {}

    def __call__(self, name: str) -> str:
        """The stored name, or the module's if it is stored as several tensors."""
        if self._model is None:
            return name
        numbers = _NUMBER.findall(name)
        pattern = _NUMBER.sub("#", name)
        if pattern not in self._patterns:
            empty = torch.empty(0, 0, device="meta")  # some are transposed, too
            stored = list(revert_weight_conversion(self._model, {name: empty}))
            renamed = stored[0] if len(stored) == 1 else name  # or into several
            self._patterns[pattern] = _NUMBER.split(renamed)
        pieces = self._patterns[pattern]
        if len(pieces) != len(numbers) + 1:
            return name
        return pieces[0] + "".join(
            number + piece for number, piece in zip(numbers, pieces[1:], strict=True)
        )


class OwnNames:
    """The module's names of layers, from the names that they are stored under.

    Experts are stored under names that no module has. The part before "experts" is
    renamed as in the names of the tensors beside them.

    Args:
        pairs: The module's name and the stored one, of every tensor of a model.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._prefixes: dict[str, str] = {}
        unchanged: set[str] = set()
        for name, stored in pairs:
            a, b = name.split("."), stored.split(".")
            if name == stored:
                unchanged.update(".".join(b[:end]) for end in range(len(b)))
                continue
            while a and b and a[-1] == b[-1]:
                del a[-1], b[-1]
            self._prefixes.setdefault(".".join(b), ".".join(a))
        for prefix in unchanged:  # a tensor that moved does not take the others along
            self._prefixes.pop(prefix, None)

    def __call__(self, stored: str) -> str:
        """The module's name, or the stored one if nothing is renamed."""
        parts = stored.split(".")
        for end in range(len(parts), 0, -1):
            renamed = self._prefixes.get(".".join(parts[:end]))
            if renamed is not None:
                return ".".join([renamed, *parts[end:]])
        return stored


@dataclass(frozen=True)
class Part:
    """A part of a fused tensor of the original.

    Attributes:
        expert: Its index along the first dimension.
        half: 0 for the gate, 1 for the up projection, None if they are not fused.
    """

    expert: int
    half: int | None


def unfused(name: str, shape: tuple[int, ...]) -> list[tuple[str, Part | None]]:
    """What the export may call a tensor of the original, and which part of it.

    Args:
        name: As stored with the original.
        shape: Its shape there.

    Returns:
        Names of tensors ("...up_proj.weight", "...up_proj.bias"); empty where the
        export can only call it as the original does.
    """
    if one := _ONE_EXPERT.match(name):
        return [(f"{one[1]}.{_UNFUSED[one[2]]}.{one[3]}", None)]
    match = _FUSED.match(name)
    if match is None:
        return []
    kind = "bias" if "bias" in match[4] else "weight"
    if len(shape) != (3 if kind == "weight" else 2):
        return []
    halves = _HALVES[match[3]]
    return [
        (
            f"{match[1]}.experts.{expert}.{half}.{kind}",
            Part(expert, index if len(halves) > 1 else None),
        )
        for expert in range(shape[0])
        for index, half in enumerate(halves)
    ]


def block_of(name: str) -> str:
    """`model.layers.3` from the name of anything inside that block."""
    match = re.match(r"^(.*?\.\d+)\.", name)
    return match[1] if match else ""


def pattern_of(name: str) -> str:
    """The name without its numbers: the same for all layers."""
    return _NUMBER.sub("#", name)
