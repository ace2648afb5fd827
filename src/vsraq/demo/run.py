# SPDX-License-Identifier: Apache-2.0
"""Quantize the embedded MoE with AutoRound, our default and a bit plan.

Every quantized row of the table comes from an export that was written, verified tensor
by tensor against the tuned model, and loaded again. Models are evaluated in float32.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vsraq.analysis import Comparison, compare
from vsraq.callbacks import Callback
from vsraq.checkpoint import Checkpoint, load_model, verify
from vsraq.console import RunConsole
from vsraq.demo import model_path
from vsraq.demo.text import Split, documents
from vsraq.recipe import Calibration, Method, Recipe, bit_plan, build, plan_path
from vsraq.report import write_report
from vsraq.resume.output_folder import export_folders

ITERS = 30
SEQLEN = 256
CALIBRATION_SAMPLES = 32
HELDOUT_WINDOWS = 64
BATCH = 8
COMPARISON = "compared"  # the folder beside the exports
HELDOUT_BATCH = 32  # an export's layers are dequantized once per batch
# An expert's down_proj reads 32 features. A group of 128 then is that one group of 32,
# but loaders take the number literally.
GROUPS = {"down_proj": {"group_size": 32}}
FORMATS = {"W4A16": "auto_round", "NVFP4": "auto_round,llm_compressor"}
METHODS: dict[str, tuple[Method, dict[str, object]]] = {
    "AutoRound": ("auto_round", {}),
    "default": ("vsraq", {}),
    "default + plan": ("vsraq", {}),
}
# some layers get more bits than 4 and some fewer, and the export stays as large
PLANS: dict[str, dict[str, Any]] = {
    "default + plan": {"budget": "0%", "engine": "none", "tokens": 2048}
}
ROWS = (
    ("W4A16", "AutoRound"),
    ("W4A16", "default"),
    ("W4A16", "default + plan"),
    ("NVFP4", "AutoRound"),
    ("NVFP4", "default"),
)


@dataclass(frozen=True)
class Export:
    """A row's export.

    Attributes:
        scheme: The quantization scheme.
        method: What tuned it.
        path: Its folder.
        seconds: Wall time of AutoRound's `quantize()`.
    """

    scheme: str
    method: str
    path: Path
    seconds: float

    @property
    def name(self) -> str:
        """Its name in the comparison."""
        return f"{self.scheme} {self.method}"


def load_demo_model(path: Path | None = None) -> nn.Module:
    """Load the embedded model, or an export of it, in float32 on the CPU."""
    return load_model(path or model_path(), dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the embedded model's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path())
    return tokenizer


def token_stream(tokenizer: PreTrainedTokenizerBase, split: Split) -> Tensor:
    """Return the token ids of one split, (T,), an end token after each document."""
    ids: list[int] = []
    for document in documents(split):
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    count: int | None = None,
    seqlen: int = SEQLEN,
) -> Tensor:
    """Cut windows from a split's token stream.

    Args:
        tokenizer: The model's tokenizer.
        split: Of `vsraq.demo.text`.
        count: Windows; None takes all.
        seqlen: Tokens per window.

    Returns:
        (count, seqlen), spread evenly over the split.

    Raises:
        ValueError: The split has fewer tokens than that.
    """
    ids = token_stream(tokenizer, split)
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    count = len(windows) if count is None else count
    if len(windows) < count:
        raise ValueError(
            f"count={count}: the {split} text of this Python has {len(windows)} "
            f"windows of {seqlen} tokens; allowed are that many or fewer"
        )
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def run_demo(
    output: Path | None = None,
    *,
    iters: int = ITERS,
    report: Path | None = None,
    console: RunConsole | None = None,
) -> str:
    """Run everything and format the table.

    Args:
        output: Folder to keep the exports in; None drops them.
        iters: Tuning iterations per block.
        report: The HTML report's file; None writes none.
        console: Shows how far it is; None shows nothing.

    Returns:
        The table as text, and where the report is.

    Raises:
        CheckpointError: An export is faulty.
    """
    console = RunConsole() if console is None else console
    console.phase("reading text")
    tokenizer = load_tokenizer()
    calibration = token_windows(tokenizer, "calibration", CALIBRATION_SAMPLES)
    heldout = token_windows(tokenizer, "heldout", HELDOUT_WINDOWS)
    with _folder(output) as folder:
        exports = []
        planned = list(recipes(folder, iters))
        for number, (scheme, name, recipe) in enumerate(planned, 1):
            console.phase(f"{number}/{len(planned)} {scheme} {name}")
            path, seconds = _export(recipe, tokenizer, calibration, console.callbacks)
            exports.append(Export(scheme, name, path, seconds))
        console.phase("comparing")
        compared = compare(
            model_path(),
            {export.name: export.path for export in exports},
            heldout,
            out=folder / COMPARISON,
            batch_size=HELDOUT_BATCH,
            dtype=torch.float32,
        )
        table = format_table(compared, exports)
        if report is None:
            return table
        console.phase("writing the report")
        shown = [e.path for e in exports if e.method in PLANS]
        return f"{table}\n{_write_report([folder / COMPARISON, *shown], report)}"


def _write_report(folders: list[Path], report: Path) -> str:
    """Write the report, and say where it is, or why there is none."""
    try:
        return f"report: {write_report(folders, report)}"
    except RuntimeError as error:  # a package is missing
        return f"report: none, because {error}"


def recipes(folder: Path, iters: int) -> Iterator[tuple[str, str, Recipe]]:
    """Yield the scheme, the method and the recipe of each row.

    Args:
        folder: Where the exports go.
        iters: Tuning iterations per block.
    """
    for scheme, name in ROWS:
        method, options = METHODS[name]
        yield (
            scheme,
            name,
            Recipe(
                model=str(model_path()),
                scheme=scheme,
                output=str(folder / f"{scheme}-{name.replace(' ', '')}"),
                format=FORMATS[scheme],
                method=method,
                algorithm={"iters": iters, **options},
                calibration=Calibration(
                    nsamples=CALIBRATION_SAMPLES, seqlen=SEQLEN, batch_size=BATCH
                ),
                runtime={
                    "enable_torch_compile": False,  # would need a C++ compiler
                    **({"layer_config": GROUPS} if scheme == "W4A16" else {}),
                },
                bits=PLANS.get(name),
            ),
        )


def tune(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Tensor,
    callbacks: Sequence[Callback] = (),
) -> tuple[Any, nn.Module, float]:
    """Quantize a recipe's model on token ids.

    Args:
        recipe: Its data set is not read.
        tokenizer: The model's tokenizer.
        calibration: Token ids, (samples, seqlen).
        callbacks: Hear of the run.

    Returns:
        AutoRound's run, the tuned model, and the wall time of `quantize()` in seconds,
        without the time of a bit plan.
    """
    given = {
        "tokenizer": tokenizer,
        "dataset": list(calibration.split(1)),
        "device_map": "cpu",
    }
    plan = bit_plan(recipe, load_model(recipe.model), progress=True, **given)
    model = load_model(recipe.model)
    run = build(recipe, model=model, plan=plan, callbacks=callbacks, **given)
    started = time.monotonic()
    tuned, _ = run.quantize()
    return run, tuned, time.monotonic() - started


def _export(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Tensor,
    callbacks: Sequence[Callback],
) -> tuple[Path, float]:
    """Tune, export and verify; return the export to load and the tuning time."""
    run, tuned, seconds = tune(recipe, tokenizer, calibration, callbacks)
    _, saved = run.save_quantized(
        recipe.output, format=recipe.format, inplace=False, return_folders=True
    )
    paths = export_folders(saved)
    for path in paths:
        plan = plan_path(recipe)
        if plan.is_file() and plan.parent != path:
            shutil.copy(plan, path)
        verify(path, tuned)
    # transformers loads compressed-tensors NVFP4 experts without their global scale
    # (huggingface/transformers#48371). The auto_round export loads right, and holds
    # the same numbers as the other one:
    for other in paths[1:]:
        _assert_same_weights(paths[0], other)
    return paths[0], seconds


def _assert_same_weights(first: Path, second: Path) -> None:
    with Checkpoint(first) as a, Checkpoint(second) as b:
        names = set(a)
        if names != set(b):
            raise ValueError(f"{first} and {second} hold different tensors")
        different = [n for n in names if not _same_bytes(a[n], b[n])]
    if different:
        raise ValueError(f"{first} and {second} differ in {', '.join(different)}")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="vsraq-demo-") as folder:
        yield Path(folder)


def format_table(compared: Comparison, exports: Sequence[Export]) -> str:
    """Format a comparison as a table of fixed-width columns."""
    fp = compared.full_precision
    figures = ["ppl", "KL", "Jaccard", *(f"L{i}" for i in range(len(compared.layers)))]
    ones = ["1.0000"] * (1 + len(compared.layers))
    lines = [
        ["scheme", "method", *figures, "seconds", "MiB"],
        ["bfloat16", "none", f"{fp.perplexity.value:.3f}", "0.0000", *ones, "0"],
    ]
    lines[1].append(f"{fp.mebibytes:.2f}")
    for export in exports:
        found = compared.methods[export.name]
        jaccard = [found.metrics["jaccard"]]
        jaccard += [layer.metrics["jaccard"] for layer in found.layers]
        lines.append(
            [
                export.scheme,
                export.method,
                f"{found.metrics['perplexity'].value:.3f}",
                f"{found.metrics['kl'].value:.4f}",
                *(f"{interval.value:.4f}" for interval in jaccard),
                f"{export.seconds:.0f}",
                f"{found.mebibytes:.2f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
