# SPDX-License-Identifier: Apache-2.0
"""`VSRAQConfig`: AutoRound's SignRound configuration plus a router objective."""

import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

from vsraq.autoround.option_types import check_config_options, check_options
from vsraq.autoround.terms import Weight
from vsraq.error_weights import Weighting
from vsraq.objectives import Objective, get_objective
from vsraq.realignment import DEFAULT_RIDGE
from vsraq.token_selection import TokenMask, check_mask_file, check_thresholds

RankBy: TypeAlias = Literal["logits", "selection"]
OnUnreached: TypeAlias = Literal["warn", "error"]

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
    "kl_weight",
)


@dataclass(frozen=True)
class Alignment:
    """Which parts of router alignment a run has, every option with its final value.

    Attributes:
        router_weight: Weight of the own routers' loss; 0 is off.
        next_router_weight: Weight of the next router's loss; 0 is off.
        realign_routers: Whether routers are re-fitted.
        rank_by: Which order of the experts the losses read.
        token_selection: Whether only tokens count whose output changed.
        tau: They changed by more than this Sampled-JSD.
        shift_threshold: And their routing moved by more than this; None: any.
        lookahead: Blocks that may be run to reach the next router.
        auto_ratio: Strength of automatic weights.
        realign_ridge: Ridge of the re-fit.
        realign_weighting: Which errors the re-fit counts.
    """

    router_weight: Weight = 0.0
    next_router_weight: Weight = 0.0
    realign_routers: bool = False
    rank_by: RankBy = "logits"
    token_selection: bool = False
    tau: float = 1e-4
    shift_threshold: float | None = None
    lookahead: int = 2
    auto_ratio: float = 1.0
    realign_ridge: float = DEFAULT_RIDGE
    realign_weighting: Weighting = "uniform"

    def __bool__(self) -> bool:
        """Whether any part is on."""
        return self.has_terms or bool(self.realign_routers)

    @property
    def has_terms(self) -> bool:
        """Whether a router loss takes part in the tuning."""
        return self.router_weight != 0 or self.next_router_weight != 0

    @property
    def reads_full_precision(self) -> bool:
        """Whether a part reads what a block's own routers do in full precision."""
        return self.router_weight != 0 or self.realign_routers

    def idle(self) -> dict[str, str]:
        """Options that have no effect, and what each of them needs."""
        needed = {}
        if not self.has_terms:
            needed["rank_by"] = "a router_weight or next_router_weight"
        if not self:
            needed["token_selection"] = "a part of the alignment that is on"
        if not self.token_selection:
            selection = 'objective="sra" or token_selection=True'
            needed |= dict.fromkeys(("tau", "shift_threshold"), selection)
        if self.next_router_weight == 0:
            needed["lookahead"] = "a next_router_weight"
        if "auto" not in (self.router_weight, self.next_router_weight):
            needed["auto_ratio"] = 'a weight of "auto"'
        if not self.realign_routers:
            needed["realign_ridge"] = "realign_routers=True"
            needed["realign_weighting"] = "realign_routers=True"
        return needed


PARTS = ("router_weight", "next_router_weight", "realign_routers")
# chosen by benchmarks/routing.py; see docs/results.md
DEFAULT_RECIPE = Alignment("auto", "auto", realign_routers=True)


class VSRAQConfig(SignRoundConfig):
    """Block-wise tuning whose loss also keeps the routing.

    The block loss becomes reconstruction + router_weight * router loss (VSRAQ Eq. 3)
    + next_router_weight * loss of the next MoE router, each router loss being the mean
    over its routers and the valid tokens. With `realign_routers`, each router is then
    re-fitted in closed form to what reaches it. Everything else is AutoRound's: every
    argument of `SignRoundConfig` is accepted.

    A block's own router sees only what stands before it, attention; the next router
    sees the block's experts too.

    By default `router_weight`, `next_router_weight` and `realign_routers` are all on,
    with automatic weights: the recipe that measured best. Switch parts on to have only
    those, or switch parts off to have the others. So `objective="vsraq",
    router_weight=0.01` is the setting of the VSRAQ paper, `realign_routers=False` the
    default without re-fitted routers, and all three off is AutoRound's own algorithm,
    bit for bit.

    Args:
        objective: A name from `vsraq.OBJECTIVES`, or a `vsraq.Objective`; the default
            is the one that measured best, "top3k_mse".
        router_weight: lambda >= 0, or "auto". The VSRAQ paper uses 0.01
            (Solar-Open-100B) and 0.1 (Nemotron-3-Nano); the losses have no common
            scale, so "auto" balances them per block: auto_ratio times the ratio of the
            reconstruction gradient to the router gradient (sums of magnitudes over the
            tuned parameters that the router loss reaches, before the first step).
        next_router_weight: The same for the next MoE router.
        next_router_objective: Its objective; None takes `objective` as it is. One of
            the two that is for selected tokens ("sra") selects them for both routers
            and the re-fit.
        rank_by: What ranks the experts for the losses: their full-precision "logits",
            as in the papers (None), or "selection", the scores by which the router
            really chooses, with its correction bias and groups. The losses still
            compare logits. Where a router chooses the highest logits, both are the
            same.
        router_pattern: A regular expression for the end of the name of each router's
            linear map, where `vsraq.find_routers` does not find the right ones.
        token_selection: Align the routers on tokens only whose output changes when the
            model is rounded to nearest (Selective Router Alignment): their losses and
            their re-fit. None does so for objective="sra", which is "ra" with it. All
            tokens take part in the reconstruction loss.
        token_mask: Which tokens; a `TokenMask`, or the path of one. None selects them
            at the start of the run, in two passes over the blocks.
        tau: Select tokens whose Sampled-JSD is above it, nats; None is 1e-4 (SRA).
        shift_threshold: And whose routing shift is above it (SRA's aggressive
            variant); None does not look at the routing.
        lookahead: How many of the following blocks may be run to reach the next
            router; None is 2.
        auto_ratio: How strong an "auto" weight is; None is 1.
        realign_routers: Re-fit each router after its block is tuned.
        realign_ridge: Ridge of the re-fit, as a fraction of the mean diagonal of
            X^T X; None is 1e-3.
        realign_weighting: Which errors of the logits it fits: "uniform" (None),
            "top_3k" or "boundary"; see `vsraq.error_weights.error_weights`.
        min_tokens_per_expert: Experts that get fewer calibration tokens than this are
            named at the end of the run; None is 1.
        on_unreached: "warn" of them (None), or end the run at the first block that
            has some ("error").
        multiplier: Of `topk_mse`: how many times K ranks count, or "all".
        boundary: Of `vsraq`, `margin` and `pairwise_margin`: b.
        alpha: Of `vsraq`: share of the sigmoid-aware term.
        gamma: Of `vsraq` and `sigmoid_aware_mse`: exponent of the steepness.
        eps: Of `vsraq` and `sigmoid_aware_mse`: floor of the weight.
        margin: Of `rank`: margin in logits.
        rank_margin: Of `vsraq`: margin of its rank term.
        rank_weight: Of `vsraq`: weight of its rank term.
        margin_weight: Of `vsraq`: weight of its margin term.
        top_m: Of `router_kl` and `mse_kl`: ranks that take part in the KL.
        kl_weight: Of `mse_kl`: weight of its KL.
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
        objective: str | Objective = "top3k_mse",
        router_weight: Weight | None = None,
        next_router_weight: Weight | None = None,
        next_router_objective: str | Objective | None = None,
        rank_by: RankBy | None = None,
        router_pattern: str | None = None,
        token_selection: bool | None = None,
        token_mask: TokenMask | str | Path | None = None,
        tau: float | None = None,
        shift_threshold: float | None = None,
        lookahead: int | None = None,
        auto_ratio: float | None = None,
        realign_routers: bool | None = None,
        realign_ridge: float | None = None,
        realign_weighting: Weighting | None = None,
        min_tokens_per_expert: int | None = None,
        on_unreached: OnUnreached | None = None,
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
        kl_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(kwargs)
        if kwargs.get("iters") == 0:
            raise ValueError(
                "iters=0: allowed is an int >= 1; without iterations nothing "
                "is tuned and the router loss has no effect, so use AutoRound's RTN "
                '(alg_configs="rtn") if that is what you want'
            )
        super().__init__(**kwargs)
        self.objective = objective
        self.router_weight = router_weight
        self.next_router_weight = next_router_weight
        self.next_router_objective = next_router_objective
        self.rank_by = rank_by
        self.router_pattern = router_pattern
        self.token_selection = token_selection
        self.token_mask = token_mask
        self.select_only = False  # `vsraq select-tokens` stops after the selection
        self.tau = tau
        self.shift_threshold = shift_threshold
        self.lookahead = lookahead
        self.auto_ratio = auto_ratio
        self.realign_routers = realign_routers
        self.realign_ridge = realign_ridge
        self.realign_weighting = realign_weighting
        self.min_tokens_per_expert = min_tokens_per_expert
        self.on_unreached = on_unreached
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
        self.kl_weight = kl_weight
        self.check_alignment()

    @property
    def alignment(self) -> Alignment:
        """The parts that are on.

        Switch parts on to have only those, or switch parts off to have the others.
        """
        names = [field.name for field in fields(Alignment)]
        named = {n: v for n in names if (v := getattr(self, n)) is not None}
        # 0 and False are off; anything else, a mistake too, is on
        some_on = any(named.get(part, 0) != 0 for part in PARTS)
        if some_on:
            alignment = Alignment(**named)
        else:
            alignment = replace(DEFAULT_RECIPE, **named)
        if self.token_selection is None and self._is_selective(alignment):
            return replace(alignment, token_selection=True)
        return alignment

    def _is_selective(self, alignment: Alignment) -> bool:
        """Whether an objective that takes part is meant for selected tokens."""
        next_objective = self.resolve_next_objective()
        return (bool(alignment) and self.resolve_objective().selects_tokens) or (
            alignment.next_router_weight != 0 and next_objective.selects_tokens
        )

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

    def resolve_next_objective(self) -> Objective:
        """The objective of the next router.

        Raises:
            ValueError: The name, a hyper-parameter or its value is not allowed.
        """
        if self.next_router_objective is None:
            return self.resolve_objective()
        return get_objective(self.next_router_objective)

    def check_alignment(self) -> None:
        """Check everything that this class adds to `SignRoundConfig`.

        AutoRound sets options given to `AutoRound(...)` after construction, so this
        runs again when the run starts.

        Raises:
            ValueError: Something is not allowed.
        """
        check_config_options(self)
        self.resolve_objective()
        self.resolve_next_objective()
        self._check_weights()
        if self.token_mask is not None and not isinstance(
            self.token_mask, TokenMask | str | Path
        ):
            raise ValueError(
                f"token_mask={self.token_mask!r}: allowed is a TokenMask, the path of "
                "one, or None"
            )
        check_thresholds(self.alignment.tau, self.alignment.shift_threshold)
        self._check_without_effect()
        if isinstance(self.token_mask, str | Path):
            check_mask_file(self.token_mask)
        for name in ("lookahead", "min_tokens_per_expert"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: allowed is an int >= 1")
        if self.router_pattern is not None:
            try:
                re.compile(self.router_pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"router_pattern={self.router_pattern!r}: allowed is a regular "
                    f"expression ({error})"
                ) from error
        for name in ("realign_routers", "token_selection"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: allowed is True or False")
        if self.token_selection is False and self._is_selective(self.alignment):
            raise ValueError(
                f"token_selection=False: objective {self.objective!r} is for selected "
                'tokens; allowed is None or True, or objective="ra" for all tokens'
            )
        for name, allowed in (
            ("realign_weighting", get_args(Weighting)),
            ("rank_by", get_args(RankBy)),
            ("on_unreached", get_args(OnUnreached)),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
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

    def _check_weights(self) -> None:
        for name in ("router_weight", "next_router_weight"):
            weight = getattr(self.alignment, name)
            if weight != "auto" and not _is_number(weight, at_least_zero=True):
                raise ValueError(
                    f'{name}={weight!r}: allowed is a finite number >= 0, or "auto"'
                )
        for name in ("auto_ratio", "realign_ridge"):
            value = getattr(self, name)
            if value is not None and not _is_number(value, at_least_zero=False):
                raise ValueError(f"{name}={value!r}: allowed is a finite number > 0")

    def _check_without_effect(self) -> None:
        """Refuse options that would change nothing."""
        for name, what in self.idle().items():
            value = getattr(self, name)
            if value is not None:
                raise ValueError(
                    f"{name}={value!r}: it has no effect without {what}; pass that "
                    f"too, or leave {name} out"
                )

    def idle(self) -> dict[str, str]:
        """Options that have no effect, and what each of them needs."""
        alignment = self.alignment
        needed = alignment.idle()
        if not alignment.token_selection:
            needed["token_mask"] = 'objective="sra" or token_selection=True'
        elif self.token_mask is not None:
            own = "token_mask=None, because a mask has its own"
            needed |= dict.fromkeys(("tau", "shift_threshold"), own)
        if alignment.next_router_weight == 0:
            needed["next_router_objective"] = "a next_router_weight"
        own_is_read = alignment.router_weight != 0 or (
            alignment.next_router_weight != 0 and self.next_router_objective is None
        )
        if not own_is_read:
            term = "a term that has this objective (router_weight)"
            needed |= dict.fromkeys(_HYPERPARAMETERS, term)
        if not alignment:
            part = "a part of the alignment that is on"
            names = ("router_pattern", "min_tokens_per_expert", "on_unreached")
            needed |= dict.fromkeys(names, part)
        read = [self.resolve_objective()] if own_is_read else []
        if alignment.next_router_weight != 0:
            read.append(self.resolve_next_objective())
        if read and not any(objective.depends_on_ranking for objective in read):
            needed["rank_by"] = "an objective that does not treat all experts alike"
        return needed

    def check_config(self) -> None:
        """AutoRound's check of a configuration, plus `check_alignment`."""
        self.check_alignment()
        super().check_config()


def _is_number(value: object, *, at_least_zero: bool) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # which an int may exceed
        and (value > 0 or (at_least_zero and value == 0))
    )
