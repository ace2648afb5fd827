# SPDX-License-Identifier: Apache-2.0
"""Run two models on the same text: perplexity, KL and agreement of the routing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vsraq.capture import RouterCapture
from vsraq.metrics import StreamingMean, jaccard, next_token_nll, output_kl
from vsraq.routers import (
    Router,
    correction_bias,
    find_routers,
    select_experts,
)


@dataclass(frozen=True)
class Comparison:
    """How close a quantized model is to its full-precision original.

    Attributes:
        perplexity: exp of the mean next-token NLL of the quantized model.
        kl: Mean KL(fp || q) of the next-token distributions, nats.
        jaccard: Mean Jaccard of the selected experts per MoE layer, by router name.
    """

    perplexity: float
    kl: float
    jaccard: dict[str, float]

    @property
    def mean_jaccard(self) -> float:
        """Mean over the MoE layers."""
        return sum(self.jaccard.values()) / len(self.jaccard)


def _run(
    model: nn.Module, routers: Sequence[Router], input_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output logits (B, S, V), and by router name the experts it chose, (T, K)."""
    with RouterCapture[Tensor](model, routers) as capture:
        logits: Tensor = model(input_ids=input_ids).logits
        kept = capture.take()
    selected = {}
    for router in routers:
        own_logits = torch.cat(kept[router.name])
        bias = correction_bias(model, router)
        selected[router.name] = select_experts(router, own_logits, bias)
    return logits, selected


@torch.no_grad()
def compare(
    q_model: nn.Module, fp_model: nn.Module, batches: Iterable[Tensor]
) -> Comparison:
    """Compare two causal language models on token ids.

    The selected experts follow each model's real rule (correction bias and groups
    included), recomputed from its routers' inputs.

    Args:
        q_model: The quantized model.
        fp_model: The full-precision model, of the same architecture.
        batches: Token ids, each (B, S), held out from calibration.

    Returns:
        The figures over all batches.

    Raises:
        ValueError: The models' routers differ, or there is no router or no batch.
    """
    routers = find_routers(fp_model)
    q_routers = find_routers(q_model)
    if routers != q_routers:
        raise ValueError(
            f"fp_model has routers {[r.name for r in routers]} and q_model "
            f"{[r.name for r in q_routers]}: allowed are equal ones"
        )
    nll, kl = StreamingMean(), StreamingMean()
    overlap = {router.name: StreamingMean() for router in routers}
    for input_ids in batches:
        q_logits, q_selected = _run(q_model, routers, input_ids)
        fp_logits, fp_selected = _run(fp_model, routers, input_ids)
        nll.update(next_token_nll(q_logits, input_ids))
        kl.update(output_kl(q_logits, fp_logits.to(q_logits.device)))
        for name, chosen in q_selected.items():
            overlap[name].update(jaccard(chosen, fp_selected[name].to(chosen.device)))
    return Comparison(
        perplexity=math.exp(nll.compute()),
        kl=kl.compute(),
        jaccard={name: mean.compute() for name, mean in overlap.items()},
    )
