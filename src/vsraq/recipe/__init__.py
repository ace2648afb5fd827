# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file, one reproducible run."""

from vsraq.recipe.bits import bit_plan, make_plan, plan_path, with_bits
from vsraq.recipe.dry_run import describe_run
from vsraq.recipe.estimate import RunEstimate, estimate
from vsraq.recipe.inspect import Inspected, inspect
from vsraq.recipe.keys import Method
from vsraq.recipe.preflight import Estimate, check, check_file
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
    "Inspected",
    "Method",
    "Recipe",
    "RunEstimate",
    "bit_plan",
    "build",
    "check",
    "check_file",
    "describe_run",
    "estimate",
    "inspect",
    "load_recipe",
    "make_plan",
    "mask_path",
    "parse_recipe",
    "plan_path",
    "refuse_without_token_selection",
    "run",
    "select_tokens",
    "with_bits",
    "write_resolved",
]
