# SPDX-License-Identifier: Apache-2.0
"""The two kinds of passes over a text: full precision, then a quantized model.

Shapes: B sequences of S tokens, T = B S, K top-k, E experts, H hidden width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vsraq.analysis.forward import CHECKED_TOKENS, Forward, RoutedModel
from vsraq.analysis.fp_pass import FullPrecisionPass, StoredBatch
from vsraq.analysis.outputs import OutputChange, check_finite, output_change
from vsraq.analysis.recording import RoutingRecorder
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
    record_routing: bool = False,
) -> FullPrecisionModel:
    """Run the full-precision model over a text, and store what the others need.

    Args:
        model: The model.
        text: The text.
        stored: Where to.
        batch_size: Sequences of a batch.
        say: Is told the size before the pass begins.
        progress: Whether to show a bar on stderr.
        record_routing: Store what the routers decide, too.

    Raises:
        ValueError: There is not enough room on the disk.
    """
    result = FullPrecisionModel(model, stored)
    started = time.perf_counter()
    few = next(text.batches(batch_size))[:1, :CHECKED_TOKENS]
    model.check_head(few)
    with _recorder(model, record_routing) as recorder:  # one that knows these only
        say(stored.check_room(_stored_batch(model, few, recorder)[0]))
    with _recorder(model, record_routing) as recorder:
        batches = with_progress(text, batch_size, "full precision", progress)
        for index, input_ids in enumerate(batches):
            batch, result.returns_tuple = _stored_batch(model, input_ids, recorder)
            stored.write(index, batch)
            for router in model.routers:
                chosen = _first(batch.ranks[router.name], router)
                counts = expert_load(chosen, router.num_experts)
                result.load[router.name] = result.load.get(router.name, 0) + counts
    result.seconds = time.perf_counter() - started
    return result


@contextmanager
def _recorder(model: RoutedModel, wanted: bool) -> Iterator[RoutingRecorder | None]:
    if not wanted:
        yield None
        return
    with RoutingRecorder(model.model, model.routers) as recorder:
        yield recorder


def _stored_batch(
    model: RoutedModel, input_ids: Tensor, recorder: RoutingRecorder | None
) -> tuple[StoredBatch, bool | None]:
    """Run a batch; return what is stored, and whether the last block gave a tuple."""
    forward = model.run(input_ids, expert_ranks)
    routing = None
    if recorder is not None:
        recorder.keep(input_ids)
        routing = recorder.take()
    ranks = {name: r.cpu() for name, r in forward.routing.items()}
    return StoredBatch(ranks, forward.rows.cpu(), routing), forward.returns_tuple


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

    Raises:
        ValueError: Logits are +inf, NaN or all -inf, or a figure would be infinite.
    """
    started = time.perf_counter()
    first = 0
    for index, input_ids in enumerate(with_progress(text, batch_size, name, progress)):
        if index == 0:
            model.check_head(input_ids)
        forward = model.run(input_ids, BoundRouter.select)
        batch = fp.stored.read(index)
        following = F.pad(input_ids[:, 1:], (0, 1), value=_NO_TOKEN).flatten()
        parts = []
        with opened_heads(model, forward, fp) as heads:
            for part, q_logits, fp_logits in logit_chunks(heads, forward, batch):
                next_ids = following[part].to(q_logits.device)
                change = output_change(q_logits, fp_logits, next_ids, sampling)
                parts.append(change)
        outputs = OutputChange(*(torch.cat(own) for own in zip(*parts, strict=True)))
        shape = (input_ids.shape[0], input_ids.shape[1])
        check_finite(outputs, shape, name, first)
        tally.add(shape, outputs, forward.routing, batch.ranks)
        first += len(input_ids)
    return time.perf_counter() - started


@contextmanager
def opened_heads(
    model: RoutedModel, forward: Forward[Tensor], fp: FullPrecisionModel
) -> Iterator[tuple[OutputHead, OutputHead]]:
    """Yield what turns rows into logits: of a quantized model, of full precision.

    Args:
        model: The quantized model.
        forward: What it gave.
        fp: The full-precision model, after its pass.
    """
    with ExitStack() as stack:
        q_head = stack.enter_context(model.head(forward.returns_tuple))
        fp_head = q_head  # of a model that is compared with itself
        if fp.model.model is not model.model:
            fp_head = stack.enter_context(fp.model.head(fp.returns_tuple))
        yield q_head, fp_head


def logit_chunks(
    heads: tuple[OutputHead, OutputHead], forward: Forward[Tensor], batch: StoredBatch
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the logits of both models, as many as `CHUNK_LOGITS` says at once.

    Args:
        heads: Of the quantized model, and of full precision.
        forward: What the quantized model gave for T tokens.
        batch: What full precision gave for them.

    Yields:
        Which of the T tokens, n of them, and logits, (n, V), on one device.
    """
    q_head, fp_head = heads
    start, chunk = 0, CHUNK_TOKENS
    while start < len(forward.rows):
        part = slice(start, start + chunk)
        q_logits = q_head(forward.rows[part])
        start, chunk = start + chunk, max(CHUNK_LOGITS // q_logits.shape[-1], chunk)
        yield part, q_logits, fp_head(batch.rows[part]).to(q_logits.device)


def with_progress(
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
