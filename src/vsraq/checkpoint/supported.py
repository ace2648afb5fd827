# SPDX-License-Identifier: Apache-2.0
"""Which of AutoRound's export formats can be verified, known before a run starts."""

SUPPORTED_FORMATS = (
    "auto_round",
    "auto_round:auto_gptq",
    "auto_round:gptqmodel",
    "auto_round:auto_awq",
    "auto_gptq",
    "auto_awq",
    "llm_compressor",
)


def check_formats(format: str) -> None:
    """Refuse an export format that `verify` cannot read, before hours are spent.

    Args:
        format: AutoRound's `format`: one name, or several with commas between them.

    Raises:
        ValueError: One of them cannot be read, or there is none.
    """
    names = [name.strip() for name in format.lower().split(",")]
    unknown = [name for name in names if name not in SUPPORTED_FORMATS]
    if unknown:
        raise ValueError(
            f"format={format!r}: {', '.join(map(repr, unknown))} cannot be verified; "
            f"allowed are {', '.join(SUPPORTED_FORMATS)}, several with commas between "
            "them; export in one of these, or run AutoRound itself for the others"
        )
