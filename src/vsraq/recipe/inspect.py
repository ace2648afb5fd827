# SPDX-License-Identifier: Apache-2.0
"""What a recipe would do to its model, from the model's config alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.planning import Candidates, find_candidates, scheme_fields
from vsraq.bits import BitPlan
from vsraq.bits.budget import budget_bytes
from vsraq.bits.cost import PlanningCost
from vsraq.bits.engines import get_engine
from vsraq.bits.units import Unit, find_units
from vsraq.recipe.bits import check_bit_plan, plan_choices
from vsraq.recipe.layers import Layer, model_blocks, recipe_layers, tuned_blocks
from vsraq.recipe.model import model_config, skeleton
from vsraq.recipe.recipe import Recipe
from vsraq.recipe.streaming import check_streamed
from vsraq.routers import Router, find_routers


@dataclass(frozen=True)
class Inspected:
    """A recipe beside the skeleton of its model; no weight is loaded.

    Attributes:
        recipe: The recipe.
        config: The model's transformers config.
        model: The model, on meta.
        routers: Those of its routers that the recipe aligns.
        all_routers: Its routers.
        layers: The linear layers of its blocks, and its output projection if that is
            quantized; a bit plan is not in their schemes.
        plan: The bit plan, if there is one already.
    """

    recipe: Recipe
    config: Any
    model: nn.Module
    routers: Sequence[Router]
    all_routers: Sequence[Router]
    layers: Sequence[Layer]
    plan: BitPlan | None

    @property
    def parameters(self) -> int:
        """Weights of the model, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def outside(self) -> int:
        """Weights that are no linear layers of blocks: embedding, head, norms, ..."""
        return self.parameters - sum(layer.weights for layer in self.layers)

    @property
    def stored_width(self) -> int:
        """Bytes of a weight in the model's files, and of what stays as it is."""
        dtype = getattr(self.config, "dtype", None)
        return 4 if dtype == torch.float32 else 2

    @property
    def hidden(self) -> int:
        """Hidden width."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the decoder blocks."""
        return model_blocks(self.model, self.all_routers)

    @cached_property
    def tuned_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that are quantized."""
        return tuned_blocks(self.blocks, self.recipe)

    @cached_property
    def head(self) -> Layer | None:
        """The output projection, if it is quantized with the recipe's scheme."""
        inside = set(self.blocks)
        return next((x for x in self.layers if x.block not in inside), None)

    @property
    def block_layers(self) -> list[Layer]:
        """The linear layers of the decoder blocks."""
        return [layer for layer in self.layers if layer is not self.head]

    def uniform_bytes(self, export_format: str) -> int:
        """Compute the bytes of an export without a bit plan.

        Args:
            export_format: AutoRound's name of the export format.
        """
        inside = sum(
            layer.stored_bytes(export_format, self.stored_width)
            for layer in self.layers
        )
        return int(inside + self.stored_width * self.outside)

    @property
    def export_bytes(self) -> int:
        """Bytes of all exports: the plan's, or what its budget allows."""
        return sum(self._planned_bytes(form) for form in self.recipe.formats)

    def _planned_bytes(self, export_format: str) -> int:
        if self.plan is not None:
            return self.plan.bytes
        uniform = self.uniform_bytes(export_format)
        budget = self.recipe.bit_settings.get("budget", 0)
        return int(budget_bytes("bits.budget", budget, uniform))

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units of a bit plan that is still to be made; empty otherwise."""
        settings = self.recipe.bit_settings
        if not settings or self.plan is not None:
            return ()
        names = [layer.name for layer in self.block_layers if layer.is_quantized]
        engine = None if settings["engine"] == "none" else settings["engine"]
        return find_units(self.model, names, self.all_routers, get_engine(engine))

    @property
    def choices(self) -> list[str]:
        """The schemes that a bit plan chooses from, the recipe's first."""
        return [self.recipe.scheme.upper(), *plan_choices(self.recipe)]

    @cached_property
    def planning_cost(self) -> PlanningCost | None:
        """What making the bit plan costs; None if there is none to make."""
        units = self.units
        if not units:
            return None
        by_name = {layer.name: layer for layer in self.block_layers}
        position = {name: index for index, name in enumerate(self.blocks)}
        schemes = self._candidates(units).schemes
        starts = [0]  # the uniform scheme
        for unit in units:
            tried = [n for n in schemes[unit.name] if scheme_fields(n)["bits"] < 16]
            starts += [position[by_name[unit.layers[0]].block]] * len(tried)
        read = sum(layer.weights * layer.read for layer in self.block_layers)
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        blocks = len(self.blocks)
        return PlanningCost.of(
            starts,
            blocks,
            tokens=self.recipe.bit_settings["tokens"],
            hidden=self.hidden,
            block_weights=sum(layer.weights for layer in self.block_layers) / blocks,
            read_weights=read / blocks,
            head_weights=embedding.numel(),
        )

    def _candidates(self, units: Sequence[Unit]) -> Candidates:
        settings = self.recipe.bit_settings
        engine = None if settings["engine"] == "none" else settings["engine"]
        return find_candidates(
            units,
            {
                layer.name: layer.fields
                for layer in self.block_layers
                if layer.is_quantized
            },
            self.recipe.scheme.upper(),
            plan_choices(self.recipe),
            get_engine(engine),
            self.recipe.formats[0],
        )


def inspect(recipe: Recipe) -> Inspected:
    """Look at a recipe's model without loading a weight.

    Args:
        recipe: A valid recipe.

    Raises:
        FileNotFoundError: The model or the bit plan is missing.
        ValueError: The model's config cannot be read, it is no mixture of experts, or
            the bit plan is for another one, or AutoRound cannot stream it.
    """
    config = recipe.algorithm_config()
    found = model_config(recipe)
    check_streamed(found, recipe.model)
    model = skeleton(found, recipe)
    aligned = isinstance(config, VSRAQConfig) and config.alignment
    pattern = config.router_pattern if isinstance(config, VSRAQConfig) else None
    routers = find_routers(model, router_pattern=pattern)
    if not routers and (aligned or recipe.bits is not None):
        raise ValueError(
            f"model={recipe.model!r}: a {found.model_type} has no MoE router; "
            "allowed are mixture-of-experts models, or method: auto_round without bits"
        )
    plan = check_bit_plan(recipe, found)
    every = routers
    if recipe.bits is not None and pattern is not None:
        every = find_routers(model, router_pattern=pattern, others=True)
    layers = recipe_layers(model, every, recipe)
    return Inspected(recipe, found, model, routers, every, layers, plan)
