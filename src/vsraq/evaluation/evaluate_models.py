# SPDX-License-Identifier: Apache-2.0
"""Evaluate models on the papers' tasks, one model after another."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vsraq import stamp
from vsraq.analysis.sources import LoadOptions, ModelOrPath, ModelSource, free_memory
from vsraq.evaluation.backends import BackendOptions, Opened, check_backend, opened
from vsraq.evaluation.harness import RunOptions, run_tasks
from vsraq.evaluation.models import (
    check_chat_templates,
    sources_of,
    tokenizers_of,
    window_of,
)
from vsraq.evaluation.plan import Plan, check_numbers, make_plan, refuse_useless
from vsraq.evaluation.results import (
    AverageUsed,
    Backend,
    ColumnUsed,
    Evaluation,
    Figure,
    MethodFigures,
    SettingsUsed,
    TextUsed,
    average,
)
from vsraq.evaluation.tasks import WIKITEXT2, WIKITEXT2_HEADING
from vsraq.evaluation.wikitext import perplexity, read_wikitext

_PPL = ColumnUsed(
    name=WIKITEXT2_HEADING,
    task=WIKITEXT2,
    metric="token_perplexity",
    filter="none",
    percent=False,
    higher_is_better=False,
    num_fewshot=0,
    documents=0,
    all_documents=0,
    generation={},
    samples=1,
    version=None,
)
_log = logging.getLogger(__name__)


def evaluate(
    models: Mapping[str, ModelOrPath] | ModelOrPath,
    tasks: Sequence[str] | str = WIKITEXT2,
    out: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    wikitext2: str | Path | None = None,
    seqlen: int | None = None,
    backend: Backend = "hf",
    batch_size: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
    samples: int | None = None,
    include_path: Sequence[str | Path] | str | Path = (),
    apply_chat_template: bool = False,
    think_end_token: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Evaluate models: the perplexity of WikiText-2, and tasks of lm-eval.

    Models that are loaded from folders are never in memory together.

    Args:
        models: By name, or one of them: a module, a folder, or the name of a model in
            the hub's cache. The first is what the others are compared with.
        tasks: "wikitext2", "vsraq_likelihood", "vsraq_generation", "sra_generation",
            and names of lm-eval.
        out: Folder for `evaluation.json`, which is written after each model; None
            writes none.
        tokenizer: None takes the one beside each model.
        wikitext2: A copy of the raw test split, see docs/evaluate.md; None takes the
            data set of Hugging Face.
        seqlen: Tokens of a window of it; None takes 2048, or what the models can read.
        backend: What runs the models, "hf" (transformers) or "vllm".
        batch_size: Sequences that go through a model together; None takes 8, and what
            vLLM chooses.
        limit: Only the first so many documents of each task, and windows.
        num_fewshot: Examples in the prompt; None takes each task's own number.
        max_gen_toks: Tokens of an answer; None takes the papers' and the tasks' own.
        samples: Answers to a question where pass@k or several runs are asked for; None
            takes as many as SRA.
        include_path: Folders of tasks of your own, in lm-eval's YAML.
        apply_chat_template: Send prompts through the tokenizer's chat template.
        think_end_token: What ends the reasoning, such as "</think>"; what stands before
            it is no answer.
        dtype: What models from folders compute in; None takes the checkpoint's.
        device: Where those go, such as "cuda:0" or "auto"; None is the CPU.
        trust_remote_code: As in transformers.
        progress: Show a bar for the perplexity; lm-eval shows its own.

    Returns:
        Every figure; `save` writes it, and `print` shows the table.

    Raises:
        FileNotFoundError: A model, the text or a folder is not there.
        RuntimeError: lm-eval or vLLM is not installed, or a task cannot be built.
        ValueError: A task is unknown, or an argument is not allowed or does nothing.
    """
    folders = [include_path] if isinstance(include_path, str | Path) else include_path
    sources = sources_of(models)
    settings = SettingsUsed(
        tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        backend=backend,
        limit=limit,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        max_gen_toks=max_gen_toks,
        samples=samples,
        apply_chat_template=apply_chat_template,
        think_end_token=think_end_token,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )
    check_numbers(settings)
    load = LoadOptions(dtype, device, trust_remote_code)
    options = BackendOptions(backend, load, batch_size, think_end_token)
    check_backend(options, sources)
    plan = make_plan(settings, [Path(folder) for folder in folders])
    refuse_useless(settings, plan, seqlen=seqlen, wikitext2=wikitext2)
    tokenizers = tokenizers_of(sources, tokenizer, load, same=plan.text)
    if apply_chat_template:
        check_chat_templates(tokenizers)
    text, windows = None, None
    if plan.text:
        found = read_wikitext(wikitext2)
        window = window_of(sources, seqlen, load)
        cut = found.windows(next(iter(tokenizers.values())), window)
        windows = cut[:limit]
        text = TextUsed(found.source, window, len(windows), len(cut))
    run = _Run(settings, plan, text, windows, progress)
    for name, source in sources.items():
        run.add(name, source, tokenizers[name], options)
        free_memory()
        if out is not None:
            run.result().save(out)
    return run.result()


class _Run:
    """Models, one after another, and what they gave."""

    def __init__(
        self,
        settings: SettingsUsed,
        plan: Plan,
        text: TextUsed | None,
        windows: Tensor | None,
        progress: bool,
    ) -> None:
        self._settings, self._plan, self._text = settings, plan, text
        self._windows, self._progress = windows, progress
        self._columns: dict[str, ColumnUsed] = {}
        self._methods: dict[str, MethodFigures] = {}
        self._created = stamp.now()

    def add(
        self,
        name: str,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        options: BackendOptions,
    ) -> None:
        """Run everything on a model."""
        _log.info("%s: %s", name, source.label)
        with opened(source, tokenizer, options) as ready:
            start = time.monotonic()
            figures = self._perplexity(ready, options.windows_at_once)
            if self._plan.tasks:
                for figure, used in run_tasks(
                    ready.lm(), self._plan.tasks, ready.sampling, self._run_options()
                ):
                    figures[used.name] = figure
                    self._columns.setdefault(used.name, used)
            seconds = time.monotonic() - start
        for head, figure in figures.items():
            if figure.value is None:
                _log.warning("vsraq: %s, %s: the figure is not finite", name, head)
        self._methods[name] = MethodFigures(
            source=source.label,
            mebibytes=source.mebibytes,
            seconds=round(seconds, 3),
            figures=figures,
            averages={
                group.average: average([figures[c.name] for c in group.columns])
                for group in self._plan.averages
                if group.average is not None
            },
        )

    def _perplexity(self, ready: Opened, batch_size: int) -> dict[str, Figure]:
        if self._windows is None or self._text is None:
            return {}
        found = perplexity(
            ready.nll,
            self._windows,
            batch_size,
            progress=self._progress,
        )
        column = replace(
            _PPL, documents=found.windows, all_documents=self._text.all_windows
        )
        self._columns.setdefault(_PPL.name, column)
        return {_PPL.name: Figure(found.value, found.stderr, {})}

    def _run_options(self) -> RunOptions:
        settings = self._settings
        return RunOptions(
            settings.limit,
            settings.num_fewshot,
            settings.max_gen_toks,
            settings.apply_chat_template,
        )

    def result(self) -> Evaluation:
        """Return what there is so far."""
        packages = ["vsraq", "torch", "transformers"]
        packages += ["lm_eval"] if self._plan.tasks else []
        packages += ["vllm"] if self._settings.backend == "vllm" else []
        return Evaluation(
            created=self._created,
            versions=stamp.versions(*packages),
            settings=self._settings,
            text=self._text,
            columns=list(self._columns.values()),
            averages=[
                AverageUsed(group.average, group.name, [c.name for c in group.columns])
                for group in self._plan.averages
                if group.average is not None
            ],
            methods=dict(self._methods),
        )
