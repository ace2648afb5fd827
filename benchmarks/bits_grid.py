# SPDX-License-Identifier: Apache-2.0
"""The cells of `benchmarks/bits.py`: budgets, ways to spend bytes, and recipes."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import routing

SCHEMES = ("W4A16", "W3A16", "NVFP4")
# plain AutoRound, our default, and the default's parts
RECIPES: dict[str, dict[str, Any] | None] = {
    "AutoRound": None,
    "default": {},
    "re-fit": {"realign_routers": True},
    "own + re-fit": {"router_weight": "auto", "realign_routers": True},
    "next + re-fit": {"next_router_weight": "auto", "realign_routers": True},
}


@dataclass(frozen=True)
class Budget:
    """Bytes to spend, and who has to load the result.

    Attributes:
        share: Beyond the uniform export, %; None for the bytes of all attention and
            shared experts in 8 bits.
        engine: Whose rules plans and AutoScheme obey.
    """

    share: float | None
    engine: str | None


BUDGETS = {
    "uniform": Budget(0.0, None),
    "-3 %": Budget(-3.0, None),
    "0 %": Budget(0.0, None),
    "+1 % vllm": Budget(1.0, "vllm"),
    "+2 % vllm": Budget(2.0, "vllm"),
    "+3 % vllm": Budget(3.0, "vllm"),
    "+3 %": Budget(3.0, None),
    "+4 %": Budget(4.0, None),
    "mixed": Budget(None, "vllm"),
}
WITH_HEAD = "plan, output head too"
ROUTING = "plan, KL and routing"  # both as shares of the uniform scheme's
PLANS = ("plan", ROUTING, WITH_HEAD)
RANDOM = tuple(f"random {draw}" for draw in range(3))
# scheme -> budget -> ways to spend it
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "W4A16": {
        "uniform": ("uniform", "groups of 64", "groups of 32"),
        "0 %": (*PLANS, "AutoScheme", *RANDOM),
        "+3 % vllm": ("plan", ROUTING, "AutoScheme", "attention first", *RANDOM),
        "mixed": ("plan", "W4A16_MIXED"),
        "-3 %": ("plan",),
        "+1 % vllm": ("plan",),
        "+2 % vllm": ("plan",),
        "+4 %": ("plan",),
    },
    "W3A16": {
        "uniform": ("uniform", "groups of 64"),
        "0 %": (*PLANS, "AutoScheme", *RANDOM),
        "+3 %": ("plan", "AutoScheme", "attention first"),
        "-3 %": ("plan",),
    },
    "NVFP4": {
        "uniform": ("uniform",),
        "+4 %": ("plan", ROUTING, "AutoScheme", "attention first", *RANDOM),
    },
}


@dataclass(frozen=True)
class Cell:
    """One run; its fields are the key of its line in the results file."""

    model: str
    weights: str
    scheme: str
    budget: str
    way: str
    recipe: str
    seed: int
    iters: int
    nsamples: int
    windows: int


def grid(arguments: argparse.Namespace) -> Iterator[Cell]:
    for seed in arguments.seeds:
        for model in arguments.models:
            weights = routing.weights_hash(model)
            for scheme in arguments.schemes:
                for budget, ways in WAYS[scheme].items():
                    for way in ways:
                        for recipe in arguments.recipes:
                            if arguments.budgets and budget not in arguments.budgets:
                                continue
                            if arguments.ways and way not in arguments.ways:
                                continue
                            yield Cell(
                                model,
                                weights,
                                scheme,
                                budget,
                                way,
                                recipe,
                                seed,
                                arguments.iters,
                                arguments.nsamples,
                                arguments.windows,
                            )


def key(result: Mapping[str, Any]) -> Cell:
    return Cell(**{name: result[name] for name in Cell.__dataclass_fields__})
