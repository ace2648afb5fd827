# SPDX-License-Identifier: Apache-2.0
"""The bytes of whole exports, and what a budget leaves for the units."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from vsraq.autoround.planning import Candidates
from vsraq.autoround.prepared_model import PreparedModel
from vsraq.bits.budget import budget_bytes
from vsraq.bits.damage import Damage
from vsraq.bits.limits import Sizes, smallest
from vsraq.bits.plan import Cost
from vsraq.bits.sizes import plain_bytes, unit_bytes
from vsraq.bits.units import Unit


@dataclass(frozen=True)
class ExportSizes:
    """Bytes of whole exports.

    Attributes:
        units: The units.
        base: Each unit's scheme in the uniform export, by the unit's name.
        bytes_of: Of a unit with a scheme, by their names.
        plain: Of all other tensors, quantized ones outside of the units included.
        embedding: Those among them of which a token reads one row.
    """

    units: Sequence[Unit]
    base: Mapping[str, str]
    bytes_of: Mapping[tuple[str, str], int]
    plain: int
    embedding: int

    @classmethod
    def of(
        cls,
        prepared: PreparedModel,
        units: Sequence[Unit],
        candidates: Candidates,
        export_format: str,
    ) -> Self:
        """Count the bytes of a model's units with each of their schemes."""
        bytes_of = {
            (unit.name, name): unit_bytes(
                prepared.module, schemes, export_format, prepared.widths
            )
            for unit in units
            for name, schemes in candidates.schemes[unit.name].items()
        }
        layers = {layer for unit in units for layer in unit.layers}
        outside = {
            layer: fields
            for layer, fields in prepared.all_layers.items()
            if fields["bits"] < 16 and layer not in layers
        }
        plain = plain_bytes(prepared.module, layers | set(outside), prepared.widths)
        plain += unit_bytes(prepared.module, outside, export_format, prepared.widths)
        embedding = _embedding_bytes(prepared.module)
        return cls(units, candidates.base, bytes_of, plain, embedding)

    @property
    def plain_active(self) -> int:
        """What a token reads of the tensors that no unit has: all but embeddings."""
        return self.plain - self.embedding

    def bytes(self, choice: Mapping[str, str]) -> int:
        """Bytes of all tensors."""
        return self.plain + sum(
            self.bytes_of[u.name, choice[u.name]] for u in self.units
        )

    def active(self, choice: Mapping[str, str]) -> float:
        """Bytes that one token reads."""
        return self.plain_active + sum(
            self.bytes_of[u.name, choice[u.name]] * u.read for u in self.units
        )

    def cost(self, choice: Mapping[str, str], damage: Damage) -> Cost:
        """The cost of a choice."""
        sizes = self.bytes(choice), self.active(choice)
        return Cost(*sizes, damage.kl, damage.routing)

    def within(self, budget: str | int, active_budget: str | int | None) -> Sizes:
        """Return what the units may take.

        Args:
            budget: Bytes beyond the uniform export: a share such as "3%", or a number.
            active_budget: The same for the bytes that a token reads; None for any.

        Raises:
            ValueError: A budget is neither, or less than the smallest schemes take.
        """
        least, least_read = smallest(self.bytes_of, self.units)
        uniform = self.bytes(self.base)
        limit = _limit(("budget", budget), uniform, self.plain, least)
        if active_budget is None:
            return Sizes(self.bytes_of, limit)
        active = _limit(
            ("active_budget", active_budget),
            self.active(self.base),
            self.plain_active,
            least_read,
        )
        return Sizes(self.bytes_of, limit, active)


def _limit(
    given: tuple[str, str | int], uniform: float, plain: int, units: float
) -> float:
    """Return what a budget leaves for the units."""
    name, budget = given
    allowed = budget_bytes(name, budget, uniform)
    if allowed < plain + units:
        least = math.ceil(plain + units)
        raise ValueError(
            f"{name}={budget!r}: it allows {allowed:,.0f} bytes, and with the smallest "
            f"schemes there are {least:,}; allowed is {name}="
            f"{math.ceil(least - uniform)} bytes or more, or add a smaller scheme to "
            "options"
        )
    return allowed - plain


def _embedding_bytes(model: nn.Module) -> int:
    """Bytes of the input embedding, of which a token reads one row."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if getattr(model.config, "tie_word_embeddings", False):
        return 0  # the output projection reads all of it
    weight: Tensor = embedding.weight
    return weight.numel() * weight.element_size()
