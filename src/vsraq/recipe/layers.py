# SPDX-License-Identifier: Apache-2.0
"""The layers that a recipe quantizes, read off its model on meta."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from auto_round.scheme_entry import preview_resolved_attrs
from torch import nn

from vsraq.autoround.planning import scheme_fields
from vsraq.bits.sizes import layer_bytes
from vsraq.blocks import decoder_blocks
from vsraq.checkpoint.planned import is_ignored, to_pattern
from vsraq.recipe.recipe import Recipe
from vsraq.routers import Router, expert_containers, linear_map

_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block, or one matrix of each expert.

    Attributes:
        name: Its qualified name; of experts, that of the first one.
        block: Qualified name of the decoder block that it is in, or its own name if it
            is the output projection.
        out_features: Rows.
        in_features: Columns.
        copies: How many there are: E for experts, else 1.
        read: The share of them that one token reads.
        fields: Its scheme, by AutoRound's names; of 16 bits if it is left out.
    """

    name: str
    block: str
    out_features: int
    in_features: int
    copies: int
    read: float
    fields: Mapping[str, Any]

    @property
    def weights(self) -> int:
        """Weights of all copies."""
        return self.copies * self.out_features * self.in_features

    @property
    def is_quantized(self) -> bool:
        """Whether it gets fewer than 16 bits."""
        return int(self.fields["bits"]) < 16

    def stored_bytes(self, export_format: str, width: int) -> float:
        """Return its bytes in an export.

        Args:
            export_format: AutoRound's name of the export format.
            width: Bytes of a weight that is not quantized.
        """
        shape = self.out_features, self.in_features
        if not self.is_quantized:
            return float(width * self.weights)
        try:
            return float(self.copies * layer_bytes(self.fields, *shape, export_format))
        except ValueError:  # a scheme whose layout is not known: numbers and scales
            group = self.fields["group_size"]
            scales = 2 / group if isinstance(group, int) and group > 0 else 0.0
            return self.weights * (self.fields["bits"] / 8 + scales)


def model_blocks(model: nn.Module, routers: Sequence[Router]) -> tuple[str, ...]:
    """Return a model's decoder blocks: those of its longest list without routers."""
    found = decoder_blocks(model, routers)
    if found:
        return found
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        return ()
    name = max(lists, key=lambda n: len(lists[n]))
    return tuple(f"{name}.{child}" for child, _ in lists[name].named_children())


def tuned_blocks(blocks: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Return the blocks that a recipe quantizes, by AutoRound's rule.

    Args:
        blocks: Names of the model's decoder blocks.
        recipe: The recipe, whose `runtime.to_quant_block_names` may name some.

    Raises:
        ValueError: It names none of them.
    """
    said = recipe.runtime.get("to_quant_block_names", "")
    names = [name.strip() for name in said.split(",") if name.strip()]
    if not names:
        return tuple(blocks)
    try:
        found = tuple(b for b in blocks if any(re.search(n, b) for n in names))
    except re.error as error:
        raise ValueError(
            f"runtime.to_quant_block_names={said!r}: no pattern ({error}); allowed are "
            "parts of blocks' names, or regular expressions"
        ) from error
    if not found:
        raise ValueError(
            f"runtime.to_quant_block_names={said!r}: no block has such a name; allowed "
            f"are parts of names such as {blocks[0]}"
        )
    return found


def recipe_layers(
    model: nn.Module, routers: Sequence[Router], recipe: Recipe
) -> list[Layer]:
    """Find the linear layers of a model's blocks, and what a recipe gives them.

    The output projection is among them if the recipe quantizes it.

    Args:
        model: The recipe's model, on meta.
        routers: Its routers, which keep full precision.
        recipe: The recipe; a bit plan is not looked at.

    Raises:
        ValueError: A pattern of the recipe is none, or names no block.
    """
    default = dict(preview_resolved_attrs(recipe.algorithm_config(), recipe.scheme))
    tuned = set(tuned_blocks(model_blocks(model, routers), recipe))
    found = [
        Layer(name, block, rows, columns, copies, read, _fields(name, default, recipe))
        for name, block, rows, columns, copies, read in _matrices(model, routers)
        # AutoRound leaves such layers, as the gate of a shared expert, as they are
        if rows % 32 == 0 and columns % 32 == 0
    ]
    found = [
        layer if layer.block in tuned else replace(layer, fields=_unquantized(layer))
        for layer in found
    ]
    return [*found, *_head(model, recipe, default)]


def _unquantized(layer: Layer) -> dict[str, Any]:
    return {**layer.fields, "bits": 16, "act_bits": 16}


def _head(
    model: nn.Module, recipe: Recipe, default: Mapping[str, Any]
) -> Iterator[Layer]:
    """Yield the output projection, if it is quantized: AutoRound leaves tied ones."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    name = next((n for n, m in model.named_modules() if m is head), "")
    wanted = recipe.runtime.get("quant_lm_head", False)
    wanted = wanted or name in recipe.runtime.get("layer_config", {})
    config: Any = model.config
    if not wanted or head is None or getattr(config, "tie_word_embeddings", False):
        return
    rows, columns = head.weight.shape
    fields = _fields(name, default, recipe)
    if rows % 32 == 0 and columns % 32 == 0 and int(fields["bits"]) < 16:
        yield Layer(name, name, rows, columns, 1, 1.0, fields)


def _fields(name: str, default: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says of a layer; `ignore_layers` comes first."""
    ignored = recipe.runtime.get("ignore_layers", "")
    if is_ignored(name, ignored):
        return {**default, "bits": 16}
    fields = dict(default)
    for key, entry in recipe.runtime.get("layer_config", {}).items():
        if name == key or _pattern(key).search(name):
            said = {"scheme": entry} if isinstance(entry, str) else entry
            said = {n: v for n, v in said.items() if v is not None}
            scheme = said.pop("scheme", None)
            fields |= (dict(scheme_fields(scheme)) if scheme else {}) | said
    return fields


def _pattern(key: str) -> re.Pattern[str]:
    try:
        return to_pattern(key)
    except re.error as error:
        raise ValueError(
            f"runtime.layer_config.{key}: no pattern ({error}); allowed is a part of a "
            "layer's name, or a regular expression"
        ) from error


def _matrices(
    model: nn.Module, routers: Sequence[Router]
) -> Iterator[tuple[str, str, int, int, int, float]]:
    """Yield name, block, rows, columns, copies and read share of every matrix."""
    kept = {id(linear_map(model.get_submodule(r.name))) for r in routers}
    containers = expert_containers(model, routers)
    shares = {r.name.rpartition(".")[0]: r.top_k / r.num_experts for r in routers}
    for block in model_blocks(model, routers):
        for inner, module in model.get_submodule(block).named_modules():
            name = f"{block}.{inner}"
            container = next(
                (c for c in containers if name == c or name.startswith(f"{c}.")), None
            )
            parent = (container or "").rpartition(".")[0]
            read = shares.get(parent, 1.0) if container else 1.0
            if isinstance(module, nn.Linear) and id(module) not in kept:
                shape = module.out_features, module.in_features
                yield name, block, *shape, 1, read
            elif name == container:
                hidden = model.config.get_text_config().hidden_size  # type: ignore
                for part, rows, columns, copies in _stacks(module, hidden):
                    yield f"{name}.0.{part}", block, rows, columns, copies, read


def _stacks(experts: nn.Module, hidden: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield the matrices in a module that holds all experts in stacks, (E, ., .)."""
    for part, stack in experts.named_parameters(recurse=False):
        if stack.ndim != 3:
            continue
        copies, first, second = stack.shape
        inner = second if first == hidden else first
        if "down" in part or part in ("w2", "output_linear"):
            yield part, hidden, inner, copies
            continue
        halves = _HALVES.get(part, (part,))
        for half in halves:
            yield half, inner // len(halves), hidden, copies
