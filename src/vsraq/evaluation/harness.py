# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness run on a model, and their figures read."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from vsraq.evaluation.results import ColumnUsed, Figure
from vsraq.evaluation.task_index import Built
from vsraq.evaluation.tasks import METRICS, Column
from vsraq.tokens import Sampling

_T = TypeVar("_T")
_SHARES = ("acc", "exact_match")  # how metrics begin that are shares of documents


@dataclass(frozen=True)
class RunOptions:
    """How tasks are run; see `vsraq.evaluate`."""

    limit: int | None = None
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    apply_chat_template: bool = False


def run_tasks(
    lm: Any, tasks: Sequence[Built], sampling: Sampling, options: RunOptions
) -> list[tuple[Figure, ColumnUsed]]:
    """Run tasks on a model.

    Tasks that lm-eval calls the same, such as MMLU-Pro with two lengths of answers, run
    one after another, all others together.

    Args:
        lm: The model as lm-eval's `LM`.
        tasks: The tasks.
        sampling: How the model's answers are sampled, where they are.
        options: How they are run.

    Returns:
        For each task the figure, and what it is.

    Raises:
        ValueError: The model cannot read and write as much as a task asks for.
    """
    from lm_eval import simple_evaluate

    found: dict[str, tuple[Figure, ColumnUsed]] = {}
    for together in _without_clashes(tasks):
        generation = {}
        for built in together:
            generation[built.column.name] = _set_generation(built, sampling, options)
            _check_length(lm, built)
        results = simple_evaluate(
            model=lm,
            tasks=[built.top for built in together],
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            log_samples=False,
            apply_chat_template=options.apply_chat_template,
        )
        assert results is not None  # None is for other ranks of several processes
        for built in together:
            name = built.column.name
            found[name] = _read(results, built, generation[name])
    return [found[built.column.name] for built in tasks]


def _without_clashes(tasks: Sequence[Built]) -> list[list[Built]]:
    """Divide tasks so that no two of one part have the same name in lm-eval."""
    parts: list[tuple[set[str], list[Built]]] = []
    for built in tasks:
        names = {built.column.task, *built.leaves}
        part = next((p for p in parts if not names & p[0]), None)
        if part is None:
            parts.append(part := (set(), []))
        part[0].update(names)
        part[1].append(built)
    return [together for _, together in parts]


def _read(
    results: Mapping[str, Any], built: Built, generation: Mapping[str, Any]
) -> tuple[Figure, ColumnUsed]:
    """Read the figure of a task from what lm-eval returns."""
    name = built.column.task
    figures = dict(_numbers(results["results"][name]))
    metric, way = _counted(built.column, figures)
    figure = Figure(
        value=_finite(figures[metric, way]),
        stderr=_finite(figures.get((f"{metric}_stderr", way))),
        metrics={",".join(k): v for k, v in figures.items() if math.isfinite(v)},
    )
    counts = [results["n-samples"][leaf] for leaf in built.leaves]
    task_version = results["versions"].get(name)
    return figure, ColumnUsed(
        name=built.column.name,
        task=name,
        metric=metric,
        filter=way,
        percent=metric.startswith(_SHARES),
        higher_is_better=_one(
            results["higher_is_better"].get(leaf, {}).get(metric)
            for leaf in built.leaves
        ),
        num_fewshot=_one(results["n-shot"].get(leaf) for leaf in built.leaves),
        documents=sum(count["effective"] for count in counts),
        all_documents=sum(count["original"] for count in counts),
        generation=dict(generation),
        samples=built.column.samples,
        version=None if task_version is None else str(task_version),
    )


def _one(values: Iterable[_T]) -> _T | None:
    """Return what all have in common; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _set_generation(
    built: Built, sampling: Sampling, options: RunOptions
) -> Mapping[str, Any]:
    """Say how its tasks write; return how the first of them does."""
    given = dict(built.column.generation)
    if built.column.samples > 1:
        given |= {"do_sample": True, "temperature": sampling.temperature}
        more = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        given |= {name: value for name, value in more.items() if value is not None}
    if options.max_gen_toks is not None:
        given["max_gen_toks"] = options.max_gen_toks
    for task in built.written:
        task.set_config("generation_kwargs", given, update=True)
    first = next(iter(built.written), None)
    return {} if first is None else dict(first.get_config("generation_kwargs"))


def _check_length(lm: Any, built: Built) -> None:
    for task in built.written:
        given = task.get_config("generation_kwargs")
        tokens = int(given.get("max_gen_toks", lm.max_gen_toks))
        if tokens >= lm.max_length:
            raise ValueError(
                f"{built.column.name}: it asks for answers of {tokens} tokens, and the "
                f"model has {lm.max_length} positions; allowed are fewer, with "
                "max_gen_toks"
            )


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (metric, filter) and its figure; lm-eval writes "N/A" for no figure."""
    for key, value in results.items():
        metric, separator, way = key.partition(",")
        if separator and isinstance(value, int | float):
            yield (metric, way), float(value)


def _counted(
    column: Column, figures: Mapping[tuple[str, str], float]
) -> tuple[str, str]:
    """Return the metric and the filter that count."""
    from vsraq.evaluation.pass_at_k import pass_at_name

    known = [key for key in figures if not key[0].endswith("_stderr")]
    wanted = [column.metric] if column.metric is not None else list(METRICS)
    if column.samples > 1:
        wanted = [pass_at_name(name, column.pass_at) for name in wanted]
    for name in wanted:
        for key in known:
            if key[0] == name and column.filter in (None, key[1]):
                return key
    if column.metric is None and known:
        return known[0]
    raise RuntimeError(
        f"{column.task}: no figure {column.metric} ({column.filter}) in lm-eval's "
        f"results, which have {', '.join(map(','.join, known)) or 'none'}; lm-eval "
        f"{version('lm_eval')} may be too new: install the version of constraints.txt"
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
