# SPDX-License-Identifier: Apache-2.0
"""What a run needs: memory, disk and time, from the model's config alone.

docs/recipes.md says how it was checked, and what it does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from auto_round.utils.device_manager import get_ar_device

from vsraq.autoround.config import VSRAQConfig
from vsraq.realignment.logits import REFIT_BYTES
from vsraq.recipe.inspect import Inspected
from vsraq.recipe.layers import Layer
from vsraq.recipe.memory import RunMemory, Settings, graph_bytes, run_memory
from vsraq.recipe.published import published_bytes
from vsraq.recipe.recipe import Recipe
from vsraq.recipe.streaming import is_streamed

OPERATIONS_PER_SECOND = 1e14
BYTES_PER_SECOND = 4.8e11
_FORWARD, _BACKWARD = 2, 4  # operations per weight and token
_FLOAT32 = 2.5  # times the operations of 16 bits; bit plans are measured in it
_PASSES = 4  # calibration, the reference, what experts get, the next block's inputs
_RANK_BYTES = 6  # a logit that a router loss reads, and its expert


@dataclass(frozen=True)
class RunEstimate:
    """What a run needs.

    Attributes:
        memory: Peak memory by part, bytes.
        download_bytes: The model's files.
        export_bytes: All exports.
        operations: Floating-point operations of the whole run, planning included.
        traffic: Bytes that it reads and writes of weights and rounding values.
        operations_per_second: What the time supposes of matrix products.
        bytes_per_second: What it supposes of the memory.
    """

    memory: RunMemory
    download_bytes: float
    export_bytes: float
    operations: float
    traffic: float
    operations_per_second: float
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        """The time, if computing and memory traffic do not overlap."""
        computing = self.operations / self.operations_per_second
        return computing + self.traffic / self.bytes_per_second

    def __str__(self) -> str:
        """A table."""
        lines = []
        for name, parts in (("device", self.memory.device), ("host", self.memory.host)):
            if parts:
                lines += _table(f"{name} memory", parts)
        lines += _table(
            "disk", {"model": self.download_bytes, "exports": self.export_bytes}
        )
        lines.append(
            f"time: {self.seconds / 3600:.2g} h = {self.operations:.2g} operations / "
            f"{self.operations_per_second:.2g} per second + {self.traffic:.2g} bytes / "
            f"{self.bytes_per_second:.2g} per second, which are assumptions"
        )
        return "\n".join(lines)


def _table(title: str, parts: Mapping[str, float]) -> list[str]:
    rows = [f"{title}: {_gb(sum(parts.values()))}"]
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return rows + [f"  {_gb(size):>9}  {name}" for name, size in ordered if size]


def _gb(count: float) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e12 else f"{count / 1e9:.3g} GB"


def estimate(
    found: Inspected,
    *,
    operations_per_second: float = OPERATIONS_PER_SECOND,
    bytes_per_second: float = BYTES_PER_SECOND,
) -> RunEstimate:
    """Estimate what a run of a recipe needs.

    Args:
        found: The recipe and its model; see `inspect`.
        operations_per_second: What the device reaches in matrix products.
        bytes_per_second: What its memory reaches.
    """
    operations, traffic = _work(found)
    return RunEstimate(
        run_memory(tuned_layers(found), memory_settings(found)),
        published_bytes(
            found.config, found.block_layers, found.parameters, found.stored_width
        ),
        found.export_bytes,
        operations,
        traffic,
        operations_per_second,
        bytes_per_second,
    )


def tuned_layers(found: Inspected) -> list[Layer]:
    """Return the layers of what a run works on: its blocks and its output projection.

    Args:
        found: The recipe and its model.
    """
    names = {*found.tuned_blocks, *([found.head.block] if found.head else [])}
    return [layer for layer in found.layers if layer.block in names]


def memory_settings(found: Inspected) -> Settings:
    """Return what decides the memory of a recipe's run, besides its layers.

    Args:
        found: The recipe and its model.
    """
    recipe = found.recipe
    calibration = recipe.calibration
    on_cpu = _on_cpu(recipe)
    cost = found.planning_cost
    config = recipe.algorithm_config()
    ahead = isinstance(config, VSRAQConfig) and config.alignment.next_router_weight != 0
    tunes_head = found.head is not None and recipe.tunes
    # AutoRound loads a model whole to tune its output projection, or without samples
    streamed = recipe.needs_samples and not tunes_head
    streamed = streamed and is_streamed(found.config, recipe.model)
    samples = calibration.nsamples if recipe.needs_samples else 0
    loaded = found.outside if streamed else found.parameters
    return Settings(
        samples=samples,
        seqlen=calibration.seqlen,
        batch_size=min(samples, calibration.batch_size),
        hidden=found.hidden,
        tunes=recipe.tunes,
        tunes_head=tunes_head,
        streamed=streamed,
        casts=_casts(recipe, on_cpu),
        value_bytes=_width(found, on_cpu, streamed),
        on_cpu=on_cpu,
        waits_on_cpu=bool(recipe.runtime.get("low_gpu_mem_usage", False)),
        looks_ahead=ahead and bool(found.routers),
        kept_bytes=_kept_bytes(found),
        loaded_bytes=float(found.stored_width * loaded),
        export_bytes=found.export_bytes,
        plan_bytes=float(cost.state_bytes) if cost is not None else 0.0,
    )


def _on_cpu(recipe: Recipe) -> bool:
    """Whether a run tunes on the CPU; no device named means an accelerator."""
    return str(recipe.runtime.get("device_map", "")).startswith("cpu")


def _width(found: Inspected, on_cpu: bool, streamed: bool) -> int:
    """Return the bytes of a value in tuning: float32 where bfloat16 is missing.

    Blocks that are streamed keep the dtype of the files.
    """
    if not found.recipe.tunes:
        return found.stored_width
    if not _casts(found.recipe, on_cpu):
        return torch.float32.itemsize
    return found.stored_width if streamed else torch.bfloat16.itemsize


def _casts(recipe: Recipe, on_cpu: bool) -> bool:
    """Whether a run computes in 16 bits."""
    amp = bool(recipe.runtime.get("amp", True))
    return amp and (not on_cpu or bool(get_ar_device("cpu").supports_bf16()))


def _kept_bytes(found: Inspected) -> float:
    """Return what router losses and the re-fit keep of a block."""
    config = found.recipe.algorithm_config()
    if not isinstance(config, VSRAQConfig) or not found.routers:
        return 0.0
    alignment = config.alignment
    router = max(found.routers, key=lambda r: r.num_experts)
    calibration = found.recipe.calibration
    tokens = calibration.nsamples * calibration.seqlen
    ranks = 0
    if alignment.router_weight != 0:
        ranks += alignment.own_objective.ranks(router.top_k, router.num_experts)
    if alignment.next_router_weight != 0:
        ranks += alignment.next_objective.ranks(router.top_k, router.num_experts)
    kept = float(_RANK_BYTES * ranks * tokens)
    if alignment.realign_routers:
        kept += min(2 * router.num_experts * tokens, REFIT_BYTES)
    return kept


def _work(found: Inspected) -> tuple[float, float]:
    """Return the operations of a run, and the bytes that it moves."""
    recipe, config = found.recipe, found.recipe.algorithm_config()
    calibration = recipe.calibration
    tokens = calibration.nsamples * calibration.seqlen * recipe.needs_samples
    steps = config.gradient_accumulate_steps * calibration.batch_size
    tuned = config.iters * steps * calibration.seqlen
    operations = traffic = 0.0
    for layer in tuned_layers(found):
        operations += layer.weights * layer.read * _FORWARD * _PASSES * tokens
        if layer.is_quantized:
            read = layer.weights * layer.read
            operations += read * (_FORWARD + _BACKWARD) * tuned
            traffic += layer.weights * config.iters * _moved(layer)
    if memory_settings(found).looks_ahead:
        blocks = (layer for layer in tuned_layers(found) if layer is not found.head)
        before = sum(layer.weights for layer in blocks if layer.copies == 1)
        operations += before * (_FORWARD + _BACKWARD) * tuned / 2
    cost = found.planning_cost
    if cost is not None:
        operations += _FLOAT32 * cost.operations
        traffic += cost.traffic
    return operations, traffic


def _moved(layer: Layer) -> float:
    """Return what a step moves per weight: its graph twice, and its value's update."""
    width = torch.bfloat16.itemsize
    return 2 * (graph_bytes(layer.fields, width) + width) + 6 * 4
