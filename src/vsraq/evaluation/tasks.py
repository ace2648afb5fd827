# SPDX-License-Identifier: Apache-2.0
"""The tasks of the papers, as data: what each column is, and which figure counts.

VSRAQ (arXiv:2606.05688, section 4.1) names the tasks, greedy decoding, and a thinking
budget of 8192 tokens for MMLU-Pro and GPQA-Diamond; Tables 2 to 4 print the mean over
the tasks of each kind. SRA (section 5.1) names pass@4 for AIME, 16k tokens and eight
runs for AIME and GPQA-Diamond, and 4k tokens and one run for MMLU-Pro; its tables print
each task. Neither names a variant of a task, the number of examples in the prompt, nor
a metric. Those are lm-evaluation-harness's:

- `acc_norm` where a task has it (the log-likelihood by the bytes of an answer), else
  `acc`; TruthfulQA is `mc2`, the probability of all true answers;
- `exact_match` of the answer that is extracted. Where lm-eval extracts in two ways it
  is `flexible-extract`, since the papers extract from free-form answers, and a prompt
  without examples asks for no fixed form;
- the examples in the prompt and the length of an answer are those of the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIKITEXT2, WIKITEXT2_HEADING = "wikitext2", "WikiText-2 PPL"
# the first that a task has counts, where no table names one
METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity")
_GREEDY = {"do_sample": False, "temperature": 0.0}


@dataclass(frozen=True)
class Column:
    """A column of the table: a task of lm-eval, and which of its figures counts.

    Attributes:
        name: Its heading.
        task: The name in lm-eval, of a task or a group of tasks.
        metric: What counts; None takes the first of `METRICS` that there is.
        filter: How answers are extracted, by lm-eval's name; None takes its first.
        generation: What differs from the task's own `generation_kwargs`.
        samples: Answers to each question. More than one are sampled, in the way that
            the publisher of the model recommends.
        pass_at: k of pass@k over these answers.
    """

    name: str
    task: str
    metric: str | None = None
    filter: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    pass_at: int = 1


@dataclass(frozen=True)
class TaskGroup:
    """Columns that belong together.

    Attributes:
        name: What a user calls it.
        average: Heading of the mean over its columns; None where there is none.
        columns: In the order of the table.
    """

    name: str
    average: str | None
    columns: tuple[Column, ...]


GROUPS = (
    TaskGroup(
        "vsraq_likelihood",
        "Likelihood-based MC",
        (
            Column("ARC-C", "arc_challenge", "acc_norm", "none"),
            Column("ARC-E", "arc_easy", "acc_norm", "none"),
            Column("BoolQ", "boolq", "acc", "none"),
            Column("HellaSwag", "hellaswag", "acc_norm", "none"),
            Column("MMLU", "mmlu", "acc", "none"),
            Column("PIQA", "piqa", "acc_norm", "none"),
            Column("TruthfulQA", "truthfulqa_mc2", "acc", "none"),
            Column("WinoGrande", "winogrande", "acc", "none"),
        ),
    ),
    TaskGroup(
        "vsraq_generation",
        "Gen.-based Extract.",
        (
            Column(
                "MMLU-Pro",
                "mmlu_pro",
                "exact_match",
                "custom-extract",
                _GREEDY | {"max_gen_toks": 8192},
            ),
            Column(
                "GPQA-Diamond",
                "gpqa_diamond_cot_zeroshot",
                "exact_match",
                "flexible-extract",
                _GREEDY | {"max_gen_toks": 8192},
            ),
            Column("GSM8K", "gsm8k", "exact_match", "flexible-extract", _GREEDY),
        ),
    ),
    TaskGroup(
        "sra_generation",
        None,
        (
            # eight runs of pass@4
            *(
                Column(
                    f"{name} pass@4",
                    task,
                    "exact_match",
                    "none",
                    {"max_gen_toks": 16384},
                    samples=32,
                    pass_at=4,
                )
                for name, task in (("AIME24", "aime24"), ("AIME25", "aime25"))
            ),
            Column(
                "GPQA-D (SRA)",
                "gpqa_diamond_cot_zeroshot",
                "exact_match",
                "flexible-extract",
                {"max_gen_toks": 16384},
                samples=8,
            ),
            Column(
                "MMLU-P (SRA)",
                "mmlu_pro",
                "exact_match",
                "custom-extract",
                _GREEDY | {"max_gen_toks": 4096},
            ),
        ),
    ),
)


def column_of(task: str) -> Column:
    """Return the column of a task that is asked for by its name in lm-eval.

    It runs as lm-eval has it. Only the figure that counts is that of the tables.
    """
    if task == "wikitext":  # perplexity of words, not of tokens
        return Column("wikitext word_perplexity", task, "word_perplexity", "none")
    known = (c for group in GROUPS for c in group.columns if c.task == task)
    found = next(known, None)
    if found is None:
        return Column(task, task)
    return Column(task, task, found.metric, found.filter)
