# SPDX-License-Identifier: Apache-2.0
"""Routers: find them, learn how they choose, compute what they compute."""

from vsraq.routers.experts import count_experts, expert_containers, experts_of_routers
from vsraq.routers.find import declared_router_classes, find_routers
from vsraq.routers.router import (
    BoundRouter,
    Compared,
    Router,
    linear_map,
    router_logits,
    routers_inside,
)
from vsraq.routers.rule import SelectionRule

__all__ = [
    "BoundRouter",
    "Compared",
    "Router",
    "SelectionRule",
    "count_experts",
    "declared_router_classes",
    "expert_containers",
    "experts_of_routers",
    "find_routers",
    "linear_map",
    "router_logits",
    "routers_inside",
]
