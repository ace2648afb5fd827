# SPDX-License-Identifier: Apache-2.0
"""The two kinds of passes over a text: full precision, then a quantized model.

Shapes: B sequences of S tokens, T = B S, K top-k, E experts, H hidden width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vsraq.analysis.forward import RoutedModel
from vsraq.analysis.fp_pass import FullPrecisionPass, StoredBatch
from vsraq.analysis.outputs import OutputChange, output_change
from vsraq.analysis.routing import expert_ranks
from vsraq.analysis.tally import Tally, expert_load
from vsraq.analysis.text import Text
from vsraq.routers import BoundRouter, Router
from vsraq.tokens.output_head import OutputHead
from vsraq.tokens.sampling import Sampling

# Tokens whose logits over the vocabulary exist at once, on each side: as many as have
# this number of logits, but not fewer than the tokens.
CHUNK_LOGITS, CHUNK_TOKENS = 2**22, 256
_NO_TOKEN = -100


@dataclass
class FullPrecisionModel:
    """The full-precision model after its pass.

    Attributes:
        model: The model; its blocks may be gone.
        returns_tuple: As in `vsraq.analysis.forward.Forward`.
        stored: What its pass has left.
        load: By router name, tokens of each expert, (E,).
        seconds: Wall time of the pass.
    """

    model: RoutedModel
    stored: FullPrecisionPass
    returns_tuple: bool | None = None
    load: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def run_full_precision(
    model: RoutedModel,
    text: Text,
    stored: FullPrecisionPass,
    *,
    batch_size: int,
    say: Callable[[str], None],
    progress: bool,
) -> FullPrecisionModel:
    """Run the full-precision model over a text, and store what the others need.

    Args:
        model: The model.
        text: The text.
        stored: Where to.
        batch_size: Sequences of a batch.
        say: Is told the size before anything is written.
        progress: Whether to show a bar on stderr.

    Raises:
        ValueError: There is not enough room on the disk.
    """
    result = FullPrecisionModel(model, stored)
    started = time.perf_counter()
    batches = _with_progress(text, batch_size, "full precision", progress)
    for index, input_ids in enumerate(batches):
        if index == 0:
            model.check_head(input_ids)
        forward = model.run(input_ids, expert_ranks)
        ranks = {name: r.cpu() for name, r in forward.routing.items()}
        batch = StoredBatch(ranks, forward.rows.cpu())
        if index == 0:
            say(stored.check_room(batch))
        stored.write(index, batch)
        result.returns_tuple = forward.returns_tuple
        for router in model.routers:
            chosen = _first(ranks[router.name], router)
            counts = expert_load(chosen, router.num_experts)
            result.load[router.name] = result.load.get(router.name, 0) + counts
    result.seconds = time.perf_counter() - started
    return result


def _first(ranks: Tensor, router: Router) -> Tensor:
    """Return the experts with the K first ranks, (T, K), in no order."""
    return (ranks < router.top_k).nonzero()[:, 1]


def run_quantized(
    model: RoutedModel,
    fp: FullPrecisionModel,
    text: Text,
    tally: Tally,
    *,
    sampling: Sampling,
    batch_size: int,
    name: str,
    progress: bool,
) -> float:
    """Run a quantized model over the same text, and add what differs to a tally.

    Args:
        model: The quantized model.
        fp: The full-precision one, after its pass.
        text: The text.
        tally: Takes the sums.
        sampling: How outputs are sampled.
        batch_size: As in the full-precision pass.
        name: Of the method.
        progress: Whether to show a bar on stderr.

    Returns:
        Wall time, seconds.
    """
    started = time.perf_counter()
    for index, input_ids in enumerate(_with_progress(text, batch_size, name, progress)):
        if index == 0:
            model.check_head(input_ids)
        forward = model.run(input_ids, BoundRouter.select)
        batch = fp.stored.read(index)
        with ExitStack() as stack:
            q_head = stack.enter_context(model.head(forward.returns_tuple))
            fp_head = q_head  # of a model that is compared with itself
            if fp.model.model is not model.model:
                fp_head = stack.enter_context(fp.model.head(fp.returns_tuple))
            outputs = _outputs(
                (q_head, forward.rows), (fp_head, batch.rows), input_ids, sampling
            )
        shape = (input_ids.shape[0], input_ids.shape[1])
        tally.add(shape, outputs, forward.routing, batch.ranks)
    return time.perf_counter() - started


def _outputs(
    q: tuple[OutputHead, Tensor],
    fp: tuple[OutputHead, Tensor],
    input_ids: Tensor,
    sampling: Sampling,
) -> OutputChange:
    """Compare the outputs of T tokens, (T,) each, in chunks."""
    (q_head, q_rows), (fp_head, fp_rows) = q, fp
    following = F.pad(input_ids[:, 1:], (0, 1), value=_NO_TOKEN).flatten()
    parts: list[OutputChange] = []
    start, chunk = 0, CHUNK_TOKENS
    while start < len(following):
        part = slice(start, start + chunk)
        q_logits = q_head(q_rows[part])
        start, chunk = start + chunk, max(CHUNK_LOGITS // q_logits.shape[-1], chunk)
        fp_logits = fp_head(fp_rows[part]).to(q_logits.device)
        next_ids = following[part].to(q_logits.device)
        parts.append(output_change(q_logits, fp_logits, next_ids, sampling))
    return OutputChange(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _with_progress(
    text: Text, batch_size: int, name: str, progress: bool
) -> Iterator[Tensor]:
    """Yield the batches of a text, with a bar that counts tokens."""
    with tqdm(
        total=text.tokens,
        desc=name,
        unit="tok",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for input_ids in text.batches(batch_size):
            yield input_ids
            bar.update(input_ids.numel())


def check_same_routers(
    q_routers: Sequence[Router], fp_routers: Sequence[Router], name: str
) -> None:
    """Check that two models route alike.

    Raises:
        ValueError: Their routers differ, or there are none.
    """
    if not fp_routers:
        raise ValueError(
            "the full-precision model has no MoE router; allowed are "
            "mixture-of-experts models"
        )
    if tuple(q_routers) != tuple(fp_routers):
        raise ValueError(
            f"the full-precision model has routers {[r.name for r in fp_routers]} and "
            f"{name} {[r.name for r in q_routers]}: allowed are equal ones"
        )
