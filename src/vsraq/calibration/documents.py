# SPDX-License-Identifier: Apache-2.0
"""A row of a data set as the token ids that a model would read and write.

A conversation goes through the chat template up to the last answer, as for a request.
The answer follows as it is, so that reasoning which templates drop from earlier answers
stays. Then comes the end token.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vsraq.calibration.sources import Source
from vsraq.strict import shown

logger = logging.getLogger("autoround.vsraq")

_THINK = "<think>"
Messages = list[dict[str, str]]


def document_ids(
    row: Mapping[str, Any], source: Source, tokenizer: Any, limit: int | None = None
) -> list[int]:
    """Return the token ids of a row, with the end token.

    Args:
        row: The row.
        source: Where it is from.
        tokenizer: The model's.
        limit: Tokens that are wanted; the end token may be cut off with the rest. None
            for all.

    Returns:
        Token ids; none for an empty row.

    Raises:
        ValueError: A column is missing, or holds something else.
    """
    value = _value(row, source)
    if isinstance(value, tuple):
        return list(value[:limit])
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not any(message["content"].strip() for message in messages):
        return []
    chat = source.chat and bool(getattr(tokenizer, "chat_template", None))
    text = _rendered(messages, tokenizer, source) if chat else _joined(messages)
    # a template has the special tokens in its text
    ids = _encode(tokenizer, text, limit, special=not chat)
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    return ids[:limit]


def _value(row: Mapping[str, Any], source: Source) -> str | tuple[int, ...] | Messages:
    """Return the text, the token ids or the messages of a row."""
    columns = source.columns or _found_columns(row, source)
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(
            f"dataset={source.repo!r}: no column {', '.join(missing)}; it has "
            f"{', '.join(row)}"
            + ("" if source.is_file else f": compare with {source.page}")
        )
    if len(columns) == 2:
        question, answer = (_text(row[name], name, source) for name in columns)
        if not question.strip() or not answer.strip():
            return ()
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    value = row[columns[0]]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return _messages(value, columns[0], source)
    if isinstance(value, list) and all(isinstance(v, int) for v in value):
        return tuple(value)
    return _text(value, columns[0], source)


def _found_columns(row: Mapping[str, Any], source: Source) -> tuple[str, ...]:
    """Return the column of a file that names none, as AutoRound finds it."""
    if len(row) == 1:
        return tuple(row)
    found = [name for name in ("text", "messages", "input_ids") if name in row]
    if not found:
        raise ValueError(
            f"dataset={source.repo!r}: no column text, messages or input_ids; name one "
            f"of {', '.join(row)}, as {source.repo}:{next(iter(row), 'text')}"
        )
    return (found[0],)


def _text(value: Any, name: str, source: Source) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"dataset={source.repo!r}: {name}={shown(value)}; allowed is a text, a "
            "list of token ids, or a list of messages with role and content"
        )
    return value


def _messages(value: Sequence[Any], name: str, source: Source) -> Messages:
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"dataset={source.repo!r}: {name}={shown(value)}; allowed are messages "
                "with role and content"
            )
        content = _text(message["content"], name, source)
        if content.strip() or message["role"] != "system":
            messages.append({"role": message["role"], "content": content})
    return messages


def _joined(messages: Messages) -> str:
    contents = (message["content"] for message in messages)
    return "\n\n".join(content for content in contents if content.strip())


def _rendered(messages: Messages, tokenizer: Any, source: Source) -> str:
    """Return a conversation as text: a request, and the answer to it."""
    answered = messages[-1]["role"] == "assistant" and len(messages) > 1
    asked = messages[:-1] if answered else messages
    prompt = _prompt(asked, tokenizer, source)
    if not answered:
        return prompt
    answer = messages[-1]["content"]
    if prompt.rstrip().endswith(_THINK) and answer.lstrip().startswith(_THINK):
        answer = answer.lstrip().removeprefix(_THINK).lstrip("\n")
    return prompt + answer


def _prompt(messages: Messages, tokenizer: Any, source: Source) -> str:
    given = messages
    for _ in range(2):
        try:
            text: str = tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=True
            )
            return text
        except Exception as error:  # templates raise what they like
            without = [m for m in given if m["role"] != "system"]
            if len(without) == len(given) or not without:
                raise ValueError(
                    f"dataset={source.repo!r}: the tokenizer's chat template refuses a "
                    f"conversation ({error}); add :apply_chat_template=false"
                ) from error
            _warn_of_system(source.repo)
            given = without
    raise AssertionError("the second try returns or raises")


@functools.cache
def _warn_of_system(repo: str) -> None:
    logger.warning(
        "vsraq: %s: the chat template refuses system messages; they are left out", repo
    )


def _encode(
    tokenizer: Any, text: str, limit: int | None, *, special: bool
) -> list[int]:
    ids: list[int] = tokenizer(
        text,
        truncation=limit is not None,
        max_length=limit,
        add_special_tokens=special,
        verbose=False,  # documents may be longer than the model's context
    )["input_ids"]
    return ids
