# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs: checked, found and built before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vsraq.evaluation.results import SettingsUsed
from vsraq.evaluation.task_index import Built, TaskIndex, require_harness
from vsraq.evaluation.tasks import GROUPS, WIKITEXT2, Column, TaskGroup, column_of


@dataclass(frozen=True)
class Plan:
    """What is run on each model.

    Attributes:
        text: Whether the perplexity of WikiText-2 is.
        tasks: The tasks of lm-eval, in the order of the table.
        averages: The groups among them.
    """

    text: bool
    tasks: tuple[Built, ...]
    averages: tuple[TaskGroup, ...]


def check_numbers(settings: SettingsUsed) -> None:
    """Refuse numbers that are too small, and what is no number."""
    for name, least in (
        *(("batch_size", 1), ("limit", 1), ("max_gen_toks", 1)),
        *(("samples", 1), ("num_fewshot", 0)),
    ):
        value = getattr(settings, name)
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < least
        ):
            raise ValueError(f"{name}={value!r}: allowed is an int >= {least}")


def make_plan(settings: SettingsUsed, include_path: Sequence[Path]) -> Plan:
    """Find and build the tasks before any model is loaded."""
    by_name = {group.name: group for group in GROUPS}
    names = list(dict.fromkeys(settings.tasks))
    if not names:
        raise ValueError("tasks=[]: allowed is at least one task")
    groups = [by_name[name] for name in names if name in by_name]
    wanted = [name for name in names if name != WIKITEXT2]
    if not wanted:
        if include_path:
            raise ValueError("include_path: it has tasks, and none is asked for")
        return Plan(True, (), ())
    require_harness()
    others = [name for name in wanted if name not in by_name]
    in_groups = [c.task for group in groups for c in group.columns]
    index = TaskIndex([*others, *in_groups], include_path)
    columns: list[Column] = []
    for name in wanted:
        if name in by_name:
            columns += by_name[name].columns
        else:
            columns += [column_of(member) for member in index.members(name)]
    if settings.samples is not None:
        columns = [_with_samples(column, settings.samples) for column in columns]
    built = {c.name: index.build(c) for c in {c.name: c for c in columns}.values()}
    return Plan(WIKITEXT2 in names, tuple(built.values()), tuple(groups))


def _with_samples(column: Column, samples: int) -> Column:
    if column.samples == 1:
        return column
    if samples < max(column.pass_at, 2):
        raise ValueError(
            f"samples={samples}: allowed for {column.name} is an int >= "
            f"{max(column.pass_at, 2)}"
        )
    return replace(column, samples=samples)


def refuse_useless(
    settings: SettingsUsed,
    plan: Plan,
    *,
    seqlen: int | None,
    wikitext2: str | Path | None,
) -> None:
    """Refuse options that would do nothing with these tasks."""
    generated = any(built.generates for built in plan.tasks)
    sampled = any(built.column.samples > 1 for built in plan.tasks)
    needs: dict[str, tuple[Any, bool, str]] = {
        "seqlen": (seqlen, plan.text, WIKITEXT2),
        "wikitext2": (wikitext2, plan.text, WIKITEXT2),
        "num_fewshot": (settings.num_fewshot, bool(plan.tasks), "a task of lm-eval"),
        "apply_chat_template": (
            settings.apply_chat_template or None,
            bool(plan.tasks),
            "a task of lm-eval",
        ),
        "max_gen_toks": (settings.max_gen_toks, generated, "a task with answers"),
        "think_end_token": (settings.think_end_token, generated, "a task with answers"),
        "samples": (settings.samples, sampled, "a task with several answers"),
    }
    for name, (value, works, what) in needs.items():
        if value is not None and not works:
            raise ValueError(
                f"{name}={str(value)!r}: it does nothing with tasks="
                f"{','.join(settings.tasks)}; allowed is it beside {what}"
            )
