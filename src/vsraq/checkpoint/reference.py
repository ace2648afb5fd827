# SPDX-License-Identifier: Apache-2.0
"""What an export is compared with: a folder, or a model in memory.

Both hand out tensors by the names that they have, or would have, on disk.
"""

import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vsraq.checkpoint.faults import CheckpointError
from vsraq.checkpoint.load import local_folder, model_class
from vsraq.checkpoint.names import block_of
from vsraq.checkpoint.reader import Checkpoint

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_COMPANIONS = ("_scale_inv", "_scale")  # of an FP8 weight, in the order they are tried


class Reference(Protocol):
    """The original, by stored names.

    Attributes:
        module: The model; on meta where the reference is a folder.
        shapes: The shape of every tensor.
        tuned: Whether its layers hold the tuned weights.
        rounded: Names of tensors that were 8-bit floats on disk: their numbers follow
            from a product, so they are equal up to its rounding.
    """

    module: nn.Module
    shapes: dict[str, tuple[int, ...]]
    tuned: bool
    rounded: frozenset[str]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def needed(self, name: str) -> bool:
        """Whether the model holds this tensor; files may hold others."""


class Folder:
    """A full-precision checkpoint on disk, or one with FP8 weights and their scales.

    Args:
        path: The folder, or the name of a model in the hub's cache.
        trust_remote_code: As in transformers.
        stack: Closes the files.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: It cannot be read.
        ValueError: It is quantized.
    """

    tuned = False

    def __init__(self, path: Path, trust_remote_code: bool, stack: ExitStack) -> None:
        self._files = stack.enter_context(Checkpoint(path))
        if self._files.missing:
            raise CheckpointError(path, self._files.missing)
        method = (self._files.config.get("quantization_config") or {}).get(
            "quant_method"
        )
        if method not in (None, "fp8"):
            raise ValueError(
                f"reference={str(path)!r}: quant_method={method!r}; allowed are "
                "full-precision checkpoints, and FP8 ones with a scale per block"
            )
        self._scales: dict[str, str] = {}
        for name in self._files:
            if self._files.header(name).dtype in _FLOAT8:
                for ending in _COMPANIONS:
                    if f"{name}{ending}" in self._files:
                        self._scales[name] = f"{name}{ending}"
                        break
        companions = set(self._scales.values())
        self.rounded = frozenset(self._scales)
        self.shapes = {
            name: self._files.header(name).shape
            for name in self._files
            if name not in companions
        }
        self.module = _skeleton(path, trust_remote_code)
        held = stored_shapes(self.module)
        # If the files lack some of the model's names, we cannot tell which of their
        # tensors the model holds, so all of them count.
        tied = getattr(self.module, "all_tied_weights_keys", None) or {}
        understood = all(name in self.shapes or name in tied for name in held)
        self._needed = frozenset(held) if understood else frozenset(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._files[name]
        scale = self._scales.get(name)
        return tensor if scale is None else _from_fp8(tensor, self._files[scale])

    def needed(self, name: str) -> bool:
        """See `Reference`."""
        return name in self._needed


class InMemory:
    """A model in memory, full-precision or tuned.

    Args:
        module: The model.
    """

    rounded: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tuned = any(
            hasattr(layer, "bits")
            for layer in module.modules()
            if isinstance(layer, nn.Linear)
        )
        self._own = own_tensors(module)
        self._block = ""
        self._tensors: dict[str, Tensor] = {}
        blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._own.items():
            blocks[block_of(name)][name] = tensor
        self._blocks = blocks
        self._block_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for block, tensors in blocks.items():
            metas = {n: torch.empty_like(t, device="meta") for n, t in tensors.items()}
            for name, meta in _stored(module, metas).items():
                self._block_of[name] = block
                self.shapes[name] = tuple(meta.shape)

    def __getitem__(self, name: str) -> Tensor:
        block = self._block_of[name]
        if block != self._block or not self._tensors:
            self._tensors = _stored(self.module, self._blocks[block])
            self._block = block
        return self._tensors[name].detach().cpu()

    def needed(self, name: str) -> bool:
        """See `Reference`."""
        return True


def open_reference(
    reference: nn.Module | str | Path, trust_remote_code: bool, stack: ExitStack
) -> Reference:
    """The reference of `vsraq.checkpoint.verify`, whatever it was given as."""
    if isinstance(reference, nn.Module):
        return InMemory(reference)
    return Folder(local_folder(reference), trust_remote_code, stack)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under its own names, AutoRound's wrappers left out.

    Of a tuned layer these are its weight and bias; the others record its tuning.
    """
    tensors: dict[str, Tensor] = {}
    notes: set[str] = set()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and hasattr(layer, "bits"):
            notes.add(name)
    for name, tensor in module.state_dict().items():
        owner, _, suffix = name.rpartition(".")
        if owner in notes and suffix not in ("weight", "bias"):
            continue
        if owner.endswith(".orig_layer") or f"{owner}.orig_layer" not in notes:
            tensors[name.replace(".orig_layer.", ".")] = tensor
    return tensors


def stored_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a model's tensors have on disk."""
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in module.state_dict().items():
        blocks[block_of(name)][name] = torch.empty_like(tensor, device="meta")
    return {
        name: tuple(tensor.shape)
        for metas in blocks.values()
        for name, tensor in _stored(module, metas).items()
    }


def _stored(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(module, PreTrainedModel):
        return tensors
    found: dict[str, Tensor] = revert_weight_conversion(module, tensors)
    return found


def _from_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 numbers times the scale of their block, as bfloat16."""
    values, factors = weight.float(), scale.float()
    if factors.ndim == 2 and factors.numel() > 1:
        for dim in (0, 1):
            size = math.ceil(values.shape[dim] / factors.shape[dim])
            factors = factors.repeat_interleave(size, dim)
        factors = factors[: values.shape[0], : values.shape[1]]
    return (values * factors).bfloat16()


def _skeleton(path: Path, trust_remote_code: bool) -> nn.Module:
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = model_class(config.to_dict()).from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model
