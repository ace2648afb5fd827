# SPDX-License-Identifier: Apache-2.0
"""A bit plan: which scheme each unit of a model gets, and what that costs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from vsraq.bits.damage import Damage, DamageModel
from vsraq.checkpoint.planned import (
    PLAN_FORMAT,
    PlannedLayers,
    check_plan_file,
    config_digest,
    plan_digest,
)
from vsraq.whole_file import write_whole

__all__ = ["BitPlan", "Cost", "PlannedUnit", "config_digest"]


@dataclass(frozen=True)
class Cost:
    """What a choice of schemes takes and does.

    Attributes:
        bytes: Of the export: of the unit's layers, or of all tensors.
        active_bytes: What one token reads of these.
        kl: KL(full precision || rounded) of the output, nats.
        routing: 1 - Jaccard of the selected experts, mean over the routers.
    """

    bytes: int
    active_bytes: float
    kl: float
    routing: float


@dataclass(frozen=True)
class PlannedUnit:
    """One unit of a plan.

    Attributes:
        name: The unit.
        layers: Its layers.
        chosen: The name of its scheme.
        candidates: What each scheme that it could have costs, when only this unit is
            rounded. The first is the scheme that it has without a plan.
    """

    name: str
    layers: tuple[str, ...]
    chosen: str
    candidates: Mapping[str, Cost]

    @property
    def base(self) -> str:
        """The name of the scheme that it has without a plan."""
        return next(iter(self.candidates))

    @property
    def cost(self) -> Cost:
        """The cost of its scheme."""
        return self.candidates[self.chosen]


@dataclass(frozen=True)
class BitPlan:
    """Schemes for the units of one model.

    Attributes:
        model: What it was made for: a path, a name or a class.
        config_digest: Of the model's config; see `config_digest`.
        scheme: AutoRound's name of the scheme that the other layers have.
        export_format: AutoRound's name of the export format.
        engine: The engine whose rules it obeys, or None.
        budget: What it could spend, as it was asked for.
        active_budget: The same for what one token reads, or None.
        metric: What it makes small.
        tokens: Tokens that it was measured with.
        units: The units, in module order.
        default: The fields of the scheme, by AutoRound's names.
        layer_config: What `AutoRound(layer_config=...)` takes.
        uniform: The cost with the scheme in every unit, measured.
        planned: The cost of the plan, all units rounded together, measured.
        flip_kl: How damages add; see `DamageModel`.
        versions: Packages that made it.
        settings: Those of the recipe that it was made with; empty without one.
    """

    model: str
    config_digest: str
    scheme: str
    export_format: str
    engine: str | None
    budget: str
    active_budget: str | None
    metric: str
    tokens: int
    units: tuple[PlannedUnit, ...]
    default: Mapping[str, Any]
    layer_config: Mapping[str, Mapping[str, Any]]
    uniform: Cost
    planned: Cost
    flip_kl: float
    versions: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planned_layers(self) -> PlannedLayers:
        """The scheme of each layer of its units, by AutoRound's names."""
        names = [layer for unit in self.units for layer in unit.layers]
        return PlannedLayers(self.default, self.layer_config, names)

    @property
    def bytes(self) -> int:
        """Bytes of the export's tensors."""
        return self.planned.bytes

    @property
    def sum_kl(self) -> float:
        """Sum of the units' own KLs, nats: the plan's, if damages just added."""
        return sum(unit.cost.kl for unit in self.units)

    @property
    def predicted(self) -> Damage:
        """The damage that the units' own damages predict."""
        return DamageModel(self.flip_kl).together(unit.cost for unit in self.units)

    @property
    def predicted_kl(self) -> float:
        """The KL that the units' own damages predict, nats."""
        return self.predicted.kl

    def check(self, config: Any, scheme: str) -> None:
        """Refuse a model or a scheme that the plan was not made for.

        Args:
            config: The model's transformers config.
            scheme: AutoRound's name of the run's scheme.

        Raises:
            ValueError: One of them differs.
        """
        if scheme.upper() != self.scheme:
            raise ValueError(
                f"scheme={scheme!r}: the bit plan was made for {self.scheme}; allowed "
                "is that, or make a new plan"
            )
        if config_digest(config) != self.config_digest:
            raise ValueError(
                f"bit plan: it was made for {self.model}, and this model's config "
                "differs from that one's; make a plan for this model"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, completely or not at all.

        Args:
            path: The file; its folder must exist.
        """
        content = {"format": PLAN_FORMAT} | asdict(self)
        content["digest"] = plan_digest(content)
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no bit plan, or not as it was written.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            check_plan_file(content)
            for name in ("format", "digest"):
                del content[name]
            content["units"] = tuple(_unit(unit) for unit in content["units"])
            for name in ("uniform", "planned"):
                content[name] = Cost(**content[name])
            return cls(**content)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"path={str(path)!r}: no bit plan ({error}); allowed is a file that "
                "BitPlan.save or `vsraq plan --out` has written"
            ) from error

    def __str__(self) -> str:
        """Format the plan as a table and a summary."""
        from vsraq.bits.table import format_plan

        return format_plan(self)

    def plot(self, path: str | Path) -> None:
        """Draw the damage per MiB of the units, and KL over the budget.

        Args:
            path: The figure, .png or .svg.
        """
        from vsraq.bits.figure import plot_plan

        plot_plan(self, Path(path))


def _unit(content: Mapping[str, Any]) -> PlannedUnit:
    candidates = {n: Cost(**cost) for n, cost in content["candidates"].items()}
    values = dict(content) | {"candidates": candidates}
    return PlannedUnit(**values | {"layers": tuple(content["layers"])})
