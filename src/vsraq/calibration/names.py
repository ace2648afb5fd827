# SPDX-License-Identifier: Apache-2.0
"""Names of data sets, in AutoRound's syntax: `name:key=value:key=value,name`.

    nvidia-reasoning
    nvidia-reasoning:code=2,science=1,math=1
    nvidia-reasoning:code=2:science=0:concat=true
    own.jsonl:text
    own.jsonl:question+answer:weight=3,other.jsonl:text,pile-10k:num=64

AutoRound takes a comma as the start of the next data set, and drops keys that it does
not know. Here a comma may stand between the shares of a mixture, too, and an unknown
key is an error.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vsraq.calibration.sources import MIXTURES, Source
from vsraq.strict import did_you_mean

FILES = (".jsonl", ".json", ".parquet")
_SWITCHES = {"true": True, "false": False}
_KEYS = ("weight", "num", "concat", "apply_chat_template")
_BARE = ("concat", "apply_chat_template")  # may stand for themselves with "=true"
# sets of the hub that are a mixture by themselves
ALIASES: Mapping[str, str] = {
    source.repo: name
    for name, sources in MIXTURES.items()
    if len(sources) == 1
    for source in sources.values()
}
_SHARE = re.compile(r"\w+=[^:]+(:.*)?")


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and how much of it.

    Attributes:
        name: What reports call it.
        source: What to read; None for a data set that AutoRound reads.
        text: AutoRound's name of that data set, with its options.
        weight: Its share, relative to the other parts' that have no `num`.
        num: A fixed number of samples instead of a share.
        concat: Whether documents are joined and cut into samples; otherwise a sample
            is the beginning of one document.
    """

    name: str
    source: Source | None
    text: str = ""
    weight: float = 1.0
    num: int | None = None
    concat: bool = False


def parse_names(dataset: str) -> list[Part]:
    """Read the name of one or several data sets.

    Args:
        dataset: The name, as users give it to AutoRound.

    Returns:
        The parts; empty if all of them are AutoRound's own, with its own rules.

    Raises:
        ValueError: A key is unknown, or a value is not allowed.
    """
    segments = _segments(dataset.replace(" ", ""))
    if not any(_is_ours(segment) for segment in segments):
        return []
    parts = [part for segment in segments for part in _parts(segment)]
    if not any(part.weight or part.num for part in parts):
        raise ValueError(
            f"dataset={dataset!r}: every share is 0; allowed is at least one above it"
        )
    return parts


def count_samples(parts: Sequence[Part], nsamples: int) -> list[int]:
    """Divide a number of samples by weight; what is left goes to the largest rests.

    Args:
        parts: The parts; those with `num` have that number.
        nsamples: Samples of all parts.

    Raises:
        ValueError: The fixed numbers are more than that.
    """
    fixed = sum(part.num or 0 for part in parts)
    left = nsamples - fixed
    total = sum(part.weight for part in parts if part.num is None)
    if left < 0 or (total == 0 and left > 0):
        raise ValueError(
            f"nsamples={nsamples}: the data sets have num={fixed} altogether; allowed "
            f"is {'at least' if total else 'exactly'} that, so change one of the two"
        )
    exact = [left * p.weight / total if p.num is None else p.num for p in parts]
    counts = [math.floor(share) for share in exact]
    order = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for index in order[: nsamples - sum(counts)]:
        counts[index] += 1
    return counts


def _segments(dataset: str) -> list[str]:
    """Split at the commas that start a data set."""
    segments: list[str] = []
    for text in dataset.split(","):
        if segments and _name(segments[-1]) in MIXTURES and _SHARE.fullmatch(text):
            segments[-1] += f":{text}"
        else:
            segments.append(text)
    return segments


def _name(segment: str) -> str:
    name = segment.partition(":")[0]
    return ALIASES.get(name, name)


def _is_ours(segment: str) -> bool:
    """Whether a data set is read here: a mixture, or a file with what only we know."""
    _, *options = segment.split(":")
    name = _name(segment)
    if name in MIXTURES or name.endswith(".parquet"):
        return True
    return name.endswith(FILES) and any(
        option.startswith("weight=") or _is_field(option) for option in options
    )


def _is_field(option: str) -> bool:
    return "=" not in option and option not in _BARE


def _parts(segment: str) -> list[Part]:
    _, *options = segment.split(":")
    name = _name(segment)
    if name in MIXTURES:
        return _mixture(name, options)
    if name.endswith(FILES):
        return [_file(name, options)]
    kept = [option for option in options if not option.startswith(("weight=", "num="))]
    part = Part(name, None, ":".join([name, *kept]))
    return [_with(part, [o for o in options if o not in kept], _KEYS)]


def _mixture(name: str, options: Sequence[str]) -> list[Part]:
    sources = MIXTURES[name]
    shares = dict.fromkeys(sources, 1.0)
    others = []
    for option in options:
        key, _, value = option.partition("=")
        if key in shares:
            shares[key] = _number(f"{name}:{option}", value)
        else:
            others.append(option)
    whole = _with(Part(name, None), others, (*sources, *_KEYS), tuple(sources))
    if whole.num is not None:
        raise ValueError(
            f"dataset={name}:num={whole.num}: a mixture has shares; allowed are "
            f"{', '.join(f'{key}=NUMBER' for key in sources)} and weight=NUMBER"
        )
    total = sum(shares.values())
    if total == 0:
        raise ValueError(
            f"dataset={':'.join([name, *options])!r}: every share is 0; allowed is at "
            "least one above it"
        )
    chat = _chat_sets(name, others, sources)
    return [
        replace(
            whole,
            name=f"{name}:{key}" if len(sources) > 1 else name,
            source=replace(source, chat=chat.get(key, source.chat)),
            weight=whole.weight * shares[key] / total,
        )
        for key, source in sources.items()
        if shares[key] > 0
    ]


def _file(name: str, options: Sequence[str]) -> Part:
    fields = [option for option in options if _is_field(option)]
    columns = tuple(fields[0].split("+")) if fields else ()
    if len(fields) > 1 or len(columns) > 2 or not all([True, *columns]):
        raise ValueError(
            f"dataset={':'.join([name, *fields])!r}: allowed is one field after the "
            "file's name, or two as question+answer"
        )
    source = Source(name, columns=columns, chat=len(columns) != 1, is_file=True)
    part = _with(Part(name, source), [o for o in options if not _is_field(o)], _KEYS)
    chat = _chat_sets(name, options, {name: source})
    return replace(part, source=replace(source, chat=chat.get(name, source.chat)))


def _with(
    part: Part, options: Sequence[str], known: Sequence[str], sets: Sequence[str] = ()
) -> Part:
    """Return a part with its options; `apply_chat_template` is read elsewhere."""
    for option in options:
        key, _, value = option.partition("=")
        shown = f"{part.name}:{option}"
        if key not in _KEYS:
            raise ValueError(
                f"dataset={shown!r}: unknown key {key}{did_you_mean(key, known)} "
                f"Allowed are {', '.join(known)}"
            )
        if key == "weight":
            part = replace(part, weight=_number(shown, value))
        elif key == "num":
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"dataset={shown!r}: allowed is an int >= 1")
            part = replace(part, num=int(value))
        elif key == "concat":
            if (value or "true").lower() not in _SWITCHES:
                raise ValueError(f"dataset={shown!r}: allowed are true and false")
            part = replace(part, concat=_SWITCHES[(value or "true").lower()])
    return part


def _chat_sets(
    name: str, options: Sequence[str], sources: Mapping[str, Source]
) -> dict[str, bool]:
    """Return for which sets `apply_chat_template` says something, and what."""
    for option in options:
        key, _, value = option.partition("=")
        if key != "apply_chat_template":
            continue
        if (value or "true").lower() in _SWITCHES:
            return dict.fromkeys(sources, _SWITCHES[(value or "true").lower()])
        named = set(value.split("+"))
        if not named <= sources.keys():
            raise ValueError(
                f"dataset={name}:{option}: allowed are true, false, or sets of "
                f"{', '.join(sources)} with + between them"
            )
        return {key: key in named for key in sources}
    return {}


def _number(shown: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"dataset={shown!r}: allowed is a number >= 0")
    return number
