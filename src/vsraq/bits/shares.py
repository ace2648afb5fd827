# SPDX-License-Identifier: Apache-2.0
"""Which layers the bytes of a model belong to; its config is enough."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from vsraq.routers import Router, expert_containers, find_routers, linear_map

_KINDS = ("routed experts", "shared experts", "attention", "dense MLP", "outside")


@dataclass(frozen=True)
class Share:
    """What a kind of layers takes.

    Attributes:
        stored: Share of the bytes of the whole export, a fraction.
        active: Share of the bytes that one token reads, a fraction.
    """

    stored: float
    active: float


def byte_shares(model: nn.Module, *, bits: float = 4.15625) -> dict[str, Share]:
    """Compute which layers the bytes of a uniform export belong to.

    Args:
        model: A causal language model, such as one on meta that is built from a config.
        bits: Bits per weight of the quantized layers, scales included; the default is
            W4A16 with groups of 128. What is outside of the blocks has 16 bits.

    Returns:
        By kind: "routed experts", "shared experts", "attention" (Mamba and other
        mixers too), "dense MLP", "outside" (embedding and output projection; a token
        reads one row of the embedding).
    """
    routers = find_routers(model)
    stored, active = dict.fromkeys(_KINDS, 0.0), dict.fromkeys(_KINDS, 0.0)
    for name, size, read, kind in _weights(model, routers):
        width = 2.0 if kind == "outside" else bits / 8
        stored[kind] += size * width
        is_embedding = isinstance(
            model.get_submodule(name.rpartition(".")[0]), nn.Embedding
        )
        active[kind] += 0.0 if is_embedding else size * width * read
    whole, per_token = sum(stored.values()), sum(active.values())
    return {k: Share(stored[k] / whole, active[k] / per_token) for k in _KINDS}


def _weights(
    model: nn.Module, routers: Sequence[Router]
) -> Iterator[tuple[str, int, float, str]]:
    """Yield every matrix: name, size, the share that a token reads, and kind."""
    containers = expert_containers(model, routers)
    around = {name.rpartition(".")[0] for name in containers}
    reads = {r.name.rpartition(".")[0]: r.top_k / r.num_experts for r in routers}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or _is_router(model, name, routers):
            continue
        place = next((c for c in containers if name.startswith(f"{c}.")), None)
        if place is not None:
            read = reads.get(place.rpartition(".")[0], 1.0)
            yield name, parameter.numel(), read, "routed experts"
        elif any(a and name.startswith(f"{a}.") for a in around):
            yield name, parameter.numel(), 1.0, "shared experts"
        elif ".layers." not in name:
            yield name, parameter.numel(), 1.0, "outside"
        else:
            kind = "dense MLP" if ".mlp." in name else "attention"
            yield name, parameter.numel(), 1.0, kind


def _is_router(model: nn.Module, name: str, routers: Sequence[Router]) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return any(linear_map(model.get_submodule(r.name)) is owner for r in routers)
