# SPDX-License-Identifier: Apache-2.0
"""The memory that a run takes at its peak, computed from layers and sizes.

The peak is reached while the largest block is tuned: its weights, AutoRound's rounding
value of each weight (float32), and what one step keeps for its backward pass. With
`low_gpu_mem_usage`, the hidden states of all samples and the best rounding values wait
on the CPU.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vsraq.recipe.layers import Layer

_ROUNDING = 4  # AutoRound tunes in float32
_SCALES = 2 * 4  # min_scale and max_scale, per group
_STREAMS = 3  # inputs on the quantized path, and outputs on both
_HEAD_STREAMS = 2  # the output projection's inputs in full precision, and quantized
_SHARD = 5e9  # AutoRound's max_shard_size; a shard is written when it is full
# experts are rounded together up to this much: a weight and its rounding value
_FUSED = 512 * 2**20
# while layers are rounded: their values, and three results of the same size
_WHILE_ROUNDING = 4 * 4
_NORMS = 24  # values of a block per hidden unit, beside those of its linear layers


def graph_bytes(fields: Mapping[str, Any], value_bytes: int) -> float:
    """Return what rounding a weight keeps for the backward pass, bytes per weight.

    Without torch.compile, which keeps less. tests/test_recipe_estimate.py measures it
    on AutoRound's own layers.

    Args:
        fields: The scheme, by AutoRound's names.
        value_bytes: Bytes of a weight.
    """
    data_type = str(fields["data_type"])
    if "mx_fp" in data_type:
        return 52.7 + (4 if value_bytes == 2 else 0)
    if "nv_fp" in data_type:
        return 30.4 + (4 if value_bytes == 2 else 0)
    return 8.2 if data_type.startswith("int") else 8.0 + value_bytes


@dataclass(frozen=True)
class Settings:
    """What decides the memory of a run, besides its layers.

    Attributes:
        samples: Calibration samples; 0 if the model is not run.
        seqlen: Tokens of a sample.
        batch_size: Samples of a micro-batch.
        hidden: Hidden width.
        value_bytes: Bytes of a weight and an activation.
        on_cpu: Whether the run tunes on the CPU: then device and host are one.
        waits_on_cpu: `low_gpu_mem_usage`.
        looks_ahead: Whether there is a next-router loss.
        kept_bytes: What the router losses and the re-fit keep of a block.
        loaded_bytes: Weights that stay in memory: those outside of the blocks, or all.
        export_bytes: Of all exports.
        plan_bytes: Hidden states while a bit plan is made.
        tunes: Whether anything is tuned; otherwise weights are rounded to nearest.
        tunes_head: Whether the output projection is tuned, with its inputs of all
            samples.
        streamed: Whether blocks are read from disk one by one.
        casts: Whether the run computes in 16 bits; then rounding copies a block.
    """

    samples: int
    seqlen: int
    batch_size: int
    hidden: int
    value_bytes: int
    on_cpu: bool
    waits_on_cpu: bool
    looks_ahead: bool
    kept_bytes: float
    loaded_bytes: float
    export_bytes: float
    plan_bytes: float = 0.0
    tunes: bool = True
    tunes_head: bool = False
    streamed: bool = True
    casts: bool = True


@dataclass(frozen=True)
class RunMemory:
    """Peak memory by part, bytes.

    Attributes:
        device: On the accelerator; empty for a run on the CPU.
        host: On the CPU, without the process's libraries.
    """

    device: Mapping[str, float]
    host: Mapping[str, float]


def run_memory(layers: Sequence[Layer], settings: Settings) -> RunMemory:
    """Compute the peak memory of a run.

    Args:
        layers: The linear layers of the model's blocks.
        settings: See there.
    """
    blocks: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        blocks[layer.block].append(layer)
    work = _tuning if settings.tunes else _rounding
    tuning = max(
        (work(own, settings) for own in blocks.values()),
        key=lambda parts: sum(parts.values()),
        default={},
    )
    ahead = max((_ahead(own, settings) for own in blocks.values()), default=0.0)
    if settings.looks_ahead and ahead:
        tuning["next block, up to its router"] = ahead
    best = tuning.pop("best rounding values", 0.0)
    tokens = settings.samples * settings.seqlen
    streams = _STREAMS + _HEAD_STREAMS * settings.tunes_head
    states = streams * tokens * settings.hidden * settings.value_bytes
    waiting = {
        "hidden states": max(float(states), settings.plan_bytes),
        "best rounding values": best,
        "router logits": settings.kept_bytes,
    }
    host = {
        "embedding and head" if settings.streamed else "whole model": (
            settings.loaded_bytes
        ),
        "shard to be written": min(settings.export_bytes, _SHARD),
    }
    if settings.on_cpu:
        return RunMemory({}, tuning | waiting | host)
    if settings.waits_on_cpu:
        return RunMemory(tuning, waiting | host | {"block": tuning.get("block", 0.0)})
    return RunMemory(tuning | waiting, host | {"block": tuning.get("block", 0.0)})


def _tuning(block: Sequence[Layer], settings: Settings) -> dict[str, float]:
    """Return what tuning a block takes."""
    width = settings.value_bytes
    quantized = [layer for layer in block if layer.is_quantized]
    values = sum(
        layer.weights * (_ROUNDING + _SCALES / _group(layer)) for layer in quantized
    )
    graph = sum(
        # the rounded weight, and experts once more, beside each other
        layer.weights
        * (graph_bytes(layer.fields, width) + width * (1 + (layer.copies > 1)))
        for layer in quantized
    )
    return {
        "block": float(width * sum(layer.weights for layer in block)),
        "rounding values": values,
        "rounded weights of a step": graph + _working(quantized, width),
        "activations of a step": _activations(block, settings),
        "best rounding values": values,
    }


def _rounding(block: Sequence[Layer], settings: Settings) -> dict[str, float]:
    """Return what rounding a block to nearest takes."""
    width = settings.value_bytes
    quantized = [layer for layer in block if layer.is_quantized]
    largest = max((layer.weights / layer.copies for layer in quantized), default=0.0)
    copied = settings.casts or settings.streamed
    return {
        "block": copied * float(width * sum(layer.weights for layer in block)),
        "rounded weights of a layer": _WHILE_ROUNDING * largest,
    }


def _group(layer: Layer) -> int:
    group = layer.fields["group_size"]
    whole = layer.in_features
    return group if isinstance(group, int) and group > 0 else whole


def _working(quantized: Sequence[Layer], width: int) -> float:
    """Return the largest working set of layers that are rounded at once."""
    fused = (
        min(layer.weights, max(_FUSED / (width + 4), layer.weights / layer.copies))
        for layer in quantized
    )
    return _WHILE_ROUNDING * float(max(fused, default=0))


def _activations(block: Sequence[Layer], settings: Settings) -> float:
    """Return what a micro-batch keeps: inputs and outputs of linear layers, norms."""
    width = settings.value_bytes
    per_token = float(_NORMS * settings.hidden)
    for layer in block:
        used = layer.copies * layer.read
        per_token += used * width * (layer.in_features + layer.out_features)
        if layer.is_quantized and int(layer.fields.get("act_bits") or 16) < 16:
            per_token += used * layer.in_features * graph_bytes(layer.fields, width)
    return settings.batch_size * settings.seqlen * per_token


def _ahead(block: Sequence[Layer], settings: Settings) -> float:
    """Return what the way to the next router takes: no experts, half the samples."""
    before = [layer for layer in block if layer.copies == 1]
    weights = settings.value_bytes * sum(layer.weights for layer in before)
    return weights + _activations([_plain(layer) for layer in before], settings) / 2


def _plain(layer: Layer) -> Layer:
    fields = {**layer.fields, "bits": 16}
    return Layer(
        layer.name,
        layer.block,
        layer.out_features,
        layer.in_features,
        layer.copies,
        layer.read,
        fields,
    )
