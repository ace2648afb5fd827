# SPDX-License-Identifier: Apache-2.0
"""Run two models on the same text: perplexity, KL and agreement of the routing."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vsraq.blocks import block_output, decoder_blocks
from vsraq.capture import RouterCapture
from vsraq.metrics import StreamingMean, jaccard, output_kl
from vsraq.routers import BoundRouter, Router, find_routers
from vsraq.tokens.output_head import output_head, takes_embeddings

# Tokens whose logits over the vocabulary exist at once, on each side; the comparison
# takes about five more float32 values per token and vocabulary entry.
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Comparison:
    """Closeness of a quantized model to its full-precision original.

    Attributes:
        perplexity: exp of the mean next-token NLL of the quantized model.
        kl: Mean KL(fp || q) of the next-token distributions, nats.
        excess_nll: Mean next-token NLL minus that of the full-precision model, nats.
        excess_nll_error: Its standard error over the sequences; NaN for one sequence.
        jaccard: Mean Jaccard of the selected experts per MoE layer, by router name.
    """

    perplexity: float
    kl: float
    excess_nll: float
    excess_nll_error: float
    jaccard: dict[str, float]

    @property
    def mean_jaccard(self) -> float:
        """Mean over the MoE layers."""
        return sum(self.jaccard.values()) / len(self.jaccard)


@dataclass(frozen=True)
class _Pass:
    """Output of a model for a batch of T tokens.

    Attributes:
        selected: By router name, the experts it chose, (T, K).
        rows: Hidden states after its last block, (T, H), or its logits, (T, V).
        returns_tuple: Whether its last block returns a tuple; None for logits.
    """

    selected: dict[str, Tensor]
    rows: Tensor
    returns_tuple: bool | None

    @contextmanager
    def head(
        self, model: nn.Module, blocks: Sequence[str]
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield the function that turns rows into logits, (n, V)."""
        if self.returns_tuple is None:
            yield lambda rows: rows
            return
        with output_head(model, blocks, returns_tuple=self.returns_tuple) as head:
            yield head


def _run(
    model: nn.Module,
    routers: Sequence[Router],
    blocks: Sequence[str],
    input_ids: Tensor,
) -> _Pass:
    """Run a model up to its last block, or to its logits where that is not possible."""
    returns_tuple = None
    with RouterCapture(model, routers, BoundRouter.select) as capture:
        if blocks and takes_embeddings(model):
            last = model.get_submodule(blocks[-1])
            rows, returns_tuple = block_output(last, lambda: model(input_ids=input_ids))
        else:
            rows = model(input_ids=input_ids).logits
        selected = {name: torch.cat(calls) for name, calls in capture.take().items()}
    return _Pass(selected, rows.flatten(0, 1), returns_tuple)


@torch.no_grad()
def compare(
    q_model: nn.Module, fp_model: nn.Module, batches: Iterable[Tensor]
) -> Comparison:
    """Compare two causal language models on token ids.

    The selected experts follow each model's real rule (correction bias and groups
    included), recomputed from its routers' inputs.

    The output logits of `CHUNK_TOKENS` tokens exist at once, not those of a batch,
    unless a model takes no `inputs_embeds` or its decoder blocks are not found.

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
    blocks = decoder_blocks(fp_model, routers)
    nll, kl = StreamingMean(), StreamingMean()
    excess: list[Tensor] = []  # of each sequence, nats
    overlap = {router.name: StreamingMean() for router in routers}
    with torch.compiler.set_stance("force_eager"):  # hooks are not in compiled code
        for input_ids in batches:
            q = _run(q_model, routers, blocks, input_ids)
            fp = _run(fp_model, routers, blocks, input_ids)
            for name, chosen in q.selected.items():
                fp_chosen = fp.selected[name].to(chosen.device)
                overlap[name].update(jaccard(chosen, fp_chosen))
            with ExitStack() as stack:
                q_head = stack.enter_context(q.head(q_model, blocks))
                # a model that is compared with itself has one head
                fp_head = q_head
                if fp_model is not q_model:
                    fp_head = stack.enter_context(fp.head(fp_model, blocks))
                differences = []
                for part, next_ids in _chunks(input_ids):
                    q_logits = q_head(q.rows[part])
                    fp_logits = fp_head(fp.rows[part]).to(q_logits.device)
                    kl.update(output_kl(q_logits, fp_logits))
                    losses = _nll(q_logits, next_ids)
                    differences.append((losses - _nll(fp_logits, next_ids)).cpu())
                    nll.update(losses[next_ids.to(losses.device) >= 0])
            by_sequence = torch.cat(differences).view(input_ids.shape)[:, :-1]
            excess.append(by_sequence.double().mean(dim=1))
    sequences = torch.cat(excess)
    return Comparison(
        perplexity=math.exp(nll.compute()),
        kl=kl.compute(),
        excess_nll=sequences.mean().item(),
        excess_nll_error=_standard_error(sequences),
        jaccard={name: mean.compute() for name, mean in overlap.items()},
    )


_NO_TOKEN = -100


def _nll(logits: Tensor, next_ids: Tensor) -> Tensor:
    """Return the NLL of each token, (T,), nats; 0 where the next one is unknown."""
    return F.cross_entropy(
        logits.float(),
        next_ids.to(logits.device),
        ignore_index=_NO_TOKEN,
        reduction="none",
    )


def _standard_error(values: Tensor) -> float:
    """Return the standard error of the mean; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return values.std().item() / math.sqrt(len(values))


def _chunks(input_ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some tokens of a batch, and the token after each of them."""
    following = F.pad(input_ids[:, 1:], (0, 1), value=_NO_TOKEN).flatten()
    for start in range(0, len(following), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        yield part, following[part]
