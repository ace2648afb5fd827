# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file, one reproducible run."""

from vsraq.recipe.keys import Method
from vsraq.recipe.preflight import Estimate, check
from vsraq.recipe.recipe import Calibration, Recipe, load_recipe, parse_recipe
from vsraq.recipe.run import (
    build,
    mask_path,
    refuse_without_token_selection,
    run,
    select_tokens,
    write_resolved,
)

__all__ = [
    "Calibration",
    "Estimate",
    "Method",
    "Recipe",
    "build",
    "check",
    "load_recipe",
    "mask_path",
    "parse_recipe",
    "refuse_without_token_selection",
    "run",
    "select_tokens",
    "write_resolved",
]
