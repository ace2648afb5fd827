# SPDX-License-Identifier: Apache-2.0
"""Named router objectives: which loss, with which hyper-parameters.

An objective is data. A new one is one row in `OBJECTIVES`; a loss of your own is
`Objective("mine", my_loss)` with `my_loss(q_logits, fp_logits, *, top_k) -> (...)`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias, get_args

from torch import Tensor

from vsraq import losses
from vsraq.hyperparameters import check_hyperparameters
from vsraq.losses import TokenLoss, boundary_ranks, multiplied_ranks
from vsraq.ranks import FpLogits, rank_logits
from vsraq.routers import Compared

RanksRead: TypeAlias = Callable[[int, int, Mapping[str, Any]], int]


def _all_ranks(top_k: int, num_experts: int, _: Mapping[str, Any]) -> int:
    return num_experts


def _top_k_ranks(top_k: int, num_experts: int, _: Mapping[str, Any]) -> int:
    return min(top_k, num_experts)


def _multiplied(top_k: int, num_experts: int, values: Mapping[str, Any]) -> int:
    return multiplied_ranks(top_k, num_experts, values["multiplier"])


def _near_boundary(top_k: int, num_experts: int, values: Mapping[str, Any]) -> int:
    return boundary_ranks(top_k, num_experts, values["boundary"])


def _top_m_ranks(top_k: int, num_experts: int, values: Mapping[str, Any]) -> int:
    return values["top_m"] or num_experts


@dataclass(frozen=True)
class Objective:
    """A per-token router loss with its hyper-parameters.

    Attributes:
        name: What logs and configs call it.
        token_loss: `(q_logits, fp_logits, *, ...) -> (...)`; gets `top_k` if it has
            such an argument.
        hyperparameters: Keyword arguments of `token_loss` besides `top_k`.
        ranks_read: `(top_k, num_experts, hyperparameters) -> int`, how many
            full-precision ranks the loss reads; capture stores no more than that. A
            loss that reads all of them treats all experts alike. None: it reads all,
            and their order may matter.
        compares: What the loss reads of a router: its logits, (..., E), or its inputs,
            (..., H).
        selects_tokens: Whether it is meant for the selected tokens only (SRA).

    Raises:
        ValueError: The loss has no such hyper-parameter, its value is not allowed, or
            `compares` is neither.
    """

    name: str
    token_loss: TokenLoss
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    ranks_read: RanksRead | None = None
    compares: Compared = "logits"
    selects_tokens: bool = False
    _takes_top_k: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.compares not in get_args(Compared):
            raise ValueError(
                f"compares={self.compares!r}: objective {self.name!r} may compare "
                f"{' or '.join(get_args(Compared))}"
            )
        parameters = inspect.signature(self.token_loss).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        known = [name for name in known if name != "top_k"]
        for name in self.hyperparameters:
            if name not in known and not takes_any:
                raise ValueError(
                    f"{name}={self.hyperparameters[name]!r}: objective {self.name!r} "
                    f"has no such hyper-parameter; it has {', '.join(known) or 'none'}"
                )
        defaults = {
            name: parameters[name].default
            for name in known
            if parameters[name].default is not inspect.Parameter.empty
        }
        complete = defaults | dict(self.hyperparameters)
        check_hyperparameters(**complete)
        object.__setattr__(self, "hyperparameters", MappingProxyType(complete))
        object.__setattr__(self, "_takes_top_k", "top_k" in parameters)

    def __call__(self, q_logits: Tensor, fp_logits: FpLogits, *, top_k: int) -> Tensor:
        """Compute the loss per token, (..., E) x (..., E) -> (...); H for inputs."""
        if self._takes_top_k:
            return self.token_loss(
                q_logits, fp_logits, top_k=top_k, **self.hyperparameters
            )
        return self.token_loss(q_logits, fp_logits, **self.hyperparameters)

    def target(
        self, fp_compared: Tensor, *, top_k: int, ranking: Tensor | None = None
    ) -> FpLogits:
        """Return what this objective reads in full precision, detached.

        Args:
            fp_compared: Full-precision logits (T, E), or inputs (T, H).
            top_k: K of the router.
            ranking: Expert indices in the order that ranks them, (T, E); None ranks by
                the logits.

        Returns:
            The ranks that the loss reads, or the inputs.
        """
        if self.compares == "inputs":
            return fp_compared.detach()
        ranks = self.ranks(top_k, fp_compared.shape[-1])
        return rank_logits(fp_compared, ranks, ranking)

    @property
    def depends_on_ranking(self) -> bool:
        """Whether another ranking of the experts may change the loss."""
        if self.compares == "inputs":
            return False
        if self.hyperparameters.get("top_m") is not None:
            return True
        return self.ranks_read is None or self.ranks(1, 1000) < 1000

    def ranks(self, top_k: int, num_experts: int) -> int:
        """Return how many full-precision ranks this objective reads."""
        if self.ranks_read is None:
            return num_experts
        return self.ranks_read(top_k, num_experts, self.hyperparameters)

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in self.hyperparameters.items())
        return f"{self.name}({values})"


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        o.name: o
        for o in (
            Objective("vsraq", losses.vsraq, {}, _near_boundary),
            Objective("topk_mse", losses.topk_mse, {"multiplier": 1}, _multiplied),
            Objective("top3k_mse", losses.topk_mse, {"multiplier": 3}, _multiplied),
            Objective("top2k_mse", losses.topk_mse, {"multiplier": 2}, _multiplied),
            Objective("full_mse", losses.topk_mse, {"multiplier": "all"}, _multiplied),
            # uniform router alignment, what SRA is compared with
            Objective("ra", losses.topk_mse, {"multiplier": 3}, _multiplied),
            Objective(
                "sra",
                losses.topk_mse,
                {"multiplier": 3},
                _multiplied,
                selects_tokens=True,
            ),
            Objective("sigmoid_aware_mse", losses.sigmoid_aware_mse, {}, _top_k_ranks),
            Objective("rank", losses.rank, {}, _top_k_ranks),
            Objective("margin", losses.margin, {}, _near_boundary),
            Objective("pairwise_margin", losses.pairwise_margin, {}, _near_boundary),
            Objective("router_kl", losses.router_kl, {}, _top_m_ranks),
            Objective("mse_kl", losses.mse_kl, {}, _all_ranks),
            Objective("input_mse", losses.input_mse, compares="inputs"),
        )
    }
)


# A name, an objective of your own, or a name with hyper-parameters:
# {"name": "vsraq", "alpha": 0.5}
ObjectiveLike: TypeAlias = str | Objective | Mapping[str, Any]


def get_objective(objective: ObjectiveLike) -> Objective:
    """Return the objective that a name, a mapping or an `Objective` stands for.

    Args:
        objective: A key of `OBJECTIVES`; a mapping of "name" to one, and of
            hyper-parameters to values; or an `Objective`.

    Returns:
        The objective.

    Raises:
        ValueError: The name is unknown, or a hyper-parameter is not allowed.
        TypeError: `objective` is none of these.
    """
    hyperparameters: dict[str, Any] = {}
    if isinstance(objective, Mapping):
        hyperparameters = {k: v for k, v in objective.items() if k != "name"}
        if not isinstance(objective.get("name"), str):
            raise ValueError(
                f"objective={dict(objective)!r}: it has no name; allowed is a mapping "
                f'such as {{"name": "vsraq", "alpha": 0.5}}'
            )
        objective = objective["name"]
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            near = difflib.get_close_matches(objective, OBJECTIVES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"objective={objective!r}: allowed are {', '.join(OBJECTIVES)}, or an "
                f"Objective.{hint}"
            )
        objective = OBJECTIVES[objective]
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective={objective!r} is a {type(objective).__name__}: pass one of "
            f"{', '.join(OBJECTIVES)}, a mapping with its name and hyper-parameters, "
            "or vsraq.Objective(name, token_loss)"
        )
    if not hyperparameters:
        return objective
    return replace(
        objective,
        hyperparameters=dict(objective.hyperparameters) | hyperparameters,
    )
