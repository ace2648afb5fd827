# SPDX-License-Identifier: Apache-2.0
"""The command `vsraq evaluate`: its arguments, and its run."""

import argparse
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from vsraq.argument_types import named_path, positive
from vsraq.compare_command import analysis_console

_TASKS = """tasks:
  wikitext2          perplexity of tokens, as in papers on quantization
  vsraq_likelihood   ARC-C, ARC-E, BoolQ, HellaSwag, MMLU, PIQA, TruthfulQA, WinoGrande
  vsraq_generation   MMLU-Pro, GPQA-Diamond, GSM8K
  sra_generation     AIME24 and AIME25 (pass@4), GPQA-Diamond, MMLU-Pro
  and every task, group and tag of lm-eval (`lm-eval ls tasks`). All but wikitext2 need
  the extra vsraq[evaluate]; docs/evaluate.md says how each is run.
"""


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Add the command to what `add_subparsers` returned."""
    evaluate: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="perplexity and task scores of models, as a table",
        epilog=_TASKS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluate.add_argument
    add("model", metavar="MODEL", help="a model or an export: a folder, or its name")
    add("--name", help="of MODEL in the table (default: full precision, or its folder)")
    add(
        "--method",
        type=named_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another one, with a name for the table; several times",
    )
    add(
        "--tasks",
        type=lambda text: [name for name in text.split(",") if name],
        default=["wikitext2"],
        metavar="NAME,...",
        help="see below (default: wikitext2)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the results")
    _add_run_options(evaluate)
    return evaluate


def _add_run_options(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add(
        "--wikitext2",
        metavar="PATH",
        help="WikiText-2's raw test split, a file or folder (default: the data set of "
        "Hugging Face)",
    )
    add("--seqlen", type=int, help="tokens of its windows (default: 2048, at most)")
    add("--backend", choices=("hf", "vllm"), help="what runs models (default: hf)")
    add("--batch-size", type=positive, help="sequences at once (default: 8)")
    add(
        "--limit",
        type=positive,
        help="only so many documents of each task; the table says so",
    )
    add("--num-fewshot", type=int, help="examples in the prompt (default: the task's)")
    add(
        "--max-gen-toks",
        type=positive,
        help="tokens of an answer (default: the paper's, or the task's)",
    )
    add(
        "--samples",
        type=positive,
        help="answers to each question of sra_generation (default: the paper's)",
    )
    add(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with tasks of your own; several times",
    )
    add(
        "--apply-chat-template",
        action="store_true",
        help="send prompts through the model's chat template",
    )
    add(
        "--think-end-token", metavar="TOKEN", help="such as </think>: cut off before it"
    )
    add("--dtype", help="such as float32 (default: that of the checkpoint)")
    add("--device", help="such as cuda:0, or auto (default: the CPU)")
    add("--trust-remote-code", action="store_true", help="run code of the models")


_PASSED_ON = (
    *("wikitext2", "seqlen", "backend", "batch_size", "limit", "num_fewshot"),
    *("max_gen_toks", "samples", "include_path", "apply_chat_template"),
    *("think_end_token", "dtype", "device", "trust_remote_code"),
)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate the models, print the table, and return the exit status."""
    from vsraq.analysis.sources import ModelSource
    from vsraq.evaluation import evaluate
    from vsraq.evaluation.models import name_of

    name = arguments.name or name_of(ModelSource("MODEL", arguments.model))
    models = {name: arguments.model}
    for name, path in arguments.method:
        if name in models:
            raise ValueError(f"--method {name}=...: allowed is each name once")
        models[name] = path
    given = {option: getattr(arguments, option) for option in _PASSED_ON}
    log = _log_file(arguments.out)
    verbose = arguments.verbose
    room = "vsraq.evaluation"
    with analysis_console(log, "evaluating", verbose=verbose, room=room) as console:
        found = evaluate(
            models,
            arguments.tasks,
            arguments.out,
            progress=not verbose or sys.stderr.isatty(),
            **{option: value for option, value in given.items() if value is not None},
        )
        console.say(str(found))
    if arguments.out is not None:
        table = arguments.out / "evaluation.md"
        table.write_text(found.markdown() + "\n", encoding="utf-8")
        print(f"written to {arguments.out / 'evaluation.json'} and {table}")
    return 0


def _log_file(out: Path | None) -> Path:
    if out is not None:
        return out / "vsraq_evaluate.log"
    with NamedTemporaryFile(
        prefix="vsraq-evaluate-", suffix=".log", delete=False
    ) as file:
        return Path(file.name)
