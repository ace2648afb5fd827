# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: found by name, and built."""

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vsraq.evaluation.tasks import GROUPS, WIKITEXT2, Column

_GENERATED = "generate_until"


def require_harness() -> None:
    """Check that lm-eval is there.

    Raises:
        RuntimeError: It is not installed.
    """
    if find_spec("lm_eval") is None:
        raise RuntimeError(
            "tasks: all but wikitext2 need lm-eval, which is not installed; run `pip "
            "install vsraq[evaluate]`"
        )


@dataclass(frozen=True)
class Built:
    """A task that is ready to run.

    Attributes:
        column: What it is in the table.
        top: lm-eval's `Task`, or its `Group` of tasks.
        leaves: lm-eval's tasks in it, by name.
    """

    column: Column
    top: Any
    leaves: Mapping[str, Any]

    @property
    def generates(self) -> bool:
        """Whether a task in it lets the model write."""
        return any(t.get_config("output_type") == _GENERATED for t in self.written)

    @property
    def written(self) -> list[Any]:
        """The tasks in it that let the model write."""
        leaves = self.leaves.values()
        return [t for t in leaves if t.get_config("output_type") == _GENERATED]


class TaskIndex:
    """What lm-eval knows by name, and how a name is built.

    Args:
        names: Names of lm-eval's tasks, groups or tags that will be asked for. If the
            folders of `include_path` have all of them, lm-eval's own 15,000 files,
            which take tens of seconds to read, are left alone.
        include_path: Folders of tasks of your own.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: See `check`.
    """

    def __init__(self, names: Sequence[str], include_path: Sequence[Path] = ()) -> None:
        from lm_eval.tasks import TaskManager

        for folder in include_path:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"include_path={str(folder)!r}: no such folder; allowed is one "
                    "with the YAML files of tasks"
                )
        folders = [str(folder) for folder in include_path]
        self._manager: Any = None
        if folders:
            own = TaskManager(include_path=folders, include_defaults=False)
            if all(_is_whole(own, name) for name in names):
                self._manager = own
        if self._manager is None:
            self._manager = TaskManager(include_path=folders or None)
        self.check(names)

    def check(self, names: Sequence[str]) -> None:
        """Check that names are known.

        Raises:
            ValueError: One is not; the message has names that are close.
        """
        known = set(self._manager.all_tasks)
        for name in names:
            if name not in known:
                raise ValueError(_unknown(name, known))

    def members(self, name: str) -> list[str]:
        """Return the tasks of a tag, which is only a word for them; else the name."""
        entry = self._manager.task_index[name]
        return sorted(entry.tags) if entry.kind.name == "TAG" else [name]

    def build(self, column: Column) -> Built:
        """Load the data of a column, and make its tasks.

        Raises:
            RuntimeError: lm-eval cannot build it, such as without its data.
            ValueError: It is a group without a figure of its own.
        """
        spec: Any = column.task
        if column.samples > 1:
            spec = self._sampled(column)
        try:
            _seed()  # some tasks shuffle the answers to a question
            loaded = self._manager.load([spec])
        except Exception as error:  # it raises errors of many libraries
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"tasks: {column.task}: lm-eval cannot build it ({type(error).__name__}"
                f": {reason}); if its data set is missing, load it once with a "
                "network, so that it is in the cache of Hugging Face (HF_HOME)"
            ) from error
        leaves, groups = loaded["tasks"], loaded["groups"]
        top = groups.get(column.task, leaves.get(column.task))
        if column.task in groups and not top.aggregate_metric_list:
            raise ValueError(
                f"tasks: {column.task} is a group for which lm-eval has no figure of "
                f"its own; allowed are its members: {', '.join(top.child_names)}"
            )
        return Built(column, top, leaves)

    def _sampled(self, column: Column) -> dict[str, Any]:
        """Return the task with several answers, as a member that overrides its own."""
        from vsraq.evaluation.pass_at_k import PASS_AT, SampledTask

        own = self._manager.task_index[column.task].cfg or {}
        member = {
            "task": column.task,
            "class": SampledTask,
            "repeats": column.samples,
            "metadata": {**(own.get("metadata") or {}), PASS_AT: column.pass_at},
        }
        return {"group": f"sampled {column.task}", "task": [member]}


def _is_whole(manager: Any, name: Any) -> bool:
    """Whether a task is known, or a group with all its members."""
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    if entry is None or entry.kind.name == "TAG":  # lm-eval may have more of a tag
        return False
    members = entry.cfg["task"] if entry.kind.name == "GROUP" else ()
    return all(_is_whole(manager, member) for member in members)


def _seed() -> None:
    """Seed as lm-eval does before it builds tasks that it is given by name."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)


def _unknown(name: str, known: set[str]) -> str:
    allowed = {*known, WIKITEXT2, *(group.name for group in GROUPS)}
    close = difflib.get_close_matches(name, sorted(allowed), n=5, cutoff=0.5)
    nearest = f"close are {', '.join(close)}; " if close else ""
    return (
        f"tasks: {name!r} is no task of lm-eval {version('lm_eval')}; {nearest}allowed "
        f"are those that `lm-eval ls tasks` lists, {WIKITEXT2}, "
        f"{', '.join(group.name for group in GROUPS)}, and your own with include_path"
    )
