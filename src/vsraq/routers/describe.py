# SPDX-License-Identifier: Apache-2.0
"""From a linear map beside experts to the description of a router."""

from typing import TypeAlias

from torch import nn

from vsraq.routers.experts import rows_of
from vsraq.routers.learn import LearnedRule, learn_rule
from vsraq.routers.router import Router

# How routers of one class and configuration were found to choose.
Learned: TypeAlias = dict[tuple[object, ...], LearnedRule]


def describe(
    module: nn.Module,
    parent_name: str,
    name: str,
    experts: int,
    learned: Learned,
) -> Router:
    """Describe a router, by the name of its linear map inside the module around it."""
    parent = module.get_submodule(parent_name)
    # the child that holds the map: what the parent calls
    owner_name, _, linear = name.partition(".")
    owner = parent.get_submodule(owner_name)
    num_experts = rows_of(parent.get_submodule(name))
    prefix = f"{parent_name}." if parent_name else ""

    def first(*attributes: str) -> int | None:
        config = getattr(parent, "config", None)
        for attribute in attributes:
            for place in (owner, parent, config):
                value = getattr(place, attribute, None)
                if isinstance(value, int):
                    return value
        return None

    groups = first("num_group", "n_group") or 1, first("topk_group") or 1
    key = (
        type(owner),
        linear,
        groups,
        *(str(v) for v in vars(owner).values() if isinstance(v, int | float | str)),
        *(tuple(parameter.shape) for parameter in owner.parameters()),
    )
    if key not in learned:
        learned[key] = learn_rule(parent, owner_name, linear, num_experts, groups)
    choice = learned[key]
    if choice.rule is None and experts < num_experts:
        # rows after those of the experts may belong to shared ones
        fewer = learn_rule(parent, owner_name, linear, experts, groups)
        if fewer.rule is not None:
            choice, num_experts = fewer, experts
    top_k = choice.top_k or first("top_k", "num_experts_per_tok")
    if top_k is None:
        raise ValueError(
            f"router {prefix + name!r} ({type(owner).__name__}): neither it nor its "
            f"parent {type(parent).__name__} has top_k or num_experts_per_tok; allowed "
            "is an int on one of them, so set it before the run"
        )
    bias = choice.correction_bias
    return Router(
        name=prefix + (name if choice.calls_linear else owner_name),
        top_k=top_k,
        num_experts=num_experts,
        rule=choice.rule,
        correction_bias=None if bias is None else prefix + bias,
        unverified=choice.unverified,
    )
