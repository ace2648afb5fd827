# SPDX-License-Identifier: Apache-2.0
"""The text that models are compared on, as sequences of token ids.

Documents are joined, with an end token between two of them, and cut into windows of
`seqlen` tokens; what is left over at the end is dropped.

Shapes: N sequences, S tokens of each.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# a path or a data set, a stream or rows of token ids, or several tensors of them
TextData: TypeAlias = str | Path | Tensor | Sequence[Tensor]

_TEXT_FIELD = "text"
_IDS = "input_ids"
_ALLOWED = (
    "allowed are a text file, a .jsonl file (PATH.jsonl:FIELD, FIELD is text if it is "
    "left out), a .safetensors or .pt file with input_ids, or a Hugging Face data set "
    "(NAME[:config=C][:split=S][:field=F])"
)


@dataclass(frozen=True)
class Text:
    """Sequences of token ids.

    Attributes:
        source: Where they come from.
        rows: Sequences of equal length together, (N, S) each, int64 on the CPU.
    """

    source: str
    rows: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(rows.numel() for rows in self.rows)

    @property
    def sequences(self) -> int:
        """How many sequences they are in."""
        return sum(len(rows) for rows in self.rows)

    @property
    def seqlen(self) -> int:
        """Tokens of the longest."""
        return max(rows.shape[1] for rows in self.rows)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield (B, S) with B at most `batch_size`."""
        for rows in self.rows:
            yield from rows.split(batch_size)


def read_text(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    sequences: int | None = None,
) -> Text:
    """Read a text.

    Args:
        data: A file or data set, see docs/compare.md; or token ids: a stream, (T,), is
            cut into windows; rows, (N, S), and several tensors are taken as they are.
        tokenizer: The models' tokenizer; token ids need none.
        seqlen: Tokens of a window.
        sequences: How many to take, spread evenly; None takes all.

    Raises:
        FileNotFoundError: There is no such file, nor such a data set in reach.
        ValueError: It has too few tokens, or token ids are not allowed.
    """
    source = "token ids"
    if isinstance(data, str | Path):
        source = str(data)
        ids = _token_ids(data)
        if ids is None:
            documents = _documents(str(data))
            if tokenizer is None:
                raise ValueError(
                    f"data={source!r}: text needs a tokenizer, and no model came with "
                    "one; pass tokenizer=, or token ids"
                )
            ids = _tokenize(documents, tokenizer)
    elif isinstance(data, Tensor):
        ids = data
        _rows(ids)  # refuses other shapes
    else:
        rows = [row for tensor in data for row in _rows(tensor)]
        return Text(source, _grouped(_some(rows, sequences, source)))
    if ids.ndim == 2:
        return Text(source, _grouped(_some(list(ids), sequences, source)))
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    if not len(windows):
        raise ValueError(
            f"data={source!r}: it has {len(ids)} tokens and a window {seqlen}; allowed "
            "are longer texts, or a smaller seqlen"
        )
    return Text(source, _grouped(_some(list(windows), sequences, source)))


def check_file_of(data: TextData) -> None:
    """Check that a file is there, where `data` can be nothing but one.

    Args:
        data: As in `read_text`.

    Raises:
        FileNotFoundError: It is not.
    """
    if not isinstance(data, str | Path):
        return
    lines = _json_lines_of(str(data))
    path = Path(data) if lines is None else lines[0]
    if lines is not None or path.suffix in (".safetensors", ".pt", ".txt"):
        _check_file(path)


def _rows(tensor: Tensor) -> list[Tensor]:
    if tensor.ndim not in (1, 2):
        raise ValueError(
            f"data: token ids of shape {tuple(tensor.shape)}; allowed are (tokens,) "
            "and (sequences, tokens)"
        )
    return list(tensor) if tensor.ndim == 2 else [tensor]


def _some(rows: list[Tensor], count: int | None, source: str) -> list[Tensor]:
    """Take some rows, spread evenly."""
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        raise ValueError(
            f"sequences={count}: allowed is 1 to {len(rows)}, which data={source!r} has"
        )
    return [rows[i] for i in torch.linspace(0, len(rows) - 1, count).long()]


def _grouped(rows: list[Tensor]) -> tuple[Tensor, ...]:
    """Stack neighbours of equal length."""
    for row in rows:
        if row.is_floating_point() or len(row) < 2 or int(row.min()) < 0:
            raise ValueError(
                f"data: a sequence of {len(row)} values in {row.dtype}; allowed are "
                "sequences of at least 2 token ids, integers >= 0"
            )
    if not rows:
        raise ValueError("data: it has no sequence; allowed is at least one")
    groups = groupby(rows, key=len)
    return tuple(torch.stack(list(group)).long().cpu() for _, group in groups)


def _tokenize(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    end = tokenizer.eos_token_id
    parts: list[Tensor] = []
    for document in documents:
        if parts and end is not None:
            parts.append(torch.tensor([end]))
        ids = tokenizer(document, add_special_tokens=False, verbose=False)[_IDS]
        parts.append(torch.tensor(ids, dtype=torch.long))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def _token_ids(data: str | Path) -> Tensor | None:
    """Read a file of token ids; None where it is no such file."""
    path = Path(data)
    if path.suffix not in (".safetensors", ".pt"):
        return None
    _check_file(path)
    if path.suffix == ".pt":
        found = torch.load(path, weights_only=True)
        found = found[_IDS] if isinstance(found, dict) and _IDS in found else found
    else:
        found = load_file(path).get(_IDS)
    if not isinstance(found, Tensor) or found.ndim not in (1, 2):
        raise ValueError(
            f"data={str(data)!r}: no tensor input_ids in it, (tokens,) or (sequences, "
            "tokens); allowed is one"
        )
    return found


def _documents(data: str) -> Iterator[str]:
    """Yield the documents of a text file, a .jsonl file or a data set."""
    lines = _json_lines_of(data)
    if lines is not None:
        return _json_lines(*lines)
    if Path(data).is_file():
        return iter([Path(data).read_text(encoding="utf-8")])
    if Path(data).suffix == ".txt":
        _check_file(Path(data))
    return _data_set(data)


def _json_lines_of(data: str) -> tuple[Path, str] | None:
    """Split PATH.jsonl:FIELD; None where it is something else."""
    path, separator, field = data.rpartition(".jsonl")
    if not separator or (field and not field.startswith(":")):
        return None
    return Path(f"{path}.jsonl"), field.removeprefix(":") or _TEXT_FIELD


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"data={str(path)!r}: there is no such file; {_ALLOWED}"
        )


def _json_lines(path: Path, field: str) -> Iterator[str]:
    _check_file(path)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of(json.loads(line), field, f"{path}, line {number}")


def _text_of(row: Any, field: str, place: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"data: {place}: no text in the field {field!r}; there are {fields}"
        )
    return text


def _data_set(data: str) -> Iterator[str]:
    """Yield the documents of a Hugging Face data set."""
    from datasets import load_dataset

    name, *given = data.split(":")
    options = {"config": None, "split": "test", "field": _TEXT_FIELD}
    for option in given:
        key, _, value = option.partition("=")
        if key not in options or not value:
            raise ValueError(f"data={data!r}: {option!r}; {_ALLOWED}")
        options[key] = value
    try:
        rows = load_dataset(name, options["config"], split=options["split"])
    except Exception as error:  # it raises errors of many libraries
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"data={data!r}: no such file, and as a data set it cannot be loaded "
            f"({type(error).__name__}: {reason}); {_ALLOWED}; without a network, one "
            "in the local cache"
        ) from error
    for number, row in enumerate(rows):
        yield _text_of(row, str(options["field"]), f"{name}, row {number}")
