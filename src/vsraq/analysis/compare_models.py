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
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vsraq.analysis.forward import RoutedModel, evaluating
from vsraq.analysis.fp_pass import FullPrecisionPass
from vsraq.analysis.passes import (
    FullPrecisionModel,
    check_same_routers,
    run_full_precision,
    run_quantized,
)
from vsraq.analysis.results import (
    Comparison,
    DataUsed,
    FullPrecision,
    Layer,
    Method,
    SamplingSource,
    SamplingUsed,
    token_values,
)
from vsraq.analysis.same_tokenizer import check_same_tokenizers, tokenizer_in
from vsraq.analysis.sources import LoadOptions, ModelOrPath, ModelSource, free_memory
from vsraq.analysis.summary import summarize
from vsraq.analysis.tally import Tally, Thresholds, TokenSample
from vsraq.analysis.text import Text, TextData, read_text
from vsraq.blocks import decoder_blocks
from vsraq.routers import Router, find_routers
from vsraq.tokens.sampling import Sampling

SEQLEN = 2048
BATCH_SIZE = 8
SEED = 42
_PASS_FOLDER = "fp_pass"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How models are run; see `compare`."""

    batch_size: int
    sampling: Sampling | None
    thresholds: Thresholds
    router_pattern: str | None
    seed: int
    load: LoadOptions
    progress: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: allowed is an int >= 1")


@dataclass(frozen=True)
class Run:
    """What the passes over a text gave.

    Attributes:
        fp: The full-precision model after its pass.
        sampling: How outputs were sampled.
        sampling_source: Who says so.
        blocks: The decoder blocks of the full-precision model.
        tallies: Sums of each method, by name.
        seconds: Wall time of each method's pass.
    """

    fp: FullPrecisionModel
    sampling: Sampling
    sampling_source: SamplingSource
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
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = SEED,
    keep_fp_pass: bool = False,
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
        keep_fp_pass: Leave what the full-precision pass stores in `out`/fp_pass.
        progress: Show a bar per pass on stderr.

    Returns:
        Every figure; `save` writes it.

    Raises:
        FileNotFoundError: A model or the text is not there.
        ValueError: Routers or tokenizers differ, the text is too short, there is too
            little room on the disk, or an argument is not allowed.
    """
    settings = Settings(
        batch_size,
        sampling,
        thresholds or Thresholds(),
        router_pattern,
        seed,
        LoadOptions(dtype, device, trust_remote_code),
        progress,
    )
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    fp_source = ModelSource("fp_model", fp_model)
    sources = _named(q_models)
    named = {"the full-precision model": fp_source, **sources}
    found = check_same_tokenizers(
        {n: tokenizer_in(s.folder, trust_remote_code) for n, s in named.items()}
    )
    with ExitStack() as stack:
        folder = stack.enter_context(_pass_folder(out, keep_fp_pass))
        model = stack.enter_context(fp_source.opened(settings.load))
        text = read_text(data, tokenizer or found, window_of(model, seqlen), sequences)
        run = run_models(model, fp_source, sources, text, folder, settings)
        del model
        result = _comparison(run, fp_source, sources, text, settings)
    if out is not None:
        result.save(out)
    return result


def sampling_of(
    model: nn.Module, given: Sampling | None
) -> tuple[Sampling, SamplingSource]:
    """Return how a model's outputs are sampled, and who says so."""
    if given is not None:
        return given, "given"
    config = getattr(model, "generation_config", None)
    sampled = getattr(config, "do_sample", None) is True
    return Sampling.of(model), "generation_config" if sampled else "default"


def run_models(
    fp_model: nn.Module,
    fp_source: ModelSource,
    sources: Mapping[str, ModelSource],
    text: Text,
    folder: Path,
    settings: Settings,
) -> Run:
    """Run all models over a text, one after another; see `compare`."""
    routers = find_routers(fp_model, router_pattern=settings.router_pattern)
    check_same_routers(routers, routers, "it")
    given, source = sampling_of(fp_model, settings.sampling)
    stored = FullPrecisionPass(folder, text.tokens)
    with evaluating(fp_model):
        fp = run_full_precision(
            RoutedModel(fp_model, routers),
            text,
            stored,
            batch_size=settings.batch_size,
            say=lambda message: _log.info("%s", message),
            progress=settings.progress,
        )
    if fp_source.module is None:
        fp.model.drop_blocks()
        free_memory()
    sample = TokenSample.draw(text.tokens, settings.seed)
    run = Run(fp, given, source, decoder_blocks(fp_model, routers), {}, {})
    for name, q_source in sources.items():
        tally = Tally(routers, settings.thresholds, sample)
        with (
            q_source.opened(settings.load) as q_model,
            evaluating(fp_model, q_model),
        ):
            found = find_routers(q_model, router_pattern=settings.router_pattern)
            check_same_routers(found, routers, name)
            run.seconds[name] = run_quantized(
                RoutedModel(q_model, routers),
                fp,
                text,
                tally,
                sampling=given,
                batch_size=settings.batch_size,
                name=name,
                progress=settings.progress,
            )
            del q_model
        run.tallies[name] = tally
    return run


def _comparison(
    run: Run,
    fp_source: ModelSource,
    sources: Mapping[str, ModelSource],
    text: Text,
    settings: Settings,
) -> Comparison:
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
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={n: version(n) for n in ("vsraq", "torch", "transformers")},
        data=DataUsed(text.source, text.tokens, text.sequences, text.seqlen),
        sampling=SamplingUsed(**asdict(run.sampling), source=run.sampling_source),
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


def window_of(model: nn.Module, seqlen: int | None) -> int:
    """Return the tokens of a window: as given, or what the model can read.

    Raises:
        ValueError: The model cannot read that many.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    most = getattr(config, "max_position_embeddings", None)
    if seqlen is None:
        return min(SEQLEN, most or SEQLEN)
    if seqlen < 2 or (most is not None and seqlen > most):
        raise ValueError(
            f"seqlen={seqlen}: allowed is 2 to {most}, the positions of the model"
        )
    return seqlen


@contextmanager
def _pass_folder(out: str | Path | None, keep: bool) -> Iterator[Path]:
    """Yield the folder of the full-precision pass; it is removed unless it is kept."""
    if keep and out is None:
        raise ValueError(
            "keep_fp_pass=True: it is kept in out, which is None; allowed is a folder"
        )
    if out is None:
        with tempfile.TemporaryDirectory(prefix="vsraq-compare-") as folder:
            yield Path(folder)
        return
    kept = Path(out) / _PASS_FOLDER
    try:
        yield kept
    finally:
        if not keep:
            shutil.rmtree(kept, ignore_errors=True)
