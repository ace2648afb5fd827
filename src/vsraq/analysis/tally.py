# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens while models run: nothing here grows with the number of tokens.

There is a row of sums per sequence, for the intervals, and a fixed number of histogram
bins and of sampled tokens.

Shapes: B sequences of S tokens in a batch, T = B S, E experts, K top-k.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsraq.analysis.outputs import OutputChange
from vsraq.analysis.routing import RoutingChange, rank_counts, routing_change
from vsraq.routers import Router

MAX_SAMPLED = 5000
REGIONS = ("region_a", "region_b", "region_c", "region_d")
SAMPLED = ("sampled_jsd", "jsd", "kl", "routing_shift")
# per token; "tokens" and "predicted" are what the others are divided by
TOKEN_SUMS = (
    *("tokens", "predicted", "q_nll", "fp_nll", "excess_nll"),
    *("kl", "jsd", "sampled_jsd", "top1_agreement"),
    *REGIONS,
)
LAYER_SUMS = RoutingChange._fields


def _linear(start: float, stop: float, bins: int) -> list[float]:
    return [start + (stop - start) * i / bins for i in range(bins + 1)]


EDGES: Mapping[str, list[float]] = {
    "sampled_jsd": _linear(0, 0.7, 70),  # it is at most ln 2
    "jsd": _linear(0, 0.7, 70),
    "kl": [10 ** (exponent / 10) for exponent in range(-60, 11)],
    "routing_shift": _linear(0, 1, 50),
}


@dataclass(frozen=True)
class Thresholds:
    """What counts as high in the regions of SRA Fig. 3.

    The paper gives none for its figure; these are those of its Table 4.

    Attributes:
        sampled_jsd: Above it, a token's output has changed, nats.
        routing_shift: Above it, its routing has, mean over layers, a fraction.

    Raises:
        ValueError: One is not allowed.
    """

    sampled_jsd: float = 0.1
    routing_shift: float = 0.1

    def __post_init__(self) -> None:
        for name, most in (("sampled_jsd", math.log(2)), ("routing_shift", 1.0)):
            value = getattr(self, name)
            if not 0 <= value < most:
                raise ValueError(
                    f"thresholds: {name}={value!r}: allowed is a number from 0 to "
                    f"below {most:.4g}"
                )

    def regions(self, sampled_jsd: Tensor, routing_shift: Tensor) -> Tensor:
        """Return which region each token is in, (4, T), A to D."""
        output = sampled_jsd > self.sampled_jsd
        routing = routing_shift > self.routing_shift
        return torch.stack(
            (
                output & ~routing,
                output & routing,
                ~(output | routing),
                ~output & routing,
            )
        )


class Histogram:
    """Counts between fixed edges; a bin has its lower edge, the last has both.

    Args:
        edges: n + 1 ascending numbers.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = list(edges)
        self._edges = torch.tensor(self.edges, dtype=torch.float64)
        self._counts = torch.zeros(len(self.edges) + 1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count the elements of a tensor."""
        values = values.double().cpu()
        bins = torch.bucketize(values, self._edges, right=True)
        bins[values == self._edges[-1]] -= 1
        self._counts += torch.bincount(bins, minlength=len(self._counts))

    @property
    def counts(self) -> list[int]:
        """Values of each bin, n of them."""
        return self._counts[1:-1].tolist()

    @property
    def below(self) -> int:
        """Values below the first edge."""
        return int(self._counts[0])

    @property
    def above(self) -> int:
        """Values above the last edge."""
        return int(self._counts[-1])


@dataclass(frozen=True)
class TokenSample:
    """Some tokens, the same for every method.

    Attributes:
        positions: Ascending, among all tokens, (n,).
    """

    positions: Tensor

    @classmethod
    def draw(cls, tokens: int, seed: int) -> "TokenSample":
        """Draw at most `MAX_SAMPLED` of some tokens."""
        count = min(tokens, MAX_SAMPLED)
        return cls(
            torch.tensor(sorted(random.Random(seed).sample(range(tokens), count)))
        )

    def inside(self, start: int, stop: int) -> Tensor:
        """Return those from `start` to before `stop`, relative to `start`."""
        first, end = torch.searchsorted(self.positions, torch.tensor([start, stop]))
        return self.positions[first:end] - start


class Tally:
    """The sums of one method.

    Args:
        routers: The routers.
        thresholds: Of the regions.
        sample: Whose values are kept.
    """

    def __init__(
        self, routers: Sequence[Router], thresholds: Thresholds, sample: TokenSample
    ) -> None:
        self._routers = tuple(routers)
        self._thresholds = thresholds
        self._sample = sample
        self._seen = 0
        self._rows: list[Tensor] = []
        self.histograms = {name: Histogram(edges) for name, edges in EDGES.items()}
        self._sampled: dict[str, list[Tensor]] = {name: [] for name in SAMPLED}
        sizes = {r.name: (r.top_k, r.num_experts) for r in routers}
        zeros = torch.zeros
        self.dropped = {n: zeros(k, dtype=torch.int64) for n, (k, _) in sizes.items()}
        self.injected = {
            n: zeros(e - k, dtype=torch.int64) for n, (k, e) in sizes.items()
        }
        self.load = {n: zeros(e, dtype=torch.int64) for n, (_, e) in sizes.items()}

    def add(
        self,
        shape: tuple[int, int],
        outputs: OutputChange,
        q_chosen: Mapping[str, Tensor],
        fp_ranks: Mapping[str, Tensor],
    ) -> None:
        """Add a batch of B sequences with S tokens.

        Args:
            shape: (B, S).
            outputs: (T,) each.
            q_chosen: By router name, experts of the quantized model, (T, K) int64.
            fp_ranks: By router name, the rank of every expert, (T, E).
        """
        layers = [
            self._layer(r, q_chosen[r.name].cpu(), fp_ranks[r.name])
            for r in self._routers
        ]
        shift = torch.stack([layer.routing_shift for layer in layers]).mean(0)
        values = {n: v.cpu() for n, v in outputs._asdict().items()}
        values["routing_shift"] = shift
        inside = self._sample.inside(self._seen, self._seen + shift.numel())
        self._seen += shift.numel()
        for name in SAMPLED:
            self.histograms[name].add(values[name])
            self._sampled[name].append(values[name][inside])
        tokens = torch.ones(shape)
        predicted = tokens.clone()
        predicted[:, -1] = 0
        values["tokens"], values["predicted"] = tokens.flatten(), predicted.flatten()
        values["excess_nll"] = values["q_nll"] - values["fp_nll"]
        regions = self._thresholds.regions(values["sampled_jsd"], shift).float()
        values |= zip(REGIONS, regions, strict=True)
        columns = [values[name] for name in TOKEN_SUMS]
        columns += [column for layer in layers for column in layer]
        self._rows.append(torch.stack(columns).view(-1, *shape).double().sum(-1).T)

    def _layer(self, router: Router, chosen: Tensor, ranks: Tensor) -> RoutingChange:
        q_ranks = ranks.gather(-1, chosen).long()
        dropped, injected = rank_counts(q_ranks, router.num_experts)
        self.dropped[router.name] += dropped
        self.injected[router.name] += injected
        self.load[router.name] += expert_load(chosen, router.num_experts)
        return routing_change(q_ranks)

    def token_sums(self) -> dict[str, Tensor]:
        """Return the sums of each sequence, (sequences,) float64, by `TOKEN_SUMS`."""
        table = torch.cat(self._rows)
        return dict(zip(TOKEN_SUMS, table[:, : len(TOKEN_SUMS)].T, strict=True))

    def layer_sums(self) -> dict[str, dict[str, Tensor]]:
        """Return the same of each router, by `LAYER_SUMS`."""
        table = torch.cat(self._rows)[:, len(TOKEN_SUMS) :]
        parts = table.T.split(len(LAYER_SUMS))
        return {
            router.name: dict(zip(LAYER_SUMS, part, strict=True))
            for router, part in zip(self._routers, parts, strict=True)
        }

    def sampled(self) -> dict[str, Tensor]:
        """Return the values of the sampled tokens, (n,) float32, by `SAMPLED`."""
        return {name: torch.cat(parts).float() for name, parts in self._sampled.items()}


def expert_load(chosen: Tensor, experts: int) -> Tensor:
    """Count the tokens of each expert, (E,).

    Args:
        chosen: Experts, (T, K) integers.
        experts: E.
    """
    return torch.bincount(chosen.flatten().long(), minlength=experts)
