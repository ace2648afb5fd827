# SPDX-License-Identifier: Apache-2.0
"""Compare quantized models with the full-precision one, on one text.

Models run one after another, each once over the text. The full-precision pass leaves
its routing and its last hidden states on disk, and its output head in memory.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vsraq import stamp
from vsraq.analysis.forward import evaluating
from vsraq.analysis.fp_pass import FullPrecisionPass
from vsraq.analysis.passes import FullPrecisionModel, run_quantized
from vsraq.analysis.preparation import (
    BATCH_SIZE,
    PACKAGES,
    SEED,
    Prepared,
    Settings,
    full_precision,
    identity_of,
    model_identity,
    opened_alike,
    prepared,
)
from vsraq.analysis.results import (
    Comparison,
    DataUsed,
    FullPrecision,
    Layer,
    Method,
    SamplingUsed,
    token_values,
)
from vsraq.analysis.sources import Device, LoadOptions, ModelOrPath, ModelSource
from vsraq.analysis.summary import summarize
from vsraq.analysis.tally import Tally, Thresholds, TokenSample
from vsraq.analysis.text import Text, TextData
from vsraq.blocks import decoder_blocks
from vsraq.routers import Router
from vsraq.tokens.sampling import Sampling

_PASS_FOLDER = "fp_pass"
_TEMPORARY = "vsraq-compare-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What the passes over a text gave.

    Attributes:
        fp: The full-precision model after its pass.
        ready: The text, and how outputs were sampled.
        blocks: The decoder blocks of the full-precision model.
        tallies: Sums of each method, by name.
        seconds: Wall time of each method's pass.
    """

    fp: FullPrecisionModel
    ready: Prepared
    blocks: tuple[str, ...]
    tallies: dict[str, Tally]
    seconds: dict[str, float]


def compare(
    fp_model: ModelOrPath,
    q_models: Mapping[str, ModelOrPath] | ModelOrPath,
    data: TextData,
    out: str | Path | None = None,
    *,
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
    keep_fp_pass: bool = False,
    fresh: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compare quantized models with the full-precision one.

    Memory does not grow with the number of tokens, except for the token ids and some
    sums per sequence. Two models that are loaded from folders are never in memory
    together; only the output head of the full-precision one stays.

    Args:
        fp_model: The full-precision model: a module, a folder, or the name of a model
            in the hub's cache.
        q_models: The quantized ones by name, or one of them.
        data: The text: a file, a data set, or token ids; see docs/compare.md.
        out: Folder for `results.json` and `tokens.safetensors`; None writes neither.
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
        seed: Of the intervals and of the sampled tokens.
        keep_fp_pass: Leave what the full-precision pass stores in `out`/fp_pass. A
            later comparison of the same model and text uses it again, and every later
            one leaves it, unless it keeps its own.
        fresh: Run the full-precision model also where that would do.
        progress: Show a bar per pass on stderr.

    Returns:
        Every figure; `save` writes it.

    Raises:
        FileNotFoundError: A model or the text is not there.
        ValueError: Routers or tokenizers differ, the text is too short, there is too
            little room on the disk, or an argument is not allowed.
    """
    for option, given in (("keep_fp_pass", keep_fp_pass), ("fresh", fresh)):
        if given and out is None:
            raise ValueError(
                f"{option}=True: the full-precision pass is kept in out, which is "
                "None; allowed is a folder"
            )
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
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    fp_source, sources = ModelSource("fp_model", fp_model), _named(q_models)
    model = model_identity(fp_source)  # before its files are read
    with ExitStack() as stack:
        ready = stack.enter_context(
            prepared(fp_source, sources, data, tokenizer, settings)
        )
        identity = identity_of(model, ready.text, settings)
        stored = stack.enter_context(
            _stored_pass(out, keep_fp_pass, fresh, ready.text.tokens, identity)
        )
        run = run_models(ready, fp_source, sources, stored, settings, fresh=fresh)
        result = _comparison(run, fp_source, sources, settings)
    if out is not None:
        result.save(out)
    return result


def run_models(
    ready: Prepared,
    fp_source: ModelSource,
    sources: Mapping[str, ModelSource],
    stored: FullPrecisionPass,
    settings: Settings,
    *,
    fresh: bool = False,
) -> Run:
    """Run all models over a text, one after another; see `compare`."""
    routers = ready.model.routers
    fp = full_precision(ready, fp_source, stored, settings, fresh=fresh)
    fp_model = fp.model.model
    sample = TokenSample.draw(ready.text.tokens, settings.seed)
    run = Run(fp, ready, decoder_blocks(fp_model, routers), {}, {})
    for name, source in sources.items():
        tally = Tally(routers, settings.thresholds, sample)
        with (
            opened_alike(source, routers, name, settings) as q,
            evaluating(fp_model, q.model),
        ):
            run.seconds[name] = run_quantized(
                q,
                fp,
                ready.text,
                tally,
                sampling=ready.sampling,
                batch_size=settings.batch_size,
                name=name,
                progress=settings.progress,
            )
            del q
        run.tallies[name] = tally
    return run


def _comparison(
    run: Run,
    fp_source: ModelSource,
    sources: Mapping[str, ModelSource],
    settings: Settings,
) -> Comparison:
    ready, text = run.ready, run.ready.text
    methods: dict[str, Method] = {}
    for name, tally in run.tallies.items():
        methods[name], perplexity = summarize(
            tally,
            source=sources[name].label,
            mebibytes=sources[name].mebibytes,
            seconds=run.seconds[name],
            tokens=text.tokens,
            seed=settings.seed,
        )
    sampled = {name: tally.sampled() for name, tally in run.tallies.items()}
    return Comparison(
        created=stamp.now(),
        versions=stamp.versions(*PACKAGES),
        data=DataUsed(text.source, text.tokens, text.sequences, text.seqlen),
        sampling=SamplingUsed(**asdict(ready.sampling), source=ready.sampling_source),
        thresholds=settings.thresholds,
        full_precision=FullPrecision(
            source=fp_source.label,
            mebibytes=fp_source.mebibytes,
            perplexity=perplexity,
            seconds=run.fp.seconds,
            tokens_per_second=text.tokens / run.fp.seconds,
        ),
        layers=[
            Layer(
                name=router.name,
                block=_block_of(router, run.blocks),
                top_k=router.top_k,
                num_experts=router.num_experts,
                load=run.fp.load[router.name].tolist(),
            )
            for router in run.fp.model.routers
        ],
        methods=methods,
        tokens=token_values(*_places(text, settings.seed), sampled),
    )


def _places(text: Text, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sequence, the position and the id of each sampled token, (n,)."""
    positions = TokenSample.draw(text.tokens, seed).positions
    lengths = torch.cat([torch.full((len(r),), r.shape[1]) for r in text.rows])
    ends = lengths.cumsum(0)
    sequence = torch.searchsorted(ends, positions, right=True)
    position = positions - (ends - lengths)[sequence]
    ids = torch.cat([rows.flatten() for rows in text.rows])
    return sequence, position, ids[positions]


def _block_of(router: Router, blocks: tuple[str, ...]) -> int:
    return next((i for i, block in enumerate(blocks) if router.is_in(block)), -1)


def _named(q_models: Mapping[str, ModelOrPath] | ModelOrPath) -> dict[str, ModelSource]:
    if not isinstance(q_models, Mapping):
        q_models = {"quantized": q_models}
    if not q_models:
        raise ValueError("q_models={}: allowed is at least one quantized model")
    for name in q_models:
        if not name or "/" in name:
            raise ValueError(
                f"q_models: the name {name!r}; allowed are names without a slash"
            )
    return {name: ModelSource(name, given) for name, given in q_models.items()}


@contextmanager
def _stored_pass(
    out: str | Path | None,
    keep: bool,
    fresh: bool,
    tokens: int,
    identity: Mapping[str, Any] | None,
) -> Iterator[FullPrecisionPass]:
    """Yield where the full-precision pass goes, or lies already.

    It is removed afterwards, unless it is kept. One that an earlier comparison has kept
    stays as it is, unless this one is kept in its place.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as folder:
            yield FullPrecisionPass(Path(folder), tokens)
        return
    stored = FullPrecisionPass(Path(out) / _PASS_FOLDER, tokens, identity)
    if keep or not stored.is_whole:
        try:
            yield stored
        finally:
            if not keep:
                shutil.rmtree(stored.folder, ignore_errors=True)
        return
    found, reason = (None, "a fresh one is wanted") if fresh else stored.reuse()
    if found is not None:
        yield stored
        return
    _log.info(
        "the full-precision pass in %s is not used, and stays as it is: %s; "
        "--keep-fp-pass, keep_fp_pass=True, would replace it",
        stored.folder,
        reason,
    )
    # where the user has room for a pass
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=out) as folder:
        yield FullPrecisionPass(Path(folder), tokens)
