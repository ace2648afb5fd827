# SPDX-License-Identifier: Apache-2.0
"""The models of an evaluation: their names, tokenizers and lengths."""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from vsraq.analysis.same_tokenizer import check_same_tokenizers, tokenizer_in
from vsraq.analysis.sources import LoadOptions, ModelOrPath, ModelSource
from vsraq.evaluation.wikitext import SEQLEN

FULL_PRECISION = "full precision"


def sources_of(
    models: Mapping[str, ModelOrPath] | ModelOrPath,
) -> dict[str, ModelSource]:
    """Return the models by name; one alone gets the name of `name_of`."""
    if isinstance(models, Mapping):
        if not models:
            raise ValueError("models={}: allowed is at least one model")
        return {name: ModelSource(name, given) for name, given in models.items()}
    source = ModelSource("model", models)
    return {name_of(source): source}


def name_of(source: ModelSource) -> str:
    """Name a model that has no name: by what it is, or by its folder."""
    if source.folder is None:
        return "model"
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config") is None:
        return FULL_PRECISION
    return Path(source.label).resolve().name


def tokenizers_of(
    sources: Mapping[str, ModelSource],
    given: PreTrainedTokenizerBase | None,
    load: LoadOptions,
    *,
    same: bool,
) -> dict[str, PreTrainedTokenizerBase]:
    """Return the tokenizer of each model; for a perplexity they have to be the same."""
    if given is not None:
        return dict.fromkeys(sources, given)
    found = {
        name: tokenizer_in(source.folder, load.trust_remote_code)
        for name, source in sources.items()
    }
    if same:
        check_same_tokenizers(found)
    known = {name: t for name, t in found.items() if t is not None}
    for name in found:
        if name not in known:
            raise ValueError(
                f"{name}: no tokenizer beside it; allowed is one there, or tokenizer="
            )
    return known


def check_chat_templates(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Check that every tokenizer has a chat template.

    Raises:
        ValueError: One has none.
    """
    for name, tokenizer in tokenizers.items():
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{name}: its tokenizer has no chat template; allowed is one with it, "
                "or apply_chat_template=False"
            )


def window_of(
    sources: Mapping[str, ModelSource], seqlen: int | None, load: LoadOptions
) -> int:
    """Return the tokens of a window that all models can read."""
    positions: dict[str, int] = {}
    for name, source in sources.items():
        config = getattr(source.module, "config", None)
        if source.folder is not None:
            config = AutoConfig.from_pretrained(
                source.folder, trust_remote_code=load.trust_remote_code
            )
        text = config.get_text_config() if config is not None else None
        most = getattr(text, "max_position_embeddings", None)
        if most is not None:
            positions[name] = most
    fewest = min(positions, key=lambda name: positions[name], default=None)
    if seqlen is None:
        return min([SEQLEN, *positions.values()])
    if seqlen < 2 or (fewest is not None and seqlen > positions[fewest]):
        most = "" if fewest is None else f" to {positions[fewest]}, as {fewest} reads"
        raise ValueError(f"seqlen={seqlen}: allowed is an int from 2{most}")
    return seqlen
