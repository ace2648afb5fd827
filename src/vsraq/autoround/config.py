# SPDX-License-Identifier: Apache-2.0
"""`VSRAQConfig`: AutoRound's SignRound configuration plus a router objective."""

import math
from typing import Any, Literal

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

from vsraq.objectives import Objective, get_objective

_HYPERPARAMETERS = (
    "multiplier",
    "boundary",
    "alpha",
    "gamma",
    "eps",
    "margin",
    "rank_margin",
    "rank_weight",
    "margin_weight",
    "top_m",
)


class VSRAQConfig(SignRoundConfig):
    """Block-wise tuning whose loss also keeps the routing.

    The block loss becomes reconstruction + router_weight * router loss (VSRAQ Eq. 3),
    the router loss being the mean over the block's routers and the valid tokens.
    Everything else is AutoRound's: every argument of `SignRoundConfig` is accepted.

    Args:
        objective: A name from `vsraq.OBJECTIVES`, or a `vsraq.Objective`.
        router_weight: lambda >= 0; 0 is AutoRound's own algorithm, bit for bit. VSRAQ
            uses 0.01 (Solar-Open-100B) and 0.1 (Nemotron-3-Nano); the two losses have
            no common scale, so a small model can need far more.
        multiplier: Of `topk_mse`: how many times K ranks count, or "all".
        boundary: Of `vsraq`, `margin` and `pairwise_margin`: b.
        alpha: Of `vsraq`: share of the sigmoid-aware term.
        gamma: Of `vsraq` and `sigmoid_aware_mse`: exponent of the steepness.
        eps: Of `vsraq` and `sigmoid_aware_mse`: floor of the weight.
        margin: Of `rank`: margin in logits.
        rank_margin: Of `vsraq`: margin of its rank term.
        rank_weight: Of `vsraq`: weight of its rank term.
        margin_weight: Of `vsraq`: weight of its margin term.
        top_m: Of `router_kl`: ranks that take part.
        **kwargs: Arguments of `SignRoundConfig` (`iters`, `lr`, `nblocks`, ...).

    None leaves a hyper-parameter at the objective's own default.

    Raises:
        ValueError: A value is not allowed, the objective has no such hyper-parameter,
            or an option of AutoRound cannot work with a router loss.
        TypeError: An argument is unknown.
    """

    def __init__(
        self,
        *,
        objective: str | Objective = "vsraq",
        router_weight: float = 0.01,
        multiplier: int | Literal["all"] | None = None,
        boundary: int | None = None,
        alpha: float | None = None,
        gamma: float | None = None,
        eps: float | None = None,
        margin: float | None = None,
        rank_margin: float | None = None,
        rank_weight: float | None = None,
        margin_weight: float | None = None,
        top_m: int | None = None,
        **kwargs: Any,
    ) -> None:
        iters = kwargs.get("iters", 1)
        if not isinstance(iters, int) or iters < 1:  # AutoRound resets -1 to 200
            raise ValueError(
                f"iters={iters!r}: allowed is an int >= 1; without iterations nothing "
                "is tuned and the router loss has no effect, so use AutoRound's RTN "
                '(alg_configs="rtn") if that is what you want'
            )
        super().__init__(**kwargs)
        self.objective = objective
        self.router_weight = router_weight
        self.multiplier = multiplier
        self.boundary = boundary
        self.alpha = alpha
        self.gamma = gamma
        self.eps = eps
        self.margin = margin
        self.rank_margin = rank_margin
        self.rank_weight = rank_weight
        self.margin_weight = margin_weight
        self.top_m = top_m
        self.check_alignment()

    def resolve_objective(self) -> Objective:
        """The objective with the hyper-parameters of this configuration.

        Raises:
            ValueError: The name, a hyper-parameter or its value is not allowed.
        """
        given = {
            name: value
            for name in _HYPERPARAMETERS
            if (value := getattr(self, name)) is not None
        }
        return get_objective(self.objective, **given)

    def check_alignment(self) -> None:
        """Check everything that this class adds to `SignRoundConfig`.

        AutoRound sets options given to `AutoRound(...)` after construction, so this
        runs again when the run starts.

        Raises:
            ValueError: Something is not allowed.
        """
        self.resolve_objective()
        weight = self.router_weight
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
            or weight < 0
        ):
            raise ValueError(
                f"router_weight={weight!r}: allowed is a finite number >= 0"
            )
        for name in ("nblocks", "gradient_accumulate_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed is an int >= 1")
        if self.enable_lfq:
            raise ValueError(
                "enable_lfq=True: it replaces the loss of the last block and so drops "
                "the router loss there; allowed is False with VSRAQConfig"
            )
        if self.enable_adam and self.enable_alg_ext:
            raise ValueError(
                "enable_adam=True and enable_alg_ext=True: AutoRound has no algorithm "
                "that is both; allowed is one of them"
            )

    def check_config(self) -> None:
        """AutoRound's check of a configuration, plus `check_alignment`."""
        super().check_config()
        self.check_alignment()
