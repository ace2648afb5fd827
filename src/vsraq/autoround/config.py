# SPDX-License-Identifier: Apache-2.0
"""`VSRAQConfig`: AutoRound's SignRound configuration plus router alignment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

from vsraq.autoround.option_types import check_config_options, check_options
from vsraq.callbacks import Callback, check_callbacks
from vsraq.objectives import ObjectiveLike
from vsraq.options import (
    OPTIONS,
    Alignment,
    OnUnreached,
    RankBy,
    Weight,
    check,
    refuse_misplaced,
    resolve,
)
from vsraq.tokens import TokenMask, check_mask_file


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
        objective: A name from `vsraq.OBJECTIVES`; a name with hyper-parameters, such as
            {"name": "vsraq", "alpha": 0.5}; or a `vsraq.Objective`. None is the one
            that measured best, "top3k_mse".
        router_weight: lambda >= 0, or "auto". The VSRAQ paper uses 0.01
            (Solar-Open-100B) and 0.1 (Nemotron-3-Nano); the losses have no common
            scale, so "auto" balances them per block: auto_ratio times the ratio of the
            reconstruction gradient to the router gradient (sums of magnitudes over the
            tuned parameters that the router loss reaches, before the first step).
        next_router_weight: The same for the next MoE router.
        next_router_objective: Its objective; None takes `objective` as it is. If one
            of the two is for selected tokens ("sra"), these are selected for both
            routers and the re-fit.
        rank_by: What ranks the experts for the losses: their full-precision "logits",
            as in the papers (None), or "selection", the scores by which the router
            really chooses, with its correction bias and groups. The losses still
            compare logits. Where a router chooses the highest logits, both are the
            same.
        router_pattern: A regular expression for the end of the name of each router's
            linear map, where `vsraq.find_routers` does not find the right ones.
        token_selection: Align and re-fit the routers only on tokens whose output
            changes when the model is rounded to nearest (Selective Router Alignment).
            All tokens take part in the reconstruction loss. None is True for
            objective="sra", which is "ra" with token selection, and False otherwise. A
            mapping turns it on and says which tokens: {"tau": 1e-4} those whose
            Sampled-JSD is above it, in nats; with "shift_threshold" only those whose
            routing shift is above it as well (SRA's aggressive variant).
        token_mask: Which tokens; a `TokenMask`, or the path of one. None selects them
            at the start of the run, in two passes over the blocks.
        lookahead: How many of the following blocks may be run to reach the next
            router; None is 2.
        auto_ratio: How strong an "auto" weight is; None is 1.
        realign_routers: Re-fit each router after its block is tuned. A mapping turns it
            on and says how: "ridge" is a fraction of the mean diagonal of X^T X, 1e-3;
            "weighting" says which errors of the logits count, "uniform", "top_3k" or
            "boundary" (see `vsraq.realignment.error_weights.error_weights`).
        min_tokens_per_expert: Experts that get fewer calibration tokens than this are
            named at the end of the run; None is 1.
        on_unreached: "warn" about them (None), or end the run at the first block that
            has such experts ("error").
        callbacks: Objects that hear of blocks and steps, see `vsraq.callbacks`; None
            is nobody. They do not change the tuning.
        **kwargs: Arguments of `SignRoundConfig` (`iters`, `lr`, `nblocks`, ...).

    None leaves an option at its default, which is in `vsraq.options`.

    Raises:
        ValueError: A value is not allowed, the objective has no such hyper-parameter,
            or an option of AutoRound cannot work with a router loss.
        TypeError: An argument is unknown.
    """

    def __init__(
        self,
        *,
        objective: ObjectiveLike | None = None,
        router_weight: Weight | None = None,
        next_router_weight: Weight | None = None,
        next_router_objective: ObjectiveLike | None = None,
        rank_by: RankBy | None = None,
        router_pattern: str | None = None,
        token_selection: bool | Mapping[str, Any] | None = None,
        token_mask: TokenMask | str | Path | None = None,
        lookahead: int | None = None,
        auto_ratio: float | None = None,
        realign_routers: bool | Mapping[str, Any] | None = None,
        min_tokens_per_expert: int | None = None,
        on_unreached: OnUnreached | None = None,
        callbacks: Sequence[Callback] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        refuse_misplaced(kwargs)
        check_options(kwargs)
        if kwargs.get("iters") == 0:
            raise ValueError(
                "iters=0: allowed is an int >= 1; without iterations nothing "
                "is tuned and the router loss has no effect, so use AutoRound's RTN "
                '(alg_configs="rtn") if that is what you want'
            )
        super().__init__(**kwargs)
        for name, value in options.items():
            setattr(self, name, value)
        # without a public name: what has one is in the settings that a resume compares
        self._callbacks = check_callbacks(() if callbacks is None else callbacks)
        self.select_only = False  # for `vsraq select-tokens`
        self.check_alignment()

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """What hears of the run."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = check_callbacks(callbacks)

    @property
    def named(self) -> dict[str, Any]:
        """The options as they were given, or set later; None is the default."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def alignment(self) -> Alignment:
        """The final values of all options; see `vsraq.options.resolve`."""
        return resolve(self.named)

    def check_alignment(self) -> None:
        """Check everything that this class adds to `SignRoundConfig`.

        AutoRound sets options given to `AutoRound(...)` after construction, so this
        runs again when the run starts.

        Raises:
            ValueError: Something is not allowed.
        """
        check_config_options(self)
        check(self.named)
        if isinstance(self.token_mask, str | Path):
            check_mask_file(self.token_mask)
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
        """Run AutoRound's check of a configuration, and `check_alignment`."""
        self.check_alignment()
        super().check_config()
