# SPDX-License-Identifier: Apache-2.0
"""The table of export formats: a new one is a class in this folder and one row here."""

from vsraq.checkpoint.formats.eight_bits import FP8, INT8
from vsraq.checkpoint.formats.format import Declared, Format
from vsraq.checkpoint.formats.gptq import AWQ, GPTQ, AutoRoundGPTQ
from vsraq.checkpoint.formats.mxfp import MXFP4, MXFP8
from vsraq.checkpoint.formats.nvfp4 import NVFP4
from vsraq.checkpoint.formats.pack_quantized import PackQuantized

# Of several formats that recognise a config, the first counts.
FORMATS: tuple[Format, ...] = (
    GPTQ(),
    AutoRoundGPTQ(),
    AWQ(),
    PackQuantized(),
    INT8(),
    NVFP4(),
    MXFP4(),
    MXFP8(),
    FP8(),
)


def find_format(declared: Declared) -> Format | None:
    """The format that a config means, or None if none recognises it."""
    return next((form for form in FORMATS if form.recognises(declared)), None)


def own_suffixes() -> frozenset[str]:
    """Suffixes of tensors that only a quantized layer has."""
    return frozenset().union(*(form.suffixes for form in FORMATS))


def exported_kinds() -> dict[str, list[str]]:
    """AutoRound's name of an export format -> the kinds of weights that it yields."""
    kinds: dict[str, list[str]] = {}
    for form in FORMATS:
        for name in form.exports:
            if form.kind not in kinds.setdefault(name, []):
                kinds[name].append(form.kind)
    return kinds


def check_formats(format: str) -> None:
    """Refuse an export format that `verify` cannot read, before hours are spent.

    Args:
        format: AutoRound's `format`: one name, or several with commas between them.

    Raises:
        ValueError: One of them cannot be read, or there is none.
    """
    names = [name.strip() for name in format.lower().split(",")]
    allowed = exported_kinds()
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(
            f"format={format!r}: {', '.join(map(repr, unknown))} cannot be verified; "
            f"allowed are {', '.join(allowed)}, several with commas between "
            "them; export in one of these, or run AutoRound itself for the others"
        )
