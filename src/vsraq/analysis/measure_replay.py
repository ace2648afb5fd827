# SPDX-License-Identifier: Apache-2.0
"""Measure what the full-precision routing is worth to a quantized model (SRA Fig. 4).

The full-precision model runs first and leaves its hidden states, ranks and routing on
disk. The quantized model then runs each batch twice: as it is, which also says in which
region every token is, and with the full-precision routing on the chosen tokens.

Shapes: B sequences of S tokens in a batch, T = B S, K top-k.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vsraq.analysis.compare_models import BATCH_SIZE, SEED, sampling_of, window_of
from vsraq.analysis.forward import Forward, RoutedModel, evaluating
from vsraq.analysis.fp_pass import FullPrecisionPass, StoredBatch
from vsraq.analysis.passes import CHUNK_TOKENS, check_same_routers
from vsraq.analysis.recording import RoutingRecorder
from vsraq.analysis.replay import replaying
from vsraq.analysis.replay_effect import (
    Region,
    ReplayEffect,
    ReplaySums,
    check_choice,
)
from vsraq.analysis.results import DataUsed, SamplingUsed
from vsraq.analysis.routing import expert_ranks, routing_change
from vsraq.analysis.routing_record import RoutingRecord
from vsraq.analysis.same_tokenizer import check_same_tokenizers, tokenizer_in
from vsraq.analysis.sources import LoadOptions, ModelOrPath, ModelSource, free_memory
from vsraq.analysis.tally import Thresholds
from vsraq.analysis.text import Text, TextData, read_text
from vsraq.routers import BoundRouter, find_routers
from vsraq.tokens.sampling import Sampling
from vsraq.tokens.shift import output_shift


def measure_replay(
    fp_model: ModelOrPath,
    q_model: ModelOrPath,
    data: TextData,
    tokens: Region | Tensor = "B",
    out: str | Path | None = None,
    *,
    name: str = "quantized",
    tokenizer: PreTrainedTokenizerBase | None = None,
    seqlen: int | None = None,
    sequences: int | None = None,
    batch_size: int = BATCH_SIZE,
    sampling: Sampling | None = None,
    thresholds: Thresholds | None = None,
    router_pattern: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = SEED,
    progress: bool = False,
) -> ReplayEffect:
    """Measure Sampled-JSD before and after a replay of the full-precision routing.

    Memory and arguments are those of `vsraq.compare`. On disk, in `out` or else in the
    system's folder for temporary files, there are for a while the hidden states of all
    tokens and their routing; see `record_routing`.

    Args:
        fp_model: The full-precision model: a module, a folder, or the name of a model
            in the hub's cache.
        q_model: The quantized one.
        data: The text: a file, a data set, or token ids; see docs/compare.md.
        tokens: Which tokens get the full-precision routing: those of a region of SRA
            Fig. 3 ("A" to "D", by their values without a replay), "all", or a mask,
            bool, (sequences, positions).
        out: Folder for `replay.json`; None writes none.
        name: Of the quantized model, in tables.
        tokenizer: For text; None takes the one beside the full-precision model.
        seqlen: Tokens of a window; None takes 2048, or what the model can read.
        sequences: How many windows, spread evenly; None takes all.
        batch_size: Sequences that go through a model together.
        sampling: How outputs are sampled; None takes the model's generation config.
        thresholds: What counts as high in the regions.
        router_pattern: As in `find_routers`.
        dtype: What models from folders compute in; None takes the checkpoint's.
        device: Where those go, such as "cuda:0" or "auto"; None is the CPU.
        trust_remote_code: As in transformers.
        seed: Of the intervals.
        progress: Show a bar per pass on stderr.

    Returns:
        Every figure; `save` writes it.

    Raises:
        FileNotFoundError: A model or the text is not there.
        ValueError: Routers or tokenizers differ, what a router decides cannot be
            replaced token by token, the text is too short, there is too little room on
            the disk, or an argument is not allowed.
    """
    load = LoadOptions(dtype, device, trust_remote_code)
    thresholds = thresholds or Thresholds()
    fp_source, q_source = ModelSource("fp_model", fp_model), ModelSource(name, q_model)
    named = {"the full-precision model": fp_source, name: q_source}
    found = check_same_tokenizers(
        {n: tokenizer_in(s.folder, trust_remote_code) for n, s in named.items()}
    )
    with ExitStack() as stack:
        folder = stack.enter_context(_scratch(out))
        model = stack.enter_context(fp_source.opened(load))
        window = window_of(model, seqlen)
        text = read_text(data, tokenizer or found, window, sequences)
        check_choice(tokens, [(len(rows), rows.shape[1]) for rows in text.rows])
        routers = find_routers(model, router_pattern=router_pattern)
        check_same_routers(routers, routers, "it")
        given, source = sampling_of(model, sampling)
        fp = _FullPrecision(RoutedModel(model, routers), folder)
        fp.run(text, batch_size, progress)
        if fp_source.module is None:
            fp.model.drop_blocks()
            free_memory()
        q_found = stack.enter_context(q_source.opened(load))
        q_routers = find_routers(q_found, router_pattern=router_pattern)
        check_same_routers(q_routers, routers, name)
        q = _Quantized(RoutedModel(q_found, routers), fp, given, thresholds)
        sums = q.run(text, batch_size, tokens, name, progress)
    before, after, mean_change, improved = sums.intervals(seed)
    result = ReplayEffect(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={n: version(n) for n in ("vsraq", "torch", "transformers")},
        method=name,
        source=q_source.label,
        data=DataUsed(text.source, text.tokens, text.sequences, text.seqlen),
        sampling=SamplingUsed(**asdict(given), source=source),
        thresholds=thresholds,
        tokens=text.tokens,
        chosen=sums.chosen,
        region="mask" if isinstance(tokens, Tensor) else tokens,
        before={"sampled_jsd": before},
        after={"sampled_jsd": after},
        mean_change=mean_change,
        improved=improved,
        change=sums.histogram(),
    )
    if out is not None:
        result.save(out)
    return result


class _FullPrecision:
    """The full-precision model, and what its pass leaves in a folder."""

    def __init__(self, model: RoutedModel, folder: Path) -> None:
        self.model = model
        self.returns_tuple: bool | None = None
        self._folder = folder
        self._stored: FullPrecisionPass | None = None

    def run(self, text: Text, batch_size: int, progress: bool) -> None:
        """Run it over a text.

        Raises:
            ValueError: There is not enough room on the disk.
        """
        stored = self._stored = FullPrecisionPass(self._folder, text.tokens)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model.model))
            self.model.check_head(next(text.batches(batch_size)))
            recorder = RoutingRecorder(self.model.model, self.model.routers)
            stack.enter_context(recorder)
            batches = _with_bar(text, batch_size, "full precision", progress)
            for index, input_ids in enumerate(batches):
                forward = self.model.run(input_ids, expert_ranks)
                recorder.keep(input_ids)
                routing = recorder.take()
                ranks = {name: r.cpu() for name, r in forward.routing.items()}
                batch = StoredBatch(ranks, forward.rows.cpu())
                if index == 0:
                    _check_room(self._folder, batch, routing, text.tokens)
                stored.write(index, batch)
                routing.save(self._path(index))
                self.returns_tuple = forward.returns_tuple

    def read(self, index: int) -> tuple[StoredBatch, RoutingRecord]:
        """Read what it left of a batch."""
        assert self._stored is not None
        return self._stored.read(index), RoutingRecord.load(self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / f"routing-{index:06}.safetensors"


class _Quantized:
    """The quantized model, as it is and with the full-precision routing."""

    def __init__(
        self,
        model: RoutedModel,
        fp: _FullPrecision,
        sampling: Sampling,
        thresholds: Thresholds,
    ) -> None:
        self._model = model
        self._fp = fp
        self._sampling = sampling
        self._thresholds = thresholds

    def run(
        self,
        text: Text,
        batch_size: int,
        tokens: Region | Tensor,
        name: str,
        progress: bool,
    ) -> ReplaySums:
        """Run it over a text, twice where tokens are chosen."""
        sums = ReplaySums()
        first = 0
        with evaluating(self._fp.model.model, self._model.model):
            self._model.check_head(next(text.batches(batch_size)))
            batches = _with_bar(text, batch_size, name, progress)
            for index, input_ids in enumerate(batches):
                batch, routing = self._fp.read(index)
                forward = self._model.run(input_ids, BoundRouter.select)
                before = after = self._sampled_jsd(forward, batch)
                if isinstance(tokens, Tensor):
                    chosen = tokens[first : first + len(input_ids)].cpu()
                else:
                    chosen = self._in_region(tokens, forward, batch, before)
                    chosen = chosen.view(input_ids.shape)
                first += len(input_ids)
                if chosen.any():
                    with replaying(self._model.model, routing, chosen):
                        forward = self._model.run(input_ids, BoundRouter.select)
                    after = self._sampled_jsd(forward, batch)
                sums.add(chosen, before, after)
        return sums

    def _sampled_jsd(self, forward: Forward[Tensor], batch: StoredBatch) -> Tensor:
        """Compare the outputs of T tokens, (T,), nats."""
        with ExitStack() as stack:
            q_head = stack.enter_context(self._model.head(forward.returns_tuple))
            fp_head = q_head  # of a model that is compared with itself
            if self._fp.model.model is not self._model.model:
                head = self._fp.model.head(self._fp.returns_tuple)
                fp_head = stack.enter_context(head)
            (shift,) = output_shift(
                [forward.rows],
                [batch.rows],
                lambda rows: fp_head(rows).to(forward.rows.device),
                q_head=q_head,
                sampling=self._sampling,
                chunk_tokens=CHUNK_TOKENS,
            )
        return shift

    def _in_region(
        self,
        region: Region,
        forward: Forward[Tensor],
        batch: StoredBatch,
        sampled_jsd: Tensor,
    ) -> Tensor:
        """Find the tokens of a region, bool, (T,)."""
        if region == "all":
            return torch.ones_like(sampled_jsd, dtype=torch.bool)
        shifts = [
            routing_change(ranks.gather(-1, forward.routing[name].cpu()).long())
            for name, ranks in batch.ranks.items()
        ]
        shift = torch.stack([s.routing_shift for s in shifts]).mean(0)
        regions = self._thresholds.regions(sampled_jsd, shift)
        return regions["ABCD".index(region)]


def _check_room(
    folder: Path, batch: StoredBatch, routing: RoutingRecord, tokens: int
) -> None:
    per_token = batch.bytes_per_token + routing.nbytes / routing.tokens
    needed, free = per_token * tokens, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the full-precision pass would write {needed / 2**20:.1f} MiB to "
            f"{folder}, where {free / 2**20:.1f} MiB are free; allowed is a folder "
            "with more room (out, --out), or fewer sequences"
        )


def _with_bar(
    text: Text, batch_size: int, name: str, progress: bool
) -> Iterator[Tensor]:
    """Yield the batches of a text, with a bar that counts tokens."""
    with tqdm(
        total=text.tokens, desc=name, unit="tok", unit_scale=True, disable=not progress
    ) as bar:
        for input_ids in text.batches(batch_size):
            yield input_ids
            bar.update(input_ids.numel())


@contextmanager
def _scratch(out: str | Path | None) -> Iterator[Path]:
    """Yield a folder for the full-precision pass; it is removed afterwards."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vsraq-replay-", dir=out) as folder:
        yield Path(folder)
