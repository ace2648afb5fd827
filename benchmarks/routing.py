# SPDX-License-Identifier: Apache-2.0
"""What each way to keep the routing is worth: models x schemes x methods x seeds.

    python benchmarks/routing.py run                 # fill the results file
    python benchmarks/routing.py table --plot gap.png
    python benchmarks/routing.py document            # the same into docs/results.md

Every cell quantizes one model with one method on the same calibration windows and
iterations as the other methods of its seed, and compares it with full precision on
held-out text. A cell is one line of JSON in the results file; cells that are there
already are skipped, so an interrupted run continues. A seed draws the calibration
windows and is AutoRound's seed.

Models: the embedded one (Solar-Open), and a softmax-routed (Qwen3-MoE) and a hybrid one
(Nemotron-H) that `examples/train_demo_moe.py` trains on first use. W*A16 models are
evaluated as tuned, NVFP4 models from their export: AutoRound's arithmetic in memory is
not the export's. Seconds are the process's own time on a CPU, which other processes
change little, and wall time on an accelerator.
"""

import argparse
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calib_dataset import register_dataset
from datasets import Dataset
from torch import Tensor, nn

import vsraq
from vsraq.analysis import closeness
from vsraq.checkpoint import load_model
from vsraq.demo import model_path
from vsraq.demo.run import SEQLEN, load_tokenizer, token_windows
from vsraq.realignment import realign_routers

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "out" / "models"
RESULTS = Path(__file__).with_name("routing.jsonl")
DOCUMENT = ROOT / "docs" / "results.md"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"
TRAINING = {
    "qwen3_moe": ["--architecture", "qwen3_moe"],
    "nemotron_h": ["--architecture", "nemotron_h"],
}
MODELS = ("solar_open", *TRAINING)
SCHEMES = ("W4A16", "W3A16", "W2A16", "NVFP4")
SUMMARY_SCHEMES = ("W4A16", "W3A16", "NVFP4")
SEEDS = (0, 1, 2)
BATCH = 8
TAUS = (1e-6, 1e-5, 1e-3, 1e-2, 1e-1)
DATASET = "vsraq-benchmark"

# name -> arguments of VSRAQConfig; None is round-to-nearest, {} plain AutoRound
OWN = {
    "TopK-MSE": {"objective": "topk_mse"},
    "VSRAQ": {"objective": "vsraq"},
    "Top-3K MSE": {"objective": "top3k_mse"},
    "router KL": {"objective": "router_kl"},
    "pairwise margin": {"objective": "pairwise_margin"},
}
METHODS: dict[str, dict[str, Any] | None] = {"RTN": None, "AutoRound": {}}
for _name, _objective in OWN.items():
    METHODS[_name] = _objective | {"router_weight": 0.1}
    METHODS[f"{_name}, auto"] = _objective | {"router_weight": "auto"}
METHODS["pairwise margin, next"] = OWN["pairwise margin"] | {
    "router_weight": 0.0,
    "next_router_weight": "auto",
}
METHODS["pairwise margin, both"] = OWN["pairwise margin"] | {
    "router_weight": "auto",
    "next_router_weight": "auto",
}
METHODS["Top-3K MSE, both"] = OWN["Top-3K MSE"] | {
    "router_weight": "auto",
    "next_router_weight": "auto",
}
REFIT = " + re-fit"
DEFAULT = "Top-3K MSE, both" + REFIT  # VSRAQConfig() without arguments
for _name in list(METHODS):
    METHODS[_name + REFIT] = METHODS[_name]
GRID = tuple(METHODS)

# single questions, asked only by name
_BOTH = METHODS["Top-3K MSE, both"] or {}
_RATIOS = {f"both, ratio {r}": _BOTH | {"auto_ratio": r} for r in (0.1, 0.3, 2.0, 4.0)}
_INPUT = {"next_router_objective": "input_mse"}
EXPERIMENTS: dict[str, dict[str, Any]] = _RATIOS | {
    "both, next input": _BOTH | _INPUT,
    "both, boundary": _BOTH | {"realign_routers": {"weighting": "boundary"}},
    "both, norms": _BOTH | {"enable_norm_bias_tuning": True},
    "next": {"objective": "top3k_mse", "next_router_weight": "auto"},
    "norms": {"enable_norm_bias_tuning": True},
    "two blocks": {"nblocks": 2},
    "boundary": {"realign_routers": {"weighting": "boundary"}},
    "both, selection": _BOTH | {"rank_by": "selection"},
    "both, selected tokens": _BOTH | {"token_selection": True},
    "top 3K": {"realign_routers": {"weighting": "top_3k"}},
    "ridge 1e-4": {"realign_routers": {"ridge": 1e-4}},
    "ridge 1e-2": {"realign_routers": {"ridge": 1e-2}},
    "both, next fixed 0.1": _BOTH | {"next_router_weight": 0.1},
    "both, next fixed 10": _BOTH | {"next_router_weight": 10.0},
}
METHODS |= {_name + REFIT: _options for _name, _options in EXPERIMENTS.items()}
METHODS["norms"] = EXPERIMENTS["norms"]
# Ranked by the selection, and Selective Router Alignment: with and without re-fit.
_SELECTED = {
    "Top-3K MSE, selection": OWN["Top-3K MSE"] | {"rank_by": "selection"},
    "margin": {"objective": "margin"},
    "margin, selection": {"objective": "margin", "rank_by": "selection"},
    "RA": {"objective": "ra"},
    "SRA": {"objective": "sra"},
    "SRA, top-K": {"objective": "topk_mse", "token_selection": True},
    "SRA, top-2K": {"objective": "top2k_mse", "token_selection": True},
    "SRA, all experts": {"objective": "full_mse", "token_selection": True},
    "MSE + KL": {"objective": "mse_kl"},
    **{
        f"SRA, tau {t:g}": {"objective": "sra", "token_selection": {"tau": t}}
        for t in TAUS
    },
}
for _name, _options in _SELECTED.items():
    METHODS[_name] = METHODS[_name + REFIT] = _options | {"router_weight": "auto"}


@dataclass(frozen=True)
class Cell:
    """One run; its fields are the key of its line in the results file."""

    model: str
    weights: str  # hash of the model's file: a model trained anew is another model
    scheme: str
    method: str
    options: str  # what the method's name meant when the cell was run
    seed: int
    iters: int
    nsamples: int
    windows: int
    device: str


def bench_model_path(name: str) -> Path:
    path = model_path() if name == "solar_open" else BUILT / name
    if not path.exists():
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "examples" / "train_demo_moe.py"),
                *TRAINING[name],
                "--output",
                str(path),
            ],
            check=True,
        )
    return path


def load_bench_model(name: str) -> nn.Module:
    return load_model(bench_model_path(name), dtype=torch.float32)


def weights_hash(name: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(bench_model_path(name).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def calibration_windows(count: int, seed: int) -> Tensor:
    pool = token_windows(load_tokenizer(), "calibration", None)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:count]]


def register_windows(windows: Tensor, name: str = DATASET) -> str:
    """The windows as a named data set of AutoRound's.

    Given as tensors they would get a mask that hides every end-of-text token (it is
    the padding token too), and hybrids cannot take a mask at all.
    """

    def load(*_: Any, **__: Any) -> Dataset:
        masks = torch.ones_like(windows).tolist()
        return Dataset.from_dict(
            {"input_ids": windows.tolist(), "attention_mask": masks}
        )

    register_dataset(name)(load)
    return name


def heldout_texts(windows: int) -> dict[str, Sequence[Tensor]]:
    tokenizer = load_tokenizer()
    texts = {"heldout": token_windows(tokenizer, "heldout", windows).split(BATCH)}
    if WIKITEXT.exists():
        text = next(iter(sorted(WIKITEXT.glob("*test*")))).read_text()
        ids = torch.tensor(tokenizer(text[: windows * SEQLEN * 8])["input_ids"])
        count = min(windows, len(ids) // SEQLEN)
        texts["wikitext"] = ids[: count * SEQLEN].view(count, SEQLEN).split(BATCH)
    return texts


def config_of(method: str, iters: int) -> Any:
    arguments = METHODS[method]
    if arguments is None:
        return "rtn"
    refit = method.endswith(REFIT)
    if "router_weight" not in arguments and not refit:
        return SignRoundConfig(iters=iters, **arguments)
    parts = {"router_weight": 0.0, "realign_routers": refit}
    return vsraq.VSRAQConfig(iters=iters, **parts | arguments)


@functools.cache
def options_of(method: str) -> str:
    """What a method means, defaults of the library that take part included."""
    options: dict[str, Any] = {"arguments": METHODS[method]}
    config = config_of(method, 1)
    if isinstance(config, vsraq.VSRAQConfig):
        # objectives stand below, by their text; the others do not change the weights
        left_out = {"objective", "next_router_objective"}
        left_out |= {"min_tokens_per_expert", "on_unreached"}
        own = config.alignment.plain()
        options["alignment"] = {n: v for n, v in own.items() if n not in left_out}
        options["objective"] = str(config.alignment.own_objective)
        options["next_router_objective"] = str(config.alignment.next_objective)
    return json.dumps(options, sort_keys=True)


def layer_config(scheme: str) -> dict[str, Any]:
    # down_proj reads 32 features; AutoRound's groups of 128 then are that one group,
    # but loaders of exports take the number literally.
    return {} if scheme == "NVFP4" else {"down_proj": {"group_size": 32}}


def reset_peak_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float | None:
    """MiB since the reset: of the accelerator, else of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    if platform.system() != "Linux":
        return None
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def autoround_run(
    model: str, scheme: str, config: Any, samples: Tensor, *, seed: int, device: str
) -> AutoRound:
    return AutoRound(
        load_bench_model(model),
        tokenizer=load_tokenizer(),
        scheme=scheme,
        alg_configs=config,
        dataset=register_windows(samples),
        nsamples=len(samples),
        seqlen=SEQLEN,
        batch_size=BATCH,
        seed=seed,
        device_map=device,
        layer_config=layer_config(scheme),
        enable_torch_compile=False,
        **({"disable_opt_rtn": True} if config == "rtn" else {}),
    )


def reload_export(run: AutoRound, folder: Path) -> nn.Module:
    _, path = run.save_quantized(
        folder / "export", format="auto_round", inplace=False, return_folders=True
    )
    return load_model(path, dtype=torch.float32)


def run_cell(
    cell: Cell,
    fp_model: nn.Module,
    texts: dict[str, Sequence[Tensor]],
    folder: Path,
) -> dict[str, Any]:
    device = cell.device
    samples = calibration_windows(cell.nsamples, cell.seed)
    config = config_of(cell.method, cell.iters)
    run = autoround_run(
        cell.model, cell.scheme, config, samples, seed=cell.seed, device=device
    )
    reset_peak_memory(device)
    clock = time.process_time if device == "cpu" else time.monotonic
    started = clock()
    q_model, _ = run.quantize()
    seconds = clock() - started
    mask = getattr(run.alg_composer.block_quantizer, "token_mask", None)
    memory = peak_memory(device)
    if cell.scheme == "NVFP4":
        q_model = reload_export(run, folder)
    else:
        q_model = q_model.cpu().float()
    if config == "rtn" and cell.method.endswith(REFIT):
        started = clock()
        realign_routers(q_model, fp_model, list(samples.split(1)))
        seconds += clock() - started
    result = asdict(cell) | {"seconds": seconds, "peak_mib": memory}
    if mask is not None:
        result["selected_tokens"] = mask.share
    for name, batches in texts.items():
        result[name] = asdict(closeness(q_model, fp_model, batches))
    return result


def grid(arguments: argparse.Namespace) -> Iterator[Cell]:
    hashes = {model: weights_hash(model) for model in arguments.models}
    for seed in arguments.seeds:
        for model in arguments.models:
            for scheme in arguments.schemes:
                for method in arguments.methods:
                    yield Cell(
                        model,
                        hashes[model],
                        scheme,
                        method,
                        options_of(method),
                        seed,
                        arguments.iters,
                        arguments.nsamples,
                        arguments.windows,
                        arguments.device,
                    )


def read_results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several workers write it
        file.write(json.dumps(result) + "\n")


def key(result: dict[str, Any]) -> Cell:
    return Cell(**{name: result[name] for name in Cell.__dataclass_fields__})


def run_cells(arguments: argparse.Namespace) -> None:
    cells = list(grid(arguments))
    fp_models: dict[str, nn.Module] = {}
    texts = heldout_texts(arguments.windows)
    os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="vsraq-bench-"))
    for index, cell in enumerate(cells):
        if index % arguments.workers != arguments.worker:
            continue
        if any(key(result) == cell for result in read_results(arguments.results)):
            continue
        if cell.model not in fp_models:
            fp_models[cell.model] = load_bench_model(cell.model)
        fp_model = fp_models[cell.model]
        with tempfile.TemporaryDirectory(prefix="vsraq-bench-") as folder:
            result = run_cell(cell, fp_model, texts, Path(folder))
        append(arguments.results, result)
        own = result["heldout"]
        jaccard = statistics.mean(own["jaccard"].values())
        print(
            f"[{index + 1}/{len(cells)}] {cell.model} {cell.scheme} {cell.method} "
            f"seed {cell.seed}: Jaccard {jaccard:.4f}, KL {own['kl']:.4f}, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )


def start_workers(arguments: argparse.Namespace) -> None:
    """The same command once per worker, each with its share of the cells."""
    for model in arguments.models:
        bench_model_path(model)  # train once, before the workers would all do it
    base = [sys.executable, *sys.argv]
    processes = [
        subprocess.Popen([*base, "--worker", str(worker)])
        for worker in range(arguments.workers)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")


def figures(
    results: Iterable[dict[str, Any]], text: str
) -> dict[Cell, dict[str, float]]:
    return {
        key(result): {
            "Jaccard": statistics.mean(result[text]["jaccard"].values()),
            "KL": result[text]["kl"],
            "perplexity": result[text]["perplexity"],
            "seconds": result["seconds"],
            "MiB": result["peak_mib"] or math.nan,
        }
        for result in results
        if text in result
    }


def closed(value: float, plain: float, best: float) -> float:
    """Share of AutoRound's gap to full precision that is closed."""
    return (value - plain) / (best - plain)


@dataclass
class Row:
    """One method in one model and scheme, over the seeds."""

    jaccard: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)  # beyond AutoRound's, nats
    jaccard_closed: list[float] = field(default_factory=list)
    kl_closed: list[float] = field(default_factory=list)
    time_ratio: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)


def rows(
    results: Iterable[dict[str, Any]], text: str, iters: int, nsamples: int
) -> dict[tuple[str, str, str], Row]:
    values = {
        cell: own
        for cell, own in figures(results, text).items()
        if (cell.iters, cell.nsamples) == (iters, nsamples)
    }
    sources = {(c.model, c.weights, c.windows, c.device) for c in values}
    if len(sources) > len({model for model, *_ in sources}):
        raise ValueError(
            "the results are of several trainings of a model, several numbers of "
            f"held-out windows or several devices: {sorted(sources)}; allowed is one "
            "of each per model, so keep them in several files (--results)"
        )
    table: dict[tuple[str, str, str], Row] = defaultdict(Row)
    for cell, own in values.items():
        if METHODS.get(cell.method, ...) is ... or cell.options != options_of(
            cell.method
        ):
            continue  # of a method that has changed since
        as_plain = {"method": "AutoRound", "options": options_of("AutoRound")}
        plain = values.get(replace(cell, **as_plain))
        if plain is None:
            continue
        row = table[cell.model, cell.scheme, cell.method]
        row.jaccard.append(own["Jaccard"])
        row.kl.append(own["KL"])
        row.perplexity.append(own["perplexity"])
        row.nll.append(math.log(own["perplexity"] / plain["perplexity"]))
        row.jaccard_closed.append(closed(own["Jaccard"], plain["Jaccard"], 1.0))
        row.kl_closed.append(closed(own["KL"], plain["KL"], 0.0))
        row.time_ratio.append(own["seconds"] / plain["seconds"])
        row.mib.append(own["MiB"])
    return table


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    mean = statistics.mean(values) * scale
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    half = (max(values) - min(values)) / 2 * scale
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def format_table(table: dict[tuple[str, str, str], Row]) -> str:
    """Per model and scheme, the methods in the order of METHODS; mean ± half range."""
    lines = [
        "| model | scheme | method | Jaccard | gap closed % | KL | gap closed % | "
        "perplexity | time ratio | MiB | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for scheme in SCHEMES:
            for method in METHODS:
                row = table.get((model, scheme, method))
                if row is None:
                    continue
                lines.append(
                    f"| {model} | {scheme} | {method} | {spread(row.jaccard, 4)} | "
                    f"{spread(row.jaccard_closed, 1, 100)} | {spread(row.kl, 4)} | "
                    f"{spread(row.kl_closed, 1, 100)} | {spread(row.perplexity, 2)} | "
                    f"{statistics.median(row.time_ratio):.2f} | "
                    f"{statistics.median(row.mib):.0f} | {len(row.jaccard)} |"
                )
    return "\n".join(lines)


def format_summary(
    table: dict[tuple[str, str, str], Row], schemes: Sequence[str]
) -> str:
    """Gap closed, mean over models and schemes, and the cells that got worse.

    A cell is worse than AutoRound beyond the spread where even the best of its seeds
    closes less than nothing, in Jaccard or in KL.
    """
    cells = {(m, s) for m, s, _ in table if s in schemes}
    lines = [
        f"| method | Jaccard gap closed % | KL gap closed % | worst cell Jaccard % | "
        f"worst cell KL % | worse cells | time ratio | cells of {len(cells)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        own = [table[m, s, method] for m, s in cells if (m, s, method) in table]
        if not own:
            continue
        jaccard = [statistics.mean(row.jaccard_closed) * 100 for row in own]
        kl = [statistics.mean(row.kl_closed) * 100 for row in own]
        ratio = statistics.median([r for row in own for r in row.time_ratio])
        worse = sum(max(r.jaccard_closed) < 0 or max(r.kl_closed) < 0 for r in own)
        lines.append(
            f"| {method} | {statistics.mean(jaccard):.1f} | {statistics.mean(kl):.1f} "
            f"| {min(jaccard):.1f} | {min(kl):.1f} | {worse} | {ratio:.2f} | "
            f"{len(own)} |"
        )
    return "\n".join(lines)


def format_likelihood(results: Sequence[dict[str, Any]]) -> str:
    """Next-token loss beyond AutoRound's of the same seed, by calibration windows."""
    lines = [
        "| method | calibration windows | held-out text | WikiText-2 | cells |",
        "|---|---|---|---|---|",
    ]
    tables = {
        (nsamples, text): run_everywhere(
            rows(results, text, 50, nsamples), SUMMARY_SCHEMES
        )
        for nsamples in (32, 128)
        for text in ("heldout", "wikitext")
    }
    for method in METHODS:
        for nsamples in (32, 128):
            cells = [
                [
                    statistics.mean(row.nll)
                    for (_, scheme, name), row in tables[nsamples, text].items()
                    if name == method and scheme in SUMMARY_SCHEMES
                ]
                for text in ("heldout", "wikitext")
            ]
            if method in ("RTN", "AutoRound") or not all(cells):
                continue
            shown = [
                f"{statistics.mean(values):+.4f} ± "
                f"{statistics.stdev(values) / math.sqrt(len(values)):.4f}"
                for values in cells
            ]
            lines.append(
                f"| {method} | {nsamples} | {' | '.join(shown)} | {len(cells[0])} |"
            )
    return "\n".join(lines)


def run_everywhere(
    table: dict[tuple[str, str, str], Row], schemes: Sequence[str]
) -> dict[tuple[str, str, str], Row]:
    """The rows of the methods that were run in every cell of these schemes."""
    cells = {(m, s) for m, s, _ in table if s in schemes}
    return {
        (model, scheme, method): row
        for (model, scheme, method), row in table.items()
        if all((*cell, method) in table for cell in cells)
    }


def format_selected(results: Iterable[dict[str, Any]]) -> str:
    """Which share of the calibration tokens SRA's cells aligned their routers on."""
    shares: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for result in results:
        if "selected_tokens" in result:
            options = METHODS.get(result["method"]) or {}
            given = options.get("token_selection")
            tau = f"{given['tau'] if isinstance(given, dict) else 1e-4:g}"
            key_ = result["model"], result["scheme"], tau
            shares[key_].append(100 * result["selected_tokens"])
    lines = ["| model | scheme | tau | selected tokens % |", "|---|---|---|---|"]
    for model in MODELS:
        for scheme in SCHEMES:
            taus = {t for m, s, t in shares if (m, s) == (model, scheme)}
            for tau in sorted(taus, key=float):
                mean = statistics.mean(shares[model, scheme, tau])
                lines.append(f"| {model} | {scheme} | {tau} | {mean:.1f} |")
    return "\n".join(lines)


def document_parts(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The tables of the document, by the markers in front of them."""
    few = rows(results, "heldout", 50, 32)
    many = rows(results, "heldout", 50, 128)
    other_text = rows(results, "wikitext", 50, 32)
    everywhere = run_everywhere(few, SUMMARY_SCHEMES)
    return {
        "headline": format_summary(everywhere, SUMMARY_SCHEMES),
        "summary": format_summary(few, SUMMARY_SCHEMES),
        "summary, 128 windows": format_summary(many, SUMMARY_SCHEMES),
        "summary, WikiText-2": format_summary(other_text, SUMMARY_SCHEMES),
        "table": format_table(few),
        "table, 128 windows": format_table(many),
        "table, 200 iterations": format_table(rows(results, "heldout", 200, 128)),
        "likelihood": format_likelihood(results),
        "selected": format_selected(results),
    }


def write_document(path: Path, parts: Mapping[str, str]) -> None:
    """Put each table behind its marker, up to the next blank line."""
    text = path.read_text()
    for name, table in parts.items():
        marker = f"<!-- {name} -->\n"
        before, behind = text.split(marker)
        _, blank, rest = behind.partition("\n\n")
        text = before + marker + table + (blank or "\n") + rest
    path.write_text(text)


def plot(table: dict[tuple[str, str, str], Row], path: Path) -> None:
    """The gap closed by every method that was measured on each of the models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [
        (m, s) for m in MODELS for s in SUMMARY_SCHEMES if (m, s, "AutoRound") in table
    ]
    methods = [
        method
        for method in METHODS
        if method not in ("RTN", "RTN" + REFIT, "AutoRound")
        and {model for model, _ in cells}
        == {model for model, _, name in table if name == method}
    ]
    figure, axes = pyplot.subplots(
        1,
        len(cells),
        figsize=(2 + 1.5 * len(cells), 1 + 0.3 * len(methods)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, (model, scheme) in zip(axes[0], cells, strict=True):
        for y, method in enumerate(methods):
            row = table.get((model, scheme, method))
            if row is None:
                continue
            for values, color, shift in (
                (row.jaccard_closed, "tab:blue", -0.15),
                (row.kl_closed, "tab:orange", 0.15),
            ):
                shares = [v * 100 for v in values]
                axis.plot(
                    shares, [y + shift] * len(shares), ".", color=color, alpha=0.4
                )
                axis.plot(statistics.mean(shares), y + shift, "|", color=color, ms=10)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(f"{model}\n{scheme}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].set_yticks(range(len(methods)), methods, fontsize=7)
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        "share of AutoRound's gap to full precision that is closed, % "
        "(blue: Jaccard, orange: KL; dots: seeds)",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="fill the results file")
    run.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    run.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    run.add_argument("--methods", nargs="+", default=GRID, choices=METHODS)
    run.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    run.add_argument("--windows", type=int, default=64, help="held-out windows")
    run.add_argument("--device", default="cpu")
    run.add_argument("--workers", type=int, default=1, help="processes side by side")
    run.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    table = commands.add_parser("table", help="print the results")
    table.add_argument("--text", default="heldout", choices=["heldout", "wikitext"])
    table.add_argument("--plot", type=Path)
    table.add_argument("--summary-schemes", nargs="+", default=SUMMARY_SCHEMES)
    document = commands.add_parser("document", help="write the results down")
    document.add_argument("--path", type=Path, default=DOCUMENT)
    for command in (run, table):
        command.add_argument("--iters", type=int, default=50)
        command.add_argument("--nsamples", type=int, default=32)
    for command in (run, table, document):
        command.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.command == "run":
        if arguments.workers > 1 and arguments.worker is None:
            start_workers(arguments)
        else:
            arguments.worker = arguments.worker or 0
            run_cells(arguments)
    elif arguments.command == "document":
        write_document(arguments.path, document_parts(read_results(arguments.results)))
    else:
        table = rows(
            read_results(arguments.results),
            arguments.text,
            arguments.iters,
            arguments.nsamples,
        )
        print(format_table(table), "\n")
        print(format_summary(table, arguments.summary_schemes), "\n")
        print(format_selected(read_results(arguments.results)))
        if arguments.plot:
            plot(table, arguments.plot)
