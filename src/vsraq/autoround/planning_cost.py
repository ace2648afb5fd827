# SPDX-License-Identifier: Apache-2.0
"""What a plan will cost: the cost of measuring, read off a prepared model."""

from collections.abc import Sequence

from torch import Tensor

from vsraq.autoround.planning import Candidates
from vsraq.autoround.prepared_model import PreparedModel
from vsraq.bits.cost import PlanningCost
from vsraq.bits.units import Unit


def planning_cost(
    prepared: PreparedModel,
    units: Sequence[Unit],
    candidates: Candidates,
    tokens: int,
) -> PlanningCost:
    """Compute what it costs to measure units with their schemes.

    Args:
        prepared: The model; tensors may be on meta.
        units: Its units.
        candidates: Their schemes.
        tokens: Tokens to measure with.
    """
    module, blocks = prepared.module, prepared.model.blocks
    position = {name: index for index, name in enumerate(blocks)}
    starts = [0]  # the uniform scheme
    read = 0.0
    for unit in units:
        inside = [b for b in blocks if unit.layers[0].startswith(f"{b}.")]
        start = position[inside[0]] if inside else len(blocks)
        schemes = candidates.schemes[unit.name].values()
        starts += [start] * sum(
            any(fields["bits"] < 16 for fields in layers.values()) for layers in schemes
        )
        sizes = [_weights(prepared, layer) for layer in unit.layers]
        read += unit.read * sum(sizes) * bool(inside)
    stored = sum(
        p.numel() for b in blocks for p in module.get_submodule(b).parameters()
    )
    embedding = module.get_input_embeddings().weight  # type: ignore[operator]
    return PlanningCost.of(
        starts,
        len(blocks),
        tokens=tokens,
        hidden=embedding.shape[-1],
        block_weights=stored / len(blocks),
        read_weights=read / len(blocks),
        head_weights=embedding.numel(),
    )


def _weights(prepared: PreparedModel, layer: str) -> int:
    weight: Tensor = prepared.module.get_submodule(layer).weight  # type: ignore[assignment]
    return weight.numel()
