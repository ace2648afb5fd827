# SPDX-License-Identifier: Apache-2.0
"""A router: where it is, how it chooses, and, bound to a model, what it computes.

Shapes: T tokens, E experts, K top-k, H hidden width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vsraq.routers.rule import HIGHEST_LOGITS, SelectionRule

# what an objective reads of a router: its logits (T, E), or its inputs (T, H)
Compared: TypeAlias = Literal["logits", "inputs"]


@dataclass(frozen=True)
class Router:
    """The description of one router of a model or block; it holds no tensors.

    Attributes:
        name: Qualified name, inside the module that was searched, of the module that is
            called with the hidden states: the linear map to logits, or one around it
            that uses its weight without calling it; see `linear_map`.
        top_k: K, experts per token.
        num_experts: E.
        rule: How it chooses, or None if its choice follows no known rule.
        correction_bias: Qualified name of the bias, E values, added to the scores for
            the choice only, or None.
        unverified: Empty if the rule was learned from the router's own choices;
            otherwise why it could not be, and what is known of it.
    """

    name: str
    top_k: int
    num_experts: int
    rule: SelectionRule | None = HIGHEST_LOGITS
    correction_bias: str | None = None
    unverified: str = field(default="", compare=False)

    def bind(self, root: nn.Module) -> "BoundRouter":
        """Bind the router to its tensors.

        Args:
            root: The module that it was found in, or a copy of that.
        """
        owner, _, _ = (self.correction_bias or "").rpartition(".")
        return BoundRouter(
            self, root.get_submodule(self.name), root.get_submodule(owner)
        )

    def is_in(self, block: str) -> bool:
        """Whether a block, by its qualified name, holds this router."""
        return self.name.startswith(f"{block}.")

    def inside(self, block: str) -> "Router":
        """Return the same router, named relative to the block that holds it."""
        bias = self.correction_bias
        return replace(
            self,
            name=self.name.removeprefix(f"{block}."),
            correction_bias=bias and bias.removeprefix(f"{block}."),
        )


@dataclass(frozen=True, eq=False)
class BoundRouter:
    """A router together with the modules that hold its weight and its bias.

    Tensors are looked up at every use: AutoRound moves and replaces them.

    Attributes:
        description: The router.
        module: The module that is called with the hidden states.
        bias_owner: The module that holds the correction bias, if there is one.
    """

    description: Router
    module: nn.Module
    bias_owner: nn.Module

    @property
    def name(self) -> str:
        """Its qualified name."""
        return self.description.name

    @property
    def top_k(self) -> int:
        """K."""
        return self.description.top_k

    @property
    def num_experts(self) -> int:
        """E."""
        return self.description.num_experts

    @property
    def weight(self) -> Tensor:
        """The weight of its linear map, (E or more, H)."""
        weight: Tensor = linear_map(self.module).weight  # type: ignore[assignment]
        return weight

    @property
    def correction_bias(self) -> Tensor | None:
        """The bias that is added to the scores for the choice, (E,), or None."""
        path = self.description.correction_bias
        if path is None:
            return None
        bias: Tensor = getattr(self.bias_owner, path.rpartition(".")[2])
        return bias.flatten()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Compute raw logits, (T, E), float32; see `router_logits`.

        Args:
            hidden_states: The router's input, (..., H).
        """
        return router_logits(self.module, hidden_states, self.num_experts)

    def inputs(self, hidden_states: Tensor) -> Tensor:
        """Return the router's input as (T, H), in its own dtype; differentiable.

        Args:
            hidden_states: The input, (..., H).
        """
        return hidden_states.reshape(-1, self.weight.shape[-1])

    def values(self, hidden_states: Tensor, compared: Compared) -> Tensor:
        """Return its logits, (T, E), or its inputs, (T, H).

        Args:
            hidden_states: The router's input, (..., H).
            compared: "logits" or "inputs".

        Raises:
            ValueError: `compared` is neither.
        """
        if compared == "logits":
            return self.logits(hidden_states)
        if compared == "inputs":
            return self.inputs(hidden_states)
        allowed = ", ".join(get_args(Compared))
        raise ValueError(f"compared={compared!r}: allowed are {allowed}")

    def scores(self, logits: Tensor) -> Tensor:
        """Compute the scores by which it chooses; see `SelectionRule`.

        Args:
            logits: Raw logits, (..., E).

        Returns:
            (..., E), float32.

        Raises:
            ValueError: The router follows no known rule.
        """
        return self._rule.scores(logits, self.correction_bias)

    def select(self, logits: Tensor) -> Tensor:
        """Return the experts that it chooses, best first.

        Args:
            logits: Raw logits, (..., E).

        Returns:
            Expert indices, int64, (..., K).

        Raises:
            ValueError: The router follows no known rule.
        """
        return self.scores(logits).topk(self.top_k, dim=-1).indices

    def ranking(self, logits: Tensor) -> Tensor:
        """Return all experts in the order in which it would choose them.

        The first K are those that it chooses; the next is the first that it does not.

        Args:
            logits: Raw logits, (..., E).

        Returns:
            Expert indices, int64, (..., E).

        Raises:
            ValueError: The router follows no known rule.
        """
        return self._rule.ranking(logits, self.correction_bias)

    @property
    def _rule(self) -> SelectionRule:
        rule = self.description.rule
        if rule is None:
            raise ValueError(
                f"router {self.name!r}: which experts it chooses is unknown, because "
                f"{self.description.unverified}; allowed are routers that choose the "
                "top K of a function of their logits, so leave out the option that "
                "asks for the choice"
            )
        return rule


def linear_map(router: nn.Module) -> nn.Module:
    """Find the module that holds a router's weight (E, H), and its bias, if any.

    Args:
        router: The router module.

    Returns:
        The module itself, or the first one with a weight inside it; that may be emptied
        while AutoRound keeps it on disk.

    Raises:
        ValueError: There is no weight in it.
    """
    for module in router.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            return module
    raise ValueError(
        f"router {type(router).__name__}: allowed is a module that holds a weight "
        "(num_experts, hidden)"
    )


def router_logits(
    router: nn.Module, hidden_states: Tensor, num_experts: int | None = None
) -> Tensor:
    """Recompute a router's raw logits from its input, its weight and its bias.

    Module outputs differ between families and versions (logits, softmax, sigmoid,
    top-k only); the linear map does not. Runs in float32, outside autocast, on the
    router's device, and is differentiable in `hidden_states`.

    Args:
        router: The router module: `weight` (E, H), optionally `bias` (E,).
        hidden_states: Its input, (..., H).
        num_experts: E, where the weight has rows of shared experts after those that
            the router chooses from; None takes all rows.

    Returns:
        (T, E) with T the product of the leading dimensions.
    """
    linear = linear_map(router)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(linear, "bias", None)
    hidden_states = hidden_states.reshape(-1, weight.shape[-1]).to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(
            hidden_states.float(),
            weight[:num_experts].float(),
            None if bias is None else bias[:num_experts].float(),
        )


def routers_inside(routers: Iterable[Router], block: str) -> tuple[Router, ...]:
    """Return the routers of one block, named relative to it.

    Args:
        routers: Routers of a model.
        block: The block's qualified name in that model.
    """
    return tuple(router.inside(block) for router in routers if router.is_in(block))
