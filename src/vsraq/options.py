# SPDX-License-Identifier: Apache-2.0
"""Every option of router alignment, once: its default, what is allowed, what it needs.

`Alignment` holds the final values of a run. A new option is one field here, and a
keyword of `vsraq.VSRAQConfig` with its description. What only one switch needs is a
setting of that switch: `realign_routers={"ridge": 1e-2}`.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from vsraq.objectives import OBJECTIVES, Objective, ObjectiveLike, get_objective
from vsraq.realignment import DEFAULT_RIDGE
from vsraq.realignment.error_weights import Weighting
from vsraq.strict import refuse_unknown
from vsraq.tokens import TokenMask

Weight: TypeAlias = float | Literal["auto"]
RankBy: TypeAlias = Literal["logits", "selection"]
OnUnreached: TypeAlias = Literal["warn", "error"]


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # which an int may exceed
    )


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


_Metadata: TypeAlias = dict[str, Any]


def _allowed(check: Callable[[Any], bool], text: str) -> _Metadata:
    """Say what an option may be: a check of its value, and words for it."""
    return {"check": check, "allowed": text}


def _one_of(choices: Any) -> _Metadata:
    allowed = get_args(choices)
    return _allowed(lambda v: isinstance(v, str) and v in allowed, ", ".join(allowed))


def _is_objective(value: Any) -> bool:
    get_objective(value)  # its own error says more
    return True


_COUNT = _allowed(lambda v: type(v) is int and v >= 1, "an int >= 1")
_WEIGHT = _allowed(
    lambda v: v == "auto" or (_is_number(v) and v >= 0),
    'a finite number >= 0, or "auto"',
)
_POSITIVE = _allowed(lambda v: _is_number(v) and v > 0, "a finite number > 0")
_JSD = _allowed(lambda v: _is_number(v) and v >= 0, "a finite number >= 0, in nats")
_SHIFT = _allowed(
    lambda v: v is None or (_is_number(v) and 0 <= v < 1),
    "a fraction from 0 to below 1, or None",
)
_MASK = _allowed(
    lambda v: isinstance(v, TokenMask | str | Path),
    "a TokenMask, the path of one, or None",
)
_PATTERN = _allowed(_is_pattern, "a regular expression")
_OBJECTIVE = _allowed(_is_objective, "an objective")


@dataclass(frozen=True)
class RefitSettings:
    """The settings of `realign_routers`.

    Attributes:
        ridge: Ridge of the re-fit, as a fraction of the mean diagonal of X^T X.
        weighting: Which errors of the logits it counts; see `error_weights`.
    """

    ridge: float = field(default=DEFAULT_RIDGE, metadata=_POSITIVE)
    weighting: Weighting = field(default="uniform", metadata=_one_of(Weighting))


@dataclass(frozen=True)
class Threshold:
    """The settings of `token_selection`: how much a selected token changed.

    Attributes:
        tau: Its Sampled-JSD is above this, nats (SRA Eq. 7).
        shift_threshold: And its routing shift is above this; None allows any.
    """

    tau: float = field(default=1e-4, metadata=_JSD)
    shift_threshold: float | None = field(default=None, metadata=_SHIFT)


_SETTINGS: Mapping[str, type[RefitSettings] | type[Threshold]] = {
    "realign_routers": RefitSettings,
    "token_selection": Threshold,
}


def _switch(name: str) -> _Metadata:
    """Allow a bool, or a mapping of settings, which turns the switch on."""
    settings = _SETTINGS[name]
    known = ", ".join(setting.name for setting in fields(settings))

    def is_switch(value: Any) -> bool:
        if isinstance(value, Mapping) and value:
            _check_fields(settings, value, name)
            return True
        return isinstance(value, bool)

    return _allowed(is_switch, f"True, False, or a mapping of {known} to values")


def _check_fields(owner: type, values: Mapping[str, Any], section: str = "") -> None:
    """Check values by the names of a dataclass's fields.

    Raises:
        ValueError: A name is unknown, or a value is not allowed.
    """
    known = {option.name: option.metadata for option in fields(owner)}
    refuse_unknown(values, known, section)
    prefix = f"{section}." if section else ""
    for name, value in values.items():
        if not known[name]["check"](value):
            allowed = known[name]["allowed"]
            raise ValueError(f"{prefix}{name}={value!r}: allowed is {allowed}")


@dataclass(frozen=True)
class Alignment:
    """The parts of router alignment that a run has: final values of all options.

    Attributes:
        router_weight: Weight of the own routers' loss; 0 is off.
        next_router_weight: Weight of the next router's loss; 0 is off.
        realign_routers: Whether routers are re-fitted, or the settings of the re-fit.
        objective: The loss per token of the own routers.
        next_router_objective: That of the next router; None takes `objective`.
        rank_by: Which order of the experts the losses read.
        router_pattern: What names the routers; None finds them.
        token_selection: Whether only tokens count whose output changed, or how much.
        token_mask: Which tokens; None finds them.
        lookahead: Blocks that may be run to reach the next router.
        auto_ratio: Strength of automatic weights.
        min_tokens_per_expert: Experts with fewer calibration tokens are named.
        on_unreached: Whether such an expert ends the run.
    """

    router_weight: Weight = field(default=0.0, metadata=_WEIGHT)
    next_router_weight: Weight = field(default=0.0, metadata=_WEIGHT)
    realign_routers: bool | Mapping[str, Any] = field(
        default=False, metadata=_switch("realign_routers")
    )
    objective: ObjectiveLike = field(default="top3k_mse", metadata=_OBJECTIVE)
    next_router_objective: ObjectiveLike | None = field(
        default=None, metadata=_OBJECTIVE
    )
    rank_by: RankBy = field(default="logits", metadata=_one_of(RankBy))
    router_pattern: str | None = field(default=None, metadata=_PATTERN)
    token_selection: bool | Mapping[str, Any] = field(
        default=False, metadata=_switch("token_selection")
    )
    token_mask: TokenMask | str | Path | None = field(default=None, metadata=_MASK)
    lookahead: int = field(default=2, metadata=_COUNT)
    auto_ratio: float = field(default=1.0, metadata=_POSITIVE)
    min_tokens_per_expert: int = field(default=1, metadata=_COUNT)
    on_unreached: OnUnreached = field(default="warn", metadata=_one_of(OnUnreached))

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
        return self.router_weight != 0 or self.refit is not None

    @property
    def refit(self) -> RefitSettings | None:
        """How routers are re-fitted; None: not at all."""
        given = self.realign_routers
        return RefitSettings(**_settings(given)) if given else None

    @property
    def threshold(self) -> Threshold | None:
        """Which tokens are selected; None: all are aligned, or those of a mask."""
        given = self.token_selection
        return Threshold(**_settings(given)) if given and not self.token_mask else None

    @property
    def own_objective(self) -> Objective:
        """The objective of the own routers."""
        return get_objective(self.objective)

    @property
    def next_objective(self) -> Objective:
        """The objective of the next router."""
        return get_objective(self.next_router_objective or self.objective)

    @property
    def read_objectives(self) -> list[Objective]:
        """The objectives of the losses that are on."""
        read = [self.own_objective] if self.router_weight != 0 else []
        return read + [self.next_objective] * (self.next_router_weight != 0)

    @property
    def is_selective(self) -> bool:
        """Whether an objective that takes part is meant for selected tokens."""
        return (bool(self) and self.own_objective.selects_tokens) or any(
            objective.selects_tokens for objective in self.read_objectives
        )

    def unused_options(self) -> dict[str, str]:
        """Return the options that have no effect, and what each of them needs."""
        needed = {}
        if not self.has_terms:
            needed["rank_by"] = "a router_weight or next_router_weight"
        elif not any(o.depends_on_ranking for o in self.read_objectives):
            needed["rank_by"] = "an objective that does not treat all experts alike"
        if not self:
            part = "a part of the alignment that is on"
            needed |= dict.fromkeys(_OF_ANY_PART, part)
        if not self.token_selection:
            token_selection = 'objective="sra" or token_selection=True'
            needed["token_mask"] = token_selection
        if self.next_router_weight == 0:
            next_term = "a next_router_weight"
            needed |= dict.fromkeys(("lookahead", "next_router_objective"), next_term)
        if "auto" not in (self.router_weight, self.next_router_weight):
            needed["auto_ratio"] = 'a weight of "auto"'
        return needed

    def plain(self) -> dict[str, Any]:
        """Return the final values of options with an effect, as YAML holds them."""
        unused = {"objective", "next_router_objective", *self.unused_options()}
        values = {n: getattr(self, n) for n in OPTIONS if n not in unused}
        values["objective"] = get_objective(self.objective).name
        if self.own_objective in self.read_objectives:
            values["objective"] = _plain_objective(self.own_objective)
        if self.next_router_objective is not None and self.next_router_weight != 0:
            values["next_router_objective"] = _plain_objective(self.next_objective)
        if self.refit is not None:
            values["realign_routers"] = asdict(self.refit)
        if self.threshold is not None:
            values["token_selection"] = asdict(self.threshold)
        if isinstance(self.token_mask, TokenMask | Path):
            values["token_mask"] = str(self.token_mask)
        return {name: value for name, value in values.items() if value is not None}


def _settings(switch: bool | Mapping[str, Any]) -> Mapping[str, Any]:
    return switch if isinstance(switch, Mapping) else {}


def _plain_objective(objective: Objective) -> str | dict[str, Any]:
    if not objective.hyperparameters:
        return objective.name
    return {"name": objective.name, **objective.hyperparameters}


PARTS = ("router_weight", "next_router_weight", "realign_routers")
_OF_ANY_PART = (
    "token_selection",
    "router_pattern",
    "min_tokens_per_expert",
    "on_unreached",
)
OPTIONS = tuple(option.name for option in fields(Alignment))
# chosen by benchmarks/routing.py; see docs/results.md
DEFAULT_RECIPE = Alignment("auto", "auto", realign_routers=True)


def refuse_misplaced(named: Mapping[str, Any]) -> None:
    """Refuse what belongs to a switch or to an objective, and say where it goes.

    Raises:
        ValueError: A name is a setting or a hyper-parameter, and no option.
    """
    owners = {
        setting.name: f'{switch}={{"{setting.name}": ...}}'
        for switch, settings in _SETTINGS.items()
        for setting in fields(settings)
    }
    for objective in OBJECTIVES.values():
        for name in objective.hyperparameters:
            place = f'objective={{"name": "{objective.name}", "{name}": ...}}'
            owners.setdefault(name, place)
    for name, value in named.items():
        if name in owners:
            raise ValueError(
                f"{name}={value!r}: it is no option of its own; write {owners[name]}"
            )


def resolve(named: Mapping[str, Any]) -> Alignment:
    """Resolve the options that a user has named to final values.

    Switch parts on to have only those, or switch parts off to have the others.

    Args:
        named: Values by `OPTIONS`; None stands for the default.
    """
    named = {name: value for name, value in named.items() if value is not None}
    # 0 and False are off; anything else, a mistake too, is on
    some_on = any(named.get(part, 0) != 0 for part in PARTS)
    alignment = replace(Alignment() if some_on else DEFAULT_RECIPE, **named)
    if "token_selection" not in named and alignment.is_selective:
        return replace(alignment, token_selection=True)
    return alignment


def check(named: Mapping[str, Any]) -> None:
    """Check the options that a user has named.

    Args:
        named: Values by `OPTIONS`; None stands for the default.

    Raises:
        ValueError: A value is not allowed, or would have no effect.
    """
    named = {name: value for name, value in named.items() if value is not None}
    _check_fields(Alignment, named)
    alignment = resolve(named)
    for name, needed in alignment.unused_options().items():
        if name in named:
            raise ValueError(
                f"{name}={named[name]!r}: it has no effect without {needed}; pass "
                f"that too, or leave {name} out"
            )
    _check_hyperparameters_are_read(alignment)
    if alignment.token_mask is not None and _settings(alignment.token_selection):
        raise ValueError(
            f"token_selection={alignment.token_selection!r}: it has no effect with "
            "token_mask, which has its own thresholds; allowed with it is True"
        )
    if not alignment.token_selection and alignment.is_selective:
        raise ValueError(
            f"token_selection=False: objective {alignment.objective!r} is for selected "
            'tokens; allowed is None or True, or objective="ra" for all tokens'
        )


def _check_hyperparameters_are_read(alignment: Alignment) -> None:
    """Refuse hyper-parameters of an objective that no loss reads."""
    objective = alignment.objective
    is_read = alignment.router_weight != 0 or (
        alignment.next_router_weight != 0 and alignment.next_router_objective is None
    )
    if not is_read and isinstance(objective, Mapping) and len(objective) > 1:
        raise ValueError(
            f"objective={dict(objective)!r}: its hyper-parameters have no effect "
            "without a term that has this objective (router_weight); pass that too, "
            "or leave them out"
        )
