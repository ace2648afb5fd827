# SPDX-License-Identifier: Apache-2.0
"""Where calibration text comes from: sets of the hub, mixtures of them, local files."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Source:
    """Rows to read, and which of their columns hold what.

    Attributes:
        repo: A data set of the hub, or the path of a local file.
        config: The data set's configuration; None for its only one.
        split: Its split.
        columns: One column with a text, token ids or messages; or two, the question
            and the answer; empty to find it out from the first row.
        chat: Whether a row goes through the tokenizer's chat template, if there is one.
        is_file: Whether `repo` is a local file.
    """

    repo: str
    config: str | None = None
    split: str = "train"
    columns: tuple[str, ...] = ()
    chat: bool = True
    is_file: bool = False

    @property
    def page(self) -> str:
        """The data set's page on the hub."""
        return f"https://huggingface.co/datasets/{self.repo}"


_NEMOTRON = "nvidia/Nemotron-Post-Training-Dataset-v2"

# Configurations, splits and columns are those of the sets' public cards.
MIXTURES: Mapping[str, Mapping[str, Source]] = MappingProxyType(
    {
        # the calibration text of the VSRAQ paper
        "nvidia-reasoning": {
            # split_1 has no questions
            "code": Source(
                "nvidia/OpenCodeReasoning", "split_0", "split_0", ("input", "output")
            ),
            "science": Source(
                "nvidia/OpenScienceReasoning-2", columns=("input", "output")
            ),
            # "cot" is reasoning in words; "tir" runs code, "genselect" chooses answers
            "math": Source(
                "nvidia/OpenMathReasoning",
                split="cot",
                columns=("problem", "generated_solution"),
            ),
        },
        "nemotron-post-training-v2": {
            split: Source(_NEMOTRON, split=split, columns=("messages",))
            for split in ("stem", "chat", "math", "code")
        },
        "c4": {"c4": Source("allenai/c4", "en", columns=("text",), chat=False)},
    }
)
