# SPDX-License-Identifier: Apache-2.0
"""Refuse models that do not read the same tokens."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# text with words, digits, spaces, signs and bytes
_PROBE = 'The 12 routers\' choice:\n\tif x >= 0.5 { return "ß 漢字" }  # done\n'


def tokenizer_in(
    folder: Path | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that lies beside a model; None where there is none."""
    if folder is None or not any((folder / name).is_file() for name in _FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code
    )
    return tokenizer


def check_same_tokenizers(
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
) -> PreTrainedTokenizerBase | None:
    """Check that all tokenizers give the same ids.

    Args:
        tokenizers: By what an error calls the model.

    Returns:
        The first of them, or None.

    Raises:
        ValueError: Two differ; the message says where.
    """
    known = {name: t for name, t in tokenizers.items() if t is not None}
    if not known:
        return None
    (first, tokenizer), *others = known.items()
    for name, other in others:
        difference = _difference(tokenizer, other)
        if difference is not None:
            raise ValueError(
                f"the tokenizers of {first} and {name} differ: {difference}; allowed "
                "are models that read the same tokens, so compare an export with the "
                "model it was made from"
            )
    return tokenizer


def _difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours != theirs:
        tokens = ours.keys() | theirs.keys()
        other = [t for t in tokens if ours.get(t) != theirs.get(t)]
        token = min(other, key=lambda t: ours.get(t, theirs.get(t)))
        return (
            f"{len(other)} of {len(tokens)} tokens have other ids, such as {token!r} "
            f"with {ours.get(token)} and {theirs.get(token)}"
        )
    ids = [t(_PROBE, add_special_tokens=False)["input_ids"] for t in (a, b)]
    if ids[0] != ids[1]:
        place = next(
            (i for i, (x, y) in enumerate(zip(*ids, strict=False)) if x != y),
            min(map(len, ids)),
        )
        return f"{_PROBE!r} gives other ids from place {place} on"
    if a.eos_token_id != b.eos_token_id:
        return f"the end token is {a.eos_token_id} and {b.eos_token_id}"
    return None
