# SPDX-License-Identifier: Apache-2.0
"""Measure what the full-precision routing is worth to a quantized model (SRA Fig. 4).

The full-precision model runs first and leaves its hidden states, ranks and routing on
disk. The quantized model then runs each batch twice: as it is, which also says in which
region every token is, and with the full-precision routing on the chosen tokens.

Shapes: B sequences of S tokens in a batch, T = B S, K top-k.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vsraq import stamp
from vsraq.analysis.forward import Forward, RoutedModel, evaluating
from vsraq.analysis.fp_pass import FullPrecisionPass, StoredBatch
from vsraq.analysis.passes import (
    FullPrecisionModel,
    logit_chunks,
    opened_heads,
    with_progress,
)
from vsraq.analysis.preparation import (
    BATCH_SIZE,
    PACKAGES,
    SEED,
    Prepared,
    Settings,
    full_precision,
    opened_alike,
    prepared,
)
from vsraq.analysis.replay import replaying
from vsraq.analysis.replay_effect import (
    Region,
    ReplayEffect,
    ReplaySums,
    check_choice,
)
from vsraq.analysis.results import DataUsed, SamplingUsed
from vsraq.analysis.routing import routing_change
from vsraq.analysis.sources import Device, LoadOptions, ModelOrPath, ModelSource
from vsraq.analysis.tally import Thresholds
from vsraq.analysis.text import TextData
from vsraq.metrics import sampled_jsd
from vsraq.routers import BoundRouter
from vsraq.tokens.sampling import Sampling


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
    device: Device | None = None,
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
    settings = Settings(
        batch_size=batch_size,
        seqlen=seqlen,
        sequences=sequences,
        sampling=sampling,
        thresholds=thresholds or Thresholds(),
        router_pattern=router_pattern,
        seed=seed,
        load=LoadOptions(dtype, device, trust_remote_code),
        progress=progress,
    )
    fp_source, q_source = ModelSource("fp_model", fp_model), ModelSource(name, q_model)
    with ExitStack() as stack:
        folder = stack.enter_context(_scratch(out))
        ready = stack.enter_context(
            prepared(fp_source, {name: q_source}, data, tokenizer, settings)
        )
        text = ready.text
        check_choice(tokens, [(len(rows), rows.shape[1]) for rows in text.rows])
        stored = FullPrecisionPass(folder, text.tokens)
        fp = full_precision(ready, fp_source, stored, settings, record_routing=True)
        q = stack.enter_context(
            opened_alike(q_source, fp.model.routers, name, settings)
        )
        sums = _Quantized(q, fp, ready, settings).run(tokens, name)
    before, after, mean_change, improved = sums.intervals(seed)
    result = ReplayEffect(
        created=stamp.now(),
        versions=stamp.versions(*PACKAGES),
        method=name,
        source=q_source.label,
        data=DataUsed(text.source, text.tokens, text.sequences, text.seqlen),
        sampling=SamplingUsed(**asdict(ready.sampling), source=ready.sampling_source),
        thresholds=settings.thresholds,
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


class _Quantized:
    """The quantized model, as it is and with the full-precision routing."""

    def __init__(
        self,
        model: RoutedModel,
        fp: FullPrecisionModel,
        ready: Prepared,
        settings: Settings,
    ) -> None:
        self._model = model
        self._fp = fp
        self._ready = ready
        self._settings = settings

    def run(self, tokens: Region | Tensor, name: str) -> ReplaySums:
        """Run it over the text, twice where tokens are chosen."""
        sums = ReplaySums()
        first = 0
        text, settings = self._ready.text, self._settings
        with evaluating(self._fp.model.model, self._model.model):
            self._model.check_head(next(text.batches(settings.batch_size)))
            batches = with_progress(text, settings.batch_size, name, settings.progress)
            for index, input_ids in enumerate(batches):
                batch = self._fp.stored.read(index)
                assert batch.routing is not None
                forward = self._model.run(input_ids, BoundRouter.select)
                before = after = self._sampled_jsd(forward, batch)
                if isinstance(tokens, Tensor):
                    chosen = tokens[first : first + len(input_ids)].cpu()
                else:
                    chosen = self._in_region(tokens, forward, batch, before)
                    chosen = chosen.view(input_ids.shape)
                first += len(input_ids)
                if chosen.any():
                    with replaying(self._model.model, batch.routing, chosen):
                        forward = self._model.run(input_ids, BoundRouter.select)
                    after = self._sampled_jsd(forward, batch)
                sums.add(chosen, before, after)
        return sums

    def _sampled_jsd(self, forward: Forward[Tensor], batch: StoredBatch) -> Tensor:
        """Compare the outputs of T tokens, (T,), nats."""
        values = asdict(self._ready.sampling)
        with opened_heads(self._model, forward, self._fp) as heads:
            chunks = logit_chunks(heads, forward, batch)
            return torch.cat(
                [sampled_jsd(q, fp, **values).cpu() for _, q, fp in chunks]
            )

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
        regions = self._settings.thresholds.regions(sampled_jsd, shift)
        return regions["ABCD".index(region)]


@contextmanager
def _scratch(out: str | Path | None) -> Iterator[Path]:
    """Yield a folder for the full-precision pass; it is removed afterwards."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vsraq-replay-", dir=out) as folder:
        yield Path(folder)
