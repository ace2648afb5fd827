# SPDX-License-Identifier: Apache-2.0
"""What the same bytes are worth, spent in other places: models x schemes x ways.

    python benchmarks/bits.py run                  # fill the results file
    python benchmarks/bits.py table --plot out/bits.png
    python benchmarks/bits.py document             # the same into docs/results.md

Every cell quantizes one model of `benchmarks/routing.py` with one way to spend bytes,
tuned by plain AutoRound or by the default recipe, and compares it with full precision
on held-out text. A cell is one line of JSON; cells that are there are skipped.

Plans and AutoScheme choose on calibration windows that no cell is tuned on. The damage
of a model's units is measured once, for all budgets, and kept in out/plans. Budgets are
shares of the uniform export in bfloat16, as models are published. Models are evaluated
as in `benchmarks/routing.py`: W*A16 as tuned, NVFP4 from its export.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from torch import nn

import bits_tables
import routing
import vsraq
from bits_grid import (
    BUDGETS,
    PLANS,
    RECIPES,
    ROUTING,
    SCHEMES,
    WITH_HEAD,
    Budget,
    Cell,
    grid,
    key,
)
from vsraq.analysis import closeness
from vsraq.autoround import planning
from vsraq.autoround.export_sizes import ExportSizes
from vsraq.autoround.plan_bits import default_options
from vsraq.autoround.planning import Candidates, find_candidates
from vsraq.autoround.prepared_model import PreparedModel
from vsraq.bits.damage import Damage, DamageModel
from vsraq.bits.engines import get_engine
from vsraq.bits.exceptions import exceptions
from vsraq.bits.limits import Sizes as UnitSizes
from vsraq.bits.sizes import unit_bytes
from vsraq.bits.units import Unit, find_units
from vsraq.checkpoint import load_model

RESULTS = Path(__file__).with_name("bits.jsonl")
MEASURED = routing.ROOT / "out" / "plans"
PLANNING_WINDOWS = 16  # of 256 tokens
PLANNING_SEED = 100  # calibration windows of no cell's seed
PLANNING_DATASET = "vsraq-planning"


# ── sizes ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sizes:
    """The units of a model, and what they take in a bfloat16 export.

    Attributes:
        prepared: The model.
        units: Its units.
        candidates: The schemes that each unit may have under the budget's engine.
        export: What exports take.
    """

    prepared: PreparedModel
    units: tuple[Unit, ...]
    candidates: Candidates
    export: ExportSizes

    def units_bytes(self, choice: Mapping[str, str]) -> int:
        return self.export.bytes(choice) - self.export.plain

    def limit(self, budget: Budget) -> int:
        """Bytes that the units may take."""
        if budget.share is None:
            choice = dict(self.candidates.base)
            for unit in self.units:
                if not unit.is_experts:
                    choice[unit.name] = "W8A16"
            return self.units_bytes(choice)
        uniform = self.export.bytes(self.candidates.base)
        return int(uniform * (1 + budget.share / 100)) - self.export.plain

    def extra(self, budget: Budget) -> int:
        """Bytes beyond the uniform export."""
        return self.limit(budget) - self.units_bytes(self.candidates.base)


@cache
def sizes(model: str, scheme: str, engine: str | None, head: bool = False) -> Sizes:
    rules, form = get_engine(engine), export_format(scheme, engine)
    in_bfloat16 = load_model(routing.bench_model_path(model), dtype=torch.bfloat16)
    prepared = prepare(in_bfloat16, scheme, engine)
    prepared.module.bfloat16()  # a CPU without bfloat16 has made it float32
    layers = prepared.layers | (prepared.head_layer() if head else {})
    units = find_units(prepared.module, list(layers), prepared.routers, rules)
    options = default_options(scheme, rules, form)
    candidates = find_candidates(units, layers, scheme, options, rules, form)
    export = ExportSizes.of(prepared, units, candidates, form)
    return Sizes(prepared, units, candidates, export)


def prepare(model: nn.Module, scheme: str, engine: str | None) -> PreparedModel:
    arguments = {"tokenizer": routing.load_tokenizer(), **RUN}
    return PreparedModel.of(model, scheme, export_format(scheme, engine), arguments)


def export_format(scheme: str, engine: str | None) -> str:
    needs_other = scheme == "NVFP4" and engine == "vllm"
    return "llm_compressor" if needs_other else "auto_round"


RUN = {"device_map": "cpu", "enable_torch_compile": False}


# ── ways ──────────────────────────────────────────────────────────────────────


def spend(cell: Cell) -> dict[str, Any]:
    """The arguments of `AutoRound` that spend the bytes of a cell its way."""
    budget = BUDGETS[cell.budget]
    if cell.way == "uniform":
        return {}
    if cell.way.startswith("groups of"):
        return {"group_size": int(cell.way.split()[-1])}
    if cell.way == "W4A16_MIXED":
        return {"scheme": "W4A16_MIXED"}
    if cell.way in PLANS:
        return {"layer_config": plan(cell)}
    if cell.way == "AutoScheme":
        return {"scheme": auto_scheme(cell.model, cell.scheme, budget)}
    return {"layer_config": raised(cell.model, cell.scheme, budget, cell.way)}


def plan(cell: Cell) -> dict[str, Any]:
    """The exceptions of the plan with the least damage within a cell's budget."""
    budget = BUDGETS[cell.budget]
    known = sizes(cell.model, cell.scheme, budget.engine, cell.way == WITH_HEAD)
    in_float32 = routing.load_bench_model(cell.model)
    units_measured = measured(cell.model, cell.scheme, budget.engine)
    planned = planning.make_plan(
        prepare(in_float32, cell.scheme, budget.engine).model,
        known.units,
        known.candidates,
        planning_batches(),
        UnitSizes(known.export.bytes_of, known.limit(budget)),
        {"kl": 1.0, "routing": 1.0} if cell.way == ROUTING else {"kl": 1.0},
        units_measured,
    )
    return layers_of(known, planned.chosen, budget.engine)


def planning_batches() -> list[torch.Tensor]:
    return [routing.calibration_windows(PLANNING_WINDOWS, PLANNING_SEED)]


@cache
def measured(model: str, scheme: str, engine: str | None) -> planning.Measured:
    """What rounding does to a model.

    Where a budget has plans with the output head, the head is measured too. Nothing
    else changes: its own scheme is bfloat16.
    """
    head = engine is None and scheme != "NVFP4"
    known = sizes(model, scheme, engine, head)
    parts = [model, routing.weights_hash(model), scheme, engine or "any"]
    path = MEASURED / f"{'-'.join(parts)}.json"
    if not path.exists():
        prepared = prepare(routing.load_bench_model(model), scheme, engine)
        started = time.process_time()
        found = planning.measure_units(
            prepared.model, known.units, known.candidates, planning_batches()
        )
        seconds = time.process_time() - started
        print(f"{path.stem}: units measured in {seconds:.0f} CPU s", flush=True)
        lines = {
            "seconds": seconds,
            "uniform": asdict(found.uniform),
            "flip_kl": found.adding.flip_kl,
            "damages": [[*names, asdict(d)] for names, d in found.damages.items()],
        }
        MEASURED.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lines))
    lines = json.loads(path.read_text())
    damages = {(unit, name): Damage(**d) for unit, name, d in lines["damages"]}
    adding = DamageModel(lines["flip_kl"])
    return planning.Measured(damages, Damage(**lines["uniform"]), adding)


def layers_of(
    known: Sizes, choice: Mapping[str, str], engine: str | None
) -> dict[str, Any]:
    """A choice as AutoRound's `layer_config`."""
    fields = dict(known.prepared.all_layers)
    for unit in known.units:
        fields |= known.candidates.schemes[unit.name][choice[unit.name]]
    outside = known.prepared.outside(fields)
    return exceptions(
        known.units,
        fields,
        known.prepared.default,
        get_engine(engine),
        outside=outside,
    )


def auto_scheme(model: str, scheme: str, budget: Budget) -> AutoScheme:
    """AutoScheme with the same options and bytes, and an engine's rules if any."""
    known = sizes(model, scheme, budget.engine)
    options = [
        scheme,
        *default_options(scheme, get_engine(budget.engine), "auto_round"),
    ]
    weights = [
        known.prepared.module.get_submodule(n).weight for n in known.prepared.layers
    ]
    fused = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    windows = routing.calibration_windows(PLANNING_WINDOWS, PLANNING_SEED)
    return AutoScheme(
        avg_bits=8 * known.limit(budget) / sum(w.numel() for w in weights),
        options=options,
        shared_layers=fused if budget.engine else None,
        dataset=routing.register_windows(windows, PLANNING_DATASET),
        nsamples=PLANNING_WINDOWS,
        seqlen=routing.SEQLEN,
        device_map="cpu",
    )


def raised(model: str, scheme: str, budget: Budget, way: str) -> dict[str, Any]:
    """Units raised to the most bits in an order, until the bytes are spent.

    Random units are paid for, if there are no bytes, by the experts of random layers
    in one bit less.
    """
    known = sizes(model, scheme, budget.engine)
    limit = known.limit(budget)
    choice = dict(known.candidates.base)
    ordered = list(known.units)
    if way == "attention first":
        ordered = [u for u in ordered if not u.is_experts and ".mlp." not in u.name]
        ordered = [u for u in ordered if "shared" not in u.name]
    else:
        generator = random.Random(way)
        generator.shuffle(ordered)
        lower = f"W{int(scheme[1]) - 1}A16" if scheme != "NVFP4" else ""
        experts = [unit for unit in ordered if unit.is_experts]
        if limit <= known.units_bytes(choice):
            for unit in experts[: len(experts) // 2]:
                choice[unit.name] = lower
    best = "BF16" if scheme == "NVFP4" else "W8A16"
    for unit in ordered:
        if choice[unit.name] != known.candidates.base[unit.name]:
            continue
        more = choice | {unit.name: best}
        if known.units_bytes(more) <= limit:
            choice = more
    return layers_of(known, choice, budget.engine)


# ── runs ──────────────────────────────────────────────────────────────────────


def config_of(recipe: str, iters: int) -> Any:
    arguments = RECIPES[recipe]
    if arguments is None:
        return SignRoundConfig(iters=iters)
    return vsraq.VSRAQConfig(iters=iters, **arguments)


def run_cell(
    cell: Cell, fp_model: nn.Module, texts: Any, folder: Path
) -> dict[str, Any]:
    samples = routing.calibration_windows(cell.nsamples, cell.seed)
    # before the run: a second AutoRound takes the place of the first one's settings
    sizes(cell.model, cell.scheme, None, cell.way == WITH_HEAD)
    spending = spend(cell)
    started = time.process_time()
    run = AutoRound(
        routing.load_bench_model(cell.model),
        tokenizer=routing.load_tokenizer(),
        alg_configs=config_of(cell.recipe, cell.iters),
        dataset=routing.register_windows(samples),
        nsamples=len(samples),
        seqlen=routing.SEQLEN,
        batch_size=routing.BATCH,
        seed=cell.seed,
        **{"scheme": cell.scheme} | spending | RUN,
    )
    q_model, _ = run.quantize()
    seconds = time.process_time() - started
    total, active = bytes_of_run(cell, run)
    if cell.scheme == "NVFP4":
        q_model = routing.reload_export(run, folder)
    else:
        q_model = q_model.cpu().float()
    result = asdict(cell) | {"seconds": seconds, "bytes": total, "active": active}
    return result | asdict(closeness(q_model, fp_model, texts["heldout"]))


def bytes_of_run(cell: Cell, run: AutoRound) -> tuple[int, float]:
    """Bytes of the export in bfloat16, and those that a token reads."""
    known = sizes(cell.model, cell.scheme, None, cell.way == WITH_HEAD)
    total, active = known.export.plain, float(known.export.plain_active)
    for unit in known.units:
        schemes = {n: run.layer_config[n] for n in unit.layers}
        size = unit_bytes(known.prepared.module, schemes, "auto_round")
        total += size
        active += size * unit.read
    return total, active


def run_cells(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="vsraq-bench-"))
    texts = routing.heldout_texts(arguments.windows)
    fp_models: dict[str, nn.Module] = {}
    cells = list(grid(arguments))
    for index, cell in enumerate(cells):
        if any(key(r) == cell for r in routing.read_results(arguments.results)):
            continue
        if cell.model not in fp_models:
            fp_models[cell.model] = routing.load_bench_model(cell.model)
        with tempfile.TemporaryDirectory(prefix="vsraq-bench-") as folder:
            try:
                result = run_cell(cell, fp_models[cell.model], texts, Path(folder))
            except AttributeError as error:  # AutoScheme on hybrids
                if cell.way != "AutoScheme":
                    raise
                result = asdict(cell) | {"error": str(error)}
        routing.append(arguments.results, result)
        figures = "failed"
        if "error" not in result:
            jaccard = statistics.mean(result["jaccard"].values())
            figures = (
                f"Jaccard {jaccard:.4f}, KL {result['kl']:.4f}, NLL "
                f"{result['excess_nll']:+.4f}, {result['bytes'] / 2**20:.3f} MiB, "
                f"{result['seconds']:.0f} s"
            )
        print(
            f"[{index + 1}/{len(cells)}] {cell.model} {cell.scheme} {cell.budget} "
            f"{cell.way} {cell.recipe} seed {cell.seed}: {figures}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="fill the results file")
    run.add_argument("--models", nargs="+", default=routing.MODELS)
    run.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    run.add_argument("--budgets", nargs="+", choices=BUDGETS)
    run.add_argument("--ways", nargs="+")
    run.add_argument(
        "--recipes", nargs="+", default=["AutoRound", "default"], choices=RECIPES
    )
    run.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    run.add_argument("--windows", type=int, default=128, help="held-out windows")
    run.add_argument("--iters", type=int, default=50)
    run.add_argument("--nsamples", type=int, default=32)
    table = commands.add_parser("table", help="print the results")
    table.add_argument("--plot", type=Path)
    document = commands.add_parser("document", help="write the results down")
    document.add_argument("--path", type=Path, default=routing.DOCUMENT)
    for command in (run, table, document):
        command.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.command == "run":
        run_cells(arguments)
    else:
        results = routing.read_results(arguments.results)
        tables = bits_tables.tables(results)
        if arguments.command == "document":
            routing.write_document(arguments.path, tables)
        else:
            print("\n\n".join(tables.values()))
            if arguments.plot:
                bits_tables.plot(bits_tables.rows(results), arguments.plot)
