# SPDX-License-Identifier: Apache-2.0
"""What a comparison and a replay do before any model runs: settings, models, text."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from vsraq import stamp
from vsraq.analysis.forward import RoutedModel, evaluating
from vsraq.analysis.fp_pass import FullPrecisionPass
from vsraq.analysis.passes import (
    FullPrecisionModel,
    check_same_routers,
    run_full_precision,
)
from vsraq.analysis.results import SamplingSource
from vsraq.analysis.same_tokenizer import check_same_tokenizers, tokenizer_in
from vsraq.analysis.sources import LoadOptions, ModelSource, free_memory
from vsraq.analysis.tally import Thresholds
from vsraq.analysis.text import Text, TextData, check_file_of, read_text
from vsraq.routers import Router, find_routers
from vsraq.tokens.sampling import Sampling

SEQLEN = 2048
BATCH_SIZE = 8
SEED = 42
PACKAGES = ("vsraq", "torch", "transformers")
# what transformers reads quantized checkpoints with
_READERS = ("auto-round", "compressed-tensors")
# the least that is allowed; None is a default where there is one
_LEAST = {"batch_size": 1, "seqlen": 2, "sequences": 1, "seed": 0}
_OPTIONAL = ("seqlen", "sequences")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How models are run; see `vsraq.compare`.

    Raises:
        ValueError: One is not allowed.
    """

    batch_size: int = BATCH_SIZE
    seqlen: int | None = None
    sequences: int | None = None
    sampling: Sampling | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    router_pattern: str | None = None
    seed: int = SEED
    load: LoadOptions = field(default_factory=LoadOptions)
    progress: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole or value < least:
                other = "; or leave it out" if name in _OPTIONAL else ""
                raise ValueError(
                    f"{name}={value!r}: allowed is an int >= {least}{other}"
                )


@dataclass(frozen=True)
class Prepared:
    """The full-precision model and the text, ready to run.

    Attributes:
        model: The model.
        text: The text.
        sampling: How outputs are sampled.
        sampling_source: Who says so.
    """

    model: RoutedModel
    text: Text
    sampling: Sampling
    sampling_source: SamplingSource

    @classmethod
    def of(cls, model: nn.Module, text: Text, settings: Settings) -> "Prepared":
        """Prepare a model that is in memory.

        Raises:
            ValueError: It has no router.
        """
        routers = find_routers(model, router_pattern=settings.router_pattern)
        check_same_routers(routers, routers, "it")
        given, source = _sampling_of(model, settings.sampling)
        return cls(RoutedModel(model, routers), text, given, source)


@contextmanager
def prepared(
    fp_source: ModelSource,
    sources: Mapping[str, ModelSource],
    data: TextData,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Settings,
) -> Iterator[Prepared]:
    """Open the full-precision model, and read the text.

    Args:
        fp_source: The model.
        sources: The quantized ones, by what an error calls them.
        data: The text.
        tokenizer: For text; None takes the one beside the full-precision model.
        settings: How models are run.

    Raises:
        FileNotFoundError: The text is not there.
        ValueError: The tokenizers differ, there is no router, or the text is too short.
    """
    check_file_of(data)
    remote = settings.load.trust_remote_code
    named = {"the full-precision model": fp_source, **sources}
    found = check_same_tokenizers(
        {name: tokenizer_in(s.folder, remote) for name, s in named.items()}
    )
    with fp_source.opened(settings.load) as model:
        window = _window_of(model, settings.seqlen)
        text = read_text(data, tokenizer or found, window, settings.sequences)
        yield Prepared.of(model, text, settings)


@contextmanager
def opened_alike(
    source: ModelSource, routers: tuple[Router, ...], name: str, settings: Settings
) -> Iterator[RoutedModel]:
    """Open a quantized model, which must have the full-precision model's routers.

    A model that was loaded is freed afterwards if nobody else keeps it.

    Args:
        source: The model.
        routers: Those of the full-precision model.
        name: What an error calls it.
        settings: How models are run.

    Raises:
        ValueError: Its routers differ.
    """
    with source.opened(settings.load) as model:
        found = find_routers(model, router_pattern=settings.router_pattern)
        check_same_routers(found, routers, name)
        opened = [RoutedModel(model, routers)]
        del model
        yield opened.pop()


def model_identity(source: ModelSource) -> dict[str, Any] | None:
    """What tells whether a model gives the same numbers; None for one in memory.

    Args:
        source: The model; its files are looked at now.
    """
    files = source.identity()
    if files is None:
        return None
    versions: dict[str, str | None] = {**stamp.versions(*PACKAGES)}
    if source.is_quantized:
        versions |= {name: stamp.version_or_none(name) for name in _READERS}
    return {"model": files, "version": versions}


def identity_of(
    model: Mapping[str, Any] | None, text: Text, settings: Settings
) -> dict[str, Any] | None:
    """What decides the numbers of a full-precision pass; None for a module in memory.

    Args:
        model: What `model_identity` said before the model was loaded.
        text: The text.
        settings: How it is run.
    """
    if model is None:
        return None
    digest = hashlib.sha256()
    for rows in text.rows:
        digest.update(f"{tuple(rows.shape)}".encode())
        digest.update(rows.flatten().numpy().data)
    return {
        **model,
        "tokens": digest.hexdigest(),
        "batch size": int(settings.batch_size),
        **settings.load.identity(),
        "router pattern": settings.router_pattern,
    }


def full_precision(
    ready: Prepared,
    fp_source: ModelSource,
    stored: FullPrecisionPass,
    settings: Settings,
    *,
    fresh: bool = False,
    record_routing: bool = False,
) -> FullPrecisionModel:
    """Run the full-precision model over the text, or take the pass that is there.

    Args:
        ready: The model and the text.
        fp_source: Where the model comes from; one from a folder loses its blocks.
        stored: Where its pass goes, or lies already.
        settings: How it is run.
        fresh: Run it in any case.
        record_routing: Store what the routers decide, too.

    Raises:
        ValueError: There is not enough room on the disk.
    """
    found, reason = (None, None) if fresh else stored.reuse()
    if found is not None:
        _log.info(
            "the full-precision pass of %s in %s is used again (the same path, sizes "
            "and times of the model's files, tokens and versions); --fresh, "
            "fresh=True, computes it anew",
            found.created,
            stored.folder,
        )
        if found.returns_tuple is None:
            ready.model.keep_to_logits()
        load = {name: torch.tensor(counts) for name, counts in found.load.items()}
        result = FullPrecisionModel(
            ready.model, stored, found.returns_tuple, load, found.seconds
        )
    else:
        if reason is not None:
            _log.info(
                "the full-precision pass in %s is computed anew: %s",
                stored.folder,
                reason,
            )
        stored.clear()
        with evaluating(ready.model.model):
            result = run_full_precision(
                ready.model,
                ready.text,
                stored,
                batch_size=settings.batch_size,
                say=lambda message: _log.info("%s", message),
                progress=settings.progress,
                record_routing=record_routing,
            )
        _finish(result, fp_source)
    if fp_source.module is None:
        result.model.drop_blocks()
        free_memory()
    return result


def _finish(result: FullPrecisionModel, source: ModelSource) -> None:
    """Write that a pass is whole, unless the model's files changed meanwhile."""
    stored = result.stored
    if stored.identity is None:
        return
    if source.identity() != stored.identity["model"]:
        _log.warning(
            "the files of %s changed while it ran, so its full-precision pass is not "
            "used again",
            source.label,
        )
        return
    stored.finish(result.returns_tuple, result.load, result.seconds)


def _sampling_of(
    model: nn.Module, given: Sampling | None
) -> tuple[Sampling, SamplingSource]:
    """Return how a model's outputs are sampled, and who says so."""
    if given is not None:
        return given, "given"
    config = getattr(model, "generation_config", None)
    sampled = getattr(config, "do_sample", None) is True
    return Sampling.of(model), "generation_config" if sampled else "default"


def _window_of(model: nn.Module, seqlen: int | None) -> int:
    """Return the tokens of a window: as given, or what the model can read.

    Raises:
        ValueError: The model cannot read that many.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    most = getattr(config, "max_position_embeddings", None)
    if seqlen is None:
        return min(SEQLEN, most or SEQLEN)
    if most is not None and seqlen > most:
        raise ValueError(
            f"seqlen={seqlen}: allowed is 2 to {most}, the positions of the model"
        )
    return seqlen
