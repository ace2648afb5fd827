# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, and `evaluation.json`, which holds it.

docs/evaluate.md says what the keys mean.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from vsraq.json_file import read_json_file, write_json_file

FORMAT = "vsraq-evaluation/1"
FILE_NAME = "evaluation.json"

Backend: TypeAlias = Literal["hf", "vllm"]


@dataclass(frozen=True)
class SettingsUsed:
    """How models were run; see `vsraq.evaluate`.

    Attributes:
        tasks: As they were asked for.
        backend: What ran the models.
        limit: Documents of each task, and windows of WikiText-2; None is all.
        batch_size: Sequences at once; None is 8, and in vLLM its own choice.
        num_fewshot: Examples in the prompt; None is each task's own number.
        max_gen_toks: Tokens of an answer; None is each column's own number.
        samples: Answers to a question where there are several; None is as above.
        apply_chat_template: Whether prompts went through the chat template.
        think_end_token: What ends the reasoning, which is then cut off.
        dtype: What models were computed in; None is the checkpoint's.
    """

    tasks: list[str]
    backend: Backend
    limit: int | None
    batch_size: int | None
    num_fewshot: int | None
    max_gen_toks: int | None
    samples: int | None
    apply_chat_template: bool
    think_end_token: str | None
    dtype: str | None


@dataclass(frozen=True)
class TextUsed:
    """The text of the perplexity.

    Attributes:
        source: Where it comes from.
        seqlen: Tokens of a window.
        windows: How many were evaluated.
        all_windows: How many there are.
    """

    source: str
    seqlen: int
    windows: int
    all_windows: int


@dataclass(frozen=True)
class ColumnUsed:
    """A column of the table.

    Attributes:
        name: Its heading.
        task: The name in lm-eval; wikitext2 is not of lm-eval.
        metric: Which of its figures this is.
        filter: How answers were extracted, in lm-eval's name.
        percent: Whether tables print a hundred times the value.
        higher_is_better: None where lm-eval does not say.
        num_fewshot: Examples in the prompt; None where tasks of a group differ.
        documents: How many were evaluated.
        all_documents: How many there are.
        generation: lm-eval's `generation_kwargs`, of the first model; empty where
            nothing is generated.
        samples: Answers to each question.
        version: Of the task, by lm-eval.
    """

    name: str
    task: str
    metric: str
    filter: str
    percent: bool
    higher_is_better: bool | None
    num_fewshot: int | None
    documents: int
    all_documents: int
    generation: dict[str, Any]
    samples: int
    version: str | None


@dataclass(frozen=True)
class AverageUsed:
    """A mean over columns.

    Attributes:
        name: Its heading.
        group: The name of the tasks together.
        columns: Headings of what it is over.
    """

    name: str
    group: str
    columns: list[str]


@dataclass(frozen=True)
class Figure:
    """A figure and its standard error.

    Attributes:
        value: None where it is not finite.
        stderr: Over the documents; None where nobody knows it.
        metrics: Every figure of the task, "metric,filter" in lm-eval's names.
    """

    value: float | None
    stderr: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Average:
    """A mean over tasks.

    Attributes:
        value: None where one of them is.
        stderr: See `average`.
    """

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class MethodFigures:
    """A model.

    Attributes:
        source: Its path, or its class where it was in memory.
        mebibytes: Size of its safetensors files, MiB; None where it was in memory.
        seconds: Wall time of all tasks, without loading.
        figures: By heading.
        averages: By heading.
    """

    source: str
    mebibytes: float | None
    seconds: float
    figures: dict[str, Figure]
    averages: dict[str, Average]


@dataclass(frozen=True)
class Evaluation:
    """Everything in `evaluation.json`.

    Attributes:
        created: When, UTC.
        versions: Of vsraq, torch, transformers, and of lm-eval and vllm where they ran.
        settings: How models were run.
        text: What the perplexity is of; None without it.
        columns: In the order of the table.
        averages: Means over columns.
        methods: The models, by name.
    """

    created: str
    versions: dict[str, str]
    settings: SettingsUsed
    text: TextUsed | None
    columns: list[ColumnUsed]
    averages: list[AverageUsed]
    methods: dict[str, MethodFigures]

    def save(self, folder: str | Path) -> Path:
        """Write `evaluation.json`, whole or not at all.

        Args:
            folder: It is made if it is not there.

        Returns:
            The file's path.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / FILE_NAME
        write_json_file(path, self.as_dict())
        return path

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluation.json` holds."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` has written.

        Args:
            folder: With the file.

        Raises:
            FileNotFoundError: The file is not there.
            ValueError: It is not of this version.
        """
        path = Path(folder) / FILE_NAME
        refused = (
            f"{str(path)!r}: no evaluation of this version; allowed is a folder that "
            "`vsraq evaluate` has written, so run it again"
        )
        return read_json_file(path, FORMAT, cls, refused)

    def __str__(self) -> str:
        from vsraq.evaluation.table import as_text

        return as_text(self)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        from vsraq.evaluation.table import as_markdown

        return as_markdown(self)


def average(figures: Sequence[Figure]) -> Average:
    """Compute the mean over tasks, each with the same weight.

    The tasks have different documents, so their errors are independent:

        stderr = sqrt(sum_i stderr_i^2) / n

    Args:
        figures: Of n tasks.

    Returns:
        The mean; None for what one of the tasks lacks.
    """
    values = [f.value for f in figures if f.value is not None]
    errors = [f.stderr for f in figures if f.stderr is not None]
    count = len(figures)
    return Average(
        value=math.fsum(values) / count if len(values) == count else None,
        stderr=math.hypot(*errors) / count if len(errors) == count else None,
    )
