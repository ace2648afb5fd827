# SPDX-License-Identifier: Apache-2.0
"""Choose samples so that every expert gets its share of the tokens.

The idea is that of MoEQuant (arXiv:2505.03804) and EAQuant (arXiv:2506.13329): experts
that few calibration tokens reach are rounded badly. Here samples are chosen, not made:
greedily, each time the one that adds most to

    sum over all experts of log(1 + tokens of the expert),

which grows the faster the fewer tokens an expert has.

Shapes: N samples, S tokens each, E experts of one router.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vsraq.capture import RouterCapture
from vsraq.routers import BoundRouter, count_experts, find_routers


@dataclass(frozen=True)
class ExpertLoads:
    """How many tokens each expert got.

    Attributes:
        tokens: By router name, (E,) int64.
    """

    tokens: Mapping[str, Tensor]

    @property
    def unreached(self) -> int:
        """Experts of all routers without a token."""
        return sum(int((counts == 0).sum()) for counts in self.tokens.values())

    @property
    def lowest_share(self) -> float:
        """Tokens of the least-loaded expert, relative to the mean of its router."""
        return min(
            (counts.min() / counts.double().mean()).item()
            for counts in self.tokens.values()
        )

    @property
    def spread(self) -> float:
        """Standard deviation over mean of the tokens of a router's experts, mean."""
        spreads = [
            (counts.double().std(correction=0) / counts.double().mean()).item()
            for counts in self.tokens.values()
        ]
        return sum(spreads) / len(spreads)

    def __str__(self) -> str:
        experts = sum(len(counts) for counts in self.tokens.values())
        return (
            f"{self.unreached} of {experts} experts unreached, the least-loaded has "
            f"{self.lowest_share:.1%} of its router's mean, spread {self.spread:.3f}"
        )


@dataclass(frozen=True)
class BalancedChoice:
    """Samples that were chosen, and what that changed.

    Attributes:
        chosen: Indices of the samples, in the order of their choice.
        before: Tokens per expert of the first samples, as many as were chosen.
        after: Tokens per expert of the chosen ones.
    """

    chosen: tuple[int, ...]
    before: ExpertLoads
    after: ExpertLoads

    def __str__(self) -> str:
        return f"before: {self.before}\nafter:  {self.after}"


@torch.no_grad()
def sample_loads(
    model: nn.Module,
    samples: Sequence[Sequence[int]],
    *,
    router_pattern: str | None = None,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """Count for every sample how many of its tokens each expert gets.

    Args:
        model: A transformers MoE model in full precision.
        samples: Token ids, N lists of S.
        router_pattern: What names the routers, as in `VSRAQConfig`; None finds them.
        batch_size: Samples per forward pass.

    Returns:
        By router name, (N, E) int64, on the CPU.

    Raises:
        ValueError: The model has no MoE router.
    """
    routers = find_routers(model, router_pattern=router_pattern)
    if not routers:
        raise ValueError(
            f"model={type(model).__name__}: it has no MoE router, so there are no "
            "experts to balance; allowed is balance_experts=False"
        )
    device = next(model.parameters()).device
    counted: dict[str, list[Tensor]] = {router.name: [] for router in routers}
    # those of higher indices have no weights
    experts = {r.name: count_experts(model, r) for r in routers}
    with (
        torch.compiler.set_stance("force_eager"),  # hooks are not in compiled code
        RouterCapture(model, routers, BoundRouter.select) as capture,
    ):
        for start in range(0, len(samples), batch_size):
            batch = torch.tensor(samples[start : start + batch_size], device=device)
            model(input_ids=batch, use_cache=False)
            for name, calls in capture.take().items():
                selected = torch.cat(calls).view(len(batch), -1).cpu()
                counted[name].append(_count(selected.long(), experts[name]))
    return {name: torch.cat(counts) for name, counts in counted.items()}


def _count(selected: Tensor, num_experts: int) -> Tensor:
    """Count the selections of each row, (B, E), of (B, n) indices."""
    found = [torch.bincount(row, minlength=num_experts) for row in selected]
    return torch.stack([counts[:num_experts] for counts in found])


def choose_balanced(loads: Mapping[str, Tensor], count: int) -> BalancedChoice:
    """Choose samples greedily; of equal ones the first.

    Args:
        loads: By router name, tokens of each expert in each sample, (N, E).
        count: Samples to choose.

    Raises:
        ValueError: There are fewer samples than that.
    """
    available = len(next(iter(loads.values())))
    if not 1 <= count <= available:
        raise ValueError(
            f"nsamples={count}: there are {available} candidates; allowed is 1 to that "
            "many, so take more candidates"
        )
    every = torch.cat([counts.double() for counts in loads.values()], dim=1)
    tokens = torch.zeros(every.shape[1], dtype=torch.float64)
    left = torch.ones(available, dtype=torch.bool)
    chosen = []
    for _ in range(count):
        value = torch.log1p(tokens + every).sum(dim=1)
        best = int(value.masked_fill(~left, -torch.inf).argmax())
        chosen.append(best)
        left[best] = False
        tokens += every[best]
    first = range(count)
    return BalancedChoice(tuple(chosen), _total(loads, first), _total(loads, chosen))


def _total(loads: Mapping[str, Tensor], samples: Sequence[int]) -> ExpertLoads:
    picked = torch.tensor(list(samples))
    return ExpertLoads({name: counts[picked].sum(0) for name, counts in loads.items()})
