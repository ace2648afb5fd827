# SPDX-License-Identifier: Apache-2.0
"""How far rounding moves the output at every token: Sampled-JSD (SRA, Eq. 6).

Shapes: T tokens, S tokens of one sample, H hidden width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from vsraq.metrics import routing_shift, sampled_jsd
from vsraq.tokens.output_head import OutputHead
from vsraq.tokens.sampling import Sampling


@torch.no_grad()
def output_shift(
    q_hidden: Sequence[Tensor],
    fp_hidden: Sequence[Tensor],
    head: OutputHead,
    *,
    q_head: OutputHead | None = None,
    sampling: Sampling | None = None,
    chunk_tokens: int = 1024,
) -> list[Tensor]:
    """Compute the Sampled-JSD of every token, from hidden states after the last block.

    Peak memory besides the arguments: the logits of one chunk on both paths, 2 *
    chunk_tokens * V values in the dtype of `head`, and what `head` itself takes. T * V
    values never exist at once. 1024 tokens and V = 200k in bfloat16 are 0.8 GB.

    Args:
        q_hidden: Hidden states of the quantized path, one tensor per sample,
            (..., S, H).
        fp_hidden: The same in full precision.
        head: Hidden states (n, H) to logits (n, V), of the full-precision model.
        q_head: That of the quantized model, if its output projection is quantized too;
            None takes `head`.
        sampling: How outputs are sampled; None takes the defaults.
        chunk_tokens: How many tokens go through the heads at once.

    Returns:
        One tensor per sample, float32 on the CPU, (S,), nats.

    Raises:
        ValueError: The paths differ in samples or tokens, or `chunk_tokens` is not
            allowed.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: allowed is a positive int")
    if [h.shape for h in q_hidden] != [h.shape for h in fp_hidden]:
        raise ValueError(
            f"q_hidden has {len(q_hidden)} samples and fp_hidden {len(fp_hidden)}, or "
            "their shapes differ: allowed are equal ones"
        )
    values = asdict(sampling or Sampling())
    shifts = []
    for q, fp in zip(q_hidden, fp_hidden, strict=True):
        chunks = zip(
            q.reshape(-1, q.shape[-1]).split(chunk_tokens),
            fp.reshape(-1, fp.shape[-1]).split(chunk_tokens),
            strict=True,
        )
        shifts.append(
            torch.cat(
                [
                    sampled_jsd((q_head or head)(a), head(b), **values).cpu()
                    for a, b in chunks
                ]
            )
        )
    return shifts


_SHIFT_TOKENS = 65536  # a K x K comparison for each of them exists at once


class MeanRoutingShift:
    """Routing shift per token, mean over the MoE layers."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._layers = 0

    def update(
        self, q_chosen: Mapping[str, Tensor], fp_chosen: Mapping[str, Tensor]
    ) -> None:
        """Add the layers of a block: experts by router, (T, K)."""
        for name, chosen in fp_chosen.items():
            chunks = zip(
                q_chosen[name].split(_SHIFT_TOKENS),
                chosen.split(_SHIFT_TOKENS),
                strict=True,
            )
            shift = torch.cat([routing_shift(q, fp).cpu() for q, fp in chunks])
            self._total = shift if self._total is None else self._total + shift
            self._layers += 1

    def compute(self) -> Tensor:
        """Return the mean of each token, (T,), a fraction.

        Raises:
            ValueError: No layer had a router.
        """
        if self._total is None:
            raise ValueError(
                "shift_threshold: no block of this model has a MoE router, so there is "
                "no routing shift; allowed is None"
            )
        return self._total / self._layers
