# SPDX-License-Identifier: Apache-2.0
"""Verify an export against the model that it came from; see docs/verify.md."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from tqdm import tqdm

from vsraq.checkpoint import moe
from vsraq.checkpoint.faults import CheckpointError
from vsraq.checkpoint.names import OwnNames, StoredNames
from vsraq.checkpoint.pairing import Parts, pair
from vsraq.checkpoint.plain import PlainTensors
from vsraq.checkpoint.planned import check_plan
from vsraq.checkpoint.quantized import QuantizedLayers
from vsraq.checkpoint.reader import Checkpoint
from vsraq.checkpoint.reference import Reference, open_reference, own_tensors
from vsraq.routers import Router, find_routers


@dataclass(frozen=True)
class Verification:
    """What `verify` has checked and found in order.

    Attributes:
        kind: How the quantized weights are stored: `Format.kind`, such as "int" or
            "nvfp4"; several of them with "+" between.
        quantized_layers: Layers with quantized weights.
        full_precision_layers: Linear layers that the export declares unquantized.
        routers: Routers found in full precision, equal to the reference or re-fitted.
        realigned_routers: Those among them that differ from a full-precision
            reference, in an export whose config says that routers were re-fitted. A
            tuned reference must hold the same ones, so then this is 0.
        experts: Experts found, over all layers.
        compared_weights: Dequantized weights found equal to the tuned ones; 0 if the
            reference holds no tuned weights.
        full_precision_tensors: Tensors found equal to the reference's, routers left
            out.
        planned_layers: Layers found with the schemes of the bit plan that the export
            holds; 0 without one.
    """

    kind: str
    quantized_layers: int
    full_precision_layers: int
    routers: int
    realigned_routers: int
    experts: int
    compared_weights: int
    full_precision_tensors: int
    planned_layers: int


def verify(
    path: str | Path,
    reference: nn.Module | str | Path,
    *,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Verification:
    """Check an export tensor by tensor.

    Every tensor of the original must be accounted for, and every tensor of the export
    must belong to one:

    - quantized, with all tensors of its format in the shapes that the original's shape
      and the config (bits, group size, symmetry) ask for, with scales that are finite
      and not zero, and a dequantized weight that is the original's but for rounding
      and clipping (`vsraq.checkpoint.bounds`), or, if the reference holds the tuned
      weights, those bit for bit after rounding to the reference's dtype; or
    - in full precision, equal to the original's after the cast to its own dtype:
      the original's, the config's, or float32.

    Decoder layers in full precision must be declared so in the config. Routers are in
    full precision and the reference's; their weights may differ from a full-precision
    reference's if the export's config says that routers were re-fitted
    (`realign_routers` writes it), and must then have the digests that it records. All
    experts of every MoE layer are there and complete. If the folder holds a bit plan,
    its layers have the planned schemes. Files and tensors count as the index names
    them.

    If a run rescaled or rotated weights before rounding (AWQ, a rotation), its export
    does not hold the original's weights: give the tuned model as the reference.

    Args:
        path: Folder of the export.
        reference: The model that AutoRound's `quantize()` returned (its linear layers
            hold the tuned weights), or the full-precision model, or the path or hub
            name of its checkpoint (read without loading it as a whole; a hub model
            must be on this machine already).
        trust_remote_code: As in transformers, for a reference given by path.
        progress: Whether to show a progress bar.

    Returns:
        What was checked.

    Raises:
        CheckpointError: With every fault found.
        FileNotFoundError: There is no checkpoint at `path`, or the reference is not on
            this machine.
        ValueError: The export is not quantized, its format is not supported, or the
            reference has no MoE router.
    """
    with ExitStack() as stack:
        export = stack.enter_context(Checkpoint(path))
        export.schemes  # noqa: B018  report an unreadable config first
        opened = open_reference(reference, trust_remote_code, stack)
        routers = find_routers(opened.module)
        if not routers:
            raise ValueError(
                f"reference={type(opened.module).__name__}: it has no MoE router; "
                "allowed are mixture-of-experts models"
            )
        result, faults = _verify(export, opened, routers, progress)
    faults = [*export.faults, *faults]
    if faults:
        raise CheckpointError(export.path, faults)
    return result


def _verify(
    export: Checkpoint,
    reference: Reference,
    routers: tuple[Router, ...],
    progress: bool,
) -> tuple[Verification, list[str]]:
    """Returns what is in order, and the faults."""
    module = reference.module
    stored = StoredNames(module)
    own_name = _own_names(module, stored)
    pairs = pair(export, reference)
    quantized = set(pairs.layers)
    routers = moe.in_quantized_stacks(routers, stored, quantized)
    linears = moe.linear_layers(module, routers, stored)
    exempt, layer_faults = moe.check_layers(export, linears, quantized, own_name)
    experts, expert_faults = moe.check_experts(
        module, routers, stored, quantized | exempt
    )
    names = moe.router_tensors(module, routers, stored)
    parts = Parts(reference)
    plain = PlainTensors(export, reference, parts, pairs)
    realigned, router_faults = moe.check_routers(
        export, reference, names, quantized, plain.declared
    )
    layers = QuantizedLayers(
        export, pairs, parts, own_name, moe.tuned_layers(module, stored)
    )
    checks = dict.fromkeys(pairs.quantized, layers.check)
    checks |= {p: plain.check for p in pairs.plain if p.source not in names}
    pieces = sorted(checks, key=lambda piece: piece.source)
    for piece in tqdm(pieces, "verify", disable=not progress, unit="tensor"):
        checks[piece](piece)
    layers.finish()
    config = getattr(module, "config", None)
    planned, plan_faults = check_plan(export, config, quantized, own_name)
    faults = [
        *plan_faults,
        *layer_faults.values(),
        *router_faults,
        *expert_faults,
        *moe.other_missing(pairs, names, layer_faults, expert_faults),
        *(f"{name}: belongs to nothing in the original" for name in pairs.extra),
        *layers.faults,
        *plain.faults,
    ]
    result = Verification(
        kind=_kind(export, quantized, own_name),
        quantized_layers=len(quantized),
        full_precision_layers=len(exempt),
        routers=len(routers),
        realigned_routers=realigned,
        experts=experts,
        compared_weights=layers.compared,
        full_precision_tensors=len(checks) - len(pairs.quantized),
        planned_layers=planned,
    )
    return result, faults


def _own_names(module: nn.Module, stored: StoredNames) -> OwnNames:
    return OwnNames(
        (name, stored(name))
        for name in own_tensors(module)
        # experts are stored as several, or under names of their own, and biases of
        # routers may move without the tensors beside them
        if name.endswith(".weight") and ".experts." not in name
    )


def _kind(export: Checkpoint, quantized: set[str], own_name: OwnNames) -> str:
    kinds = set()
    for layer in quantized:
        scheme = export.schemes(layer, own_name(layer))
        if scheme is not None:
            kinds.add(scheme.format.kind)
    return "+".join(sorted(kinds))
