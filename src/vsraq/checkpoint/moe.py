# SPDX-License-Identifier: Apache-2.0
"""What must be true of an export's MoE layers: routers, experts, quantized layers."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vsraq.checkpoint.names import OwnNames, StoredNames, block_of
from vsraq.checkpoint.pairing import Pairs
from vsraq.checkpoint.plain import REAL, same_numbers
from vsraq.checkpoint.reader import Checkpoint
from vsraq.checkpoint.reference import Reference
from vsraq.routers import Router, count_experts


def in_quantized_stacks(
    routers: tuple[Router, ...], stored: StoredNames, quantized: set[str]
) -> tuple[Router, ...]:
    """Leave out routers of stacks without quantized layers: a vision tower, say."""
    stacks = {block_of(layer).rpartition(".")[0] for layer in quantized}
    inside = tuple(
        router
        for router in routers
        if block_of(stored(f"{router.name}.weight")).rpartition(".")[0] in stacks
    )
    return inside or routers  # if nothing is quantized, every layer is a fault


def linear_layers(
    module: nn.Module, routers: tuple[Router, ...], stored: StoredNames
) -> dict[str, tuple[str, nn.Linear]]:
    """Linear layers of the decoder blocks, routers left out.

    Returns stored name -> the module's own name and the layer.
    """
    router_names = {router.name for router in routers}
    stacks = {block_of(name).rpartition(".")[0] for name in router_names}
    layers: dict[str, tuple[str, nn.Linear]] = {}
    for name, layer in module.named_modules():
        # AutoRound wraps layers whose activations are quantized
        name = name.removesuffix(".orig_layer")
        in_block = block_of(name).rpartition(".")[0] in stacks
        if isinstance(layer, nn.Linear) and in_block and name not in router_names:
            layers[stored(f"{name}.weight").removesuffix(".weight")] = name, layer
    return layers


def tuned_layers(module: nn.Module, stored: StoredNames) -> dict[str, nn.Linear]:
    """Stored name -> layer, of the tuned layers, which AutoRound marks with `bits`."""
    names = {
        name.removesuffix(".orig_layer"): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and hasattr(layer, "bits")
    }
    return {
        stored(f"{name}.weight").removesuffix(".weight"): layer
        for name, layer in names.items()
    }


def check_layers(
    export: Checkpoint,
    linears: Mapping[str, tuple[str, nn.Linear]],
    quantized: set[str],
    own_name: OwnNames,
) -> tuple[set[str], dict[str, str]]:
    """Check that every linear layer, and every expert on disk, is quantized or exempt.

    Returns the exempt layers, and the faults by layer.
    """
    plain = {
        name.removesuffix(".weight")
        for name in export
        # the reference's fused experts are not linear layers, so look on disk
        if re.search(r"\.experts\.\d+\.", name) and name.endswith(".weight")
    }
    faults: dict[str, str] = {}
    exempt: set[str] = set()
    for name in sorted(linears.keys() | plain):
        if name in quantized:
            continue
        # AutoRound declares layers by the module's name, whatever they are stored as
        module_name, layer = linears.get(name, (own_name(name), None))
        if f"{name}.weight" not in export:
            faults[name] = f"{name}: neither a quantized nor a plain weight is there"
        elif (
            getattr(layer, "bits", 0) >= 16 or export.schemes(name, module_name) is None
        ):
            exempt.add(name)
        else:
            faults[name] = f"{name}: expected quantized, but stored in full precision"
    return exempt, faults


class Record:
    """What the export's config says about re-fitted routers."""

    def __init__(self, export: Checkpoint) -> None:
        record = export.config.get("vsraq")
        record = record if isinstance(record, dict) else {}
        digests = record.get("router_digests")
        self.realigned = bool(record.get("realign_routers"))
        self._digests: dict[str, Any] = digests if isinstance(digests, dict) else {}

    def fault(self, names: tuple[str, ...], tensor: Tensor) -> str | None:
        """What is wrong with a router that has a recorded digest, or None."""
        for name in names:
            if name in self._digests:
                if self._digests[name] == digest(tensor):
                    return None
                return (
                    f"{names[0]}: not the router that was re-fitted: its digest is not "
                    "the one that the config records; export again"
                )
        return None

    def allows(self, names: tuple[str, ...]) -> bool:
        """Whether a router may differ from a full-precision reference's."""
        recorded = not self._digests or any(name in self._digests for name in names)
        return self.realigned and recorded


def digest(tensor: Tensor) -> str:
    """`sha256:` and the digest of a tensor's bytes as they are in the file."""
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"sha256:{hashlib.sha256(octets).hexdigest()}"


def router_tensors(
    module: nn.Module, routers: tuple[Router, ...], stored: StoredNames
) -> dict[str, str]:
    """Stored name -> the module's name, of every tensor that decides the routing.

    A correction bias beside a router belongs to it.
    """
    names: dict[str, str] = {}
    for router in routers:
        for suffix in module.get_submodule(router.name).state_dict():
            module_name = f"{router.name}.{suffix}"
            names[stored(module_name)] = module_name
        if router.correction_bias is not None:
            names[stored(router.correction_bias)] = router.correction_bias
    return names


def check_routers(
    export: Checkpoint,
    reference: Reference,
    names: Mapping[str, str],
    quantized: set[str],
    declared: torch.dtype | None,
) -> tuple[int, list[str]]:
    """Check that routers are in full precision, and the reference's or recorded ones.

    Returns how many routers were re-fitted, and the faults.
    """
    record = Record(export)
    faults = []
    realigned = 0
    for name, module_name in names.items():
        if name.removesuffix(".weight") in quantized:
            faults.append(f"{module_name.rpartition('.')[0]}: the router is quantized")
            continue
        if name not in export:
            faults.append(f"{name}: missing")
            continue
        if name not in reference.shapes:
            faults.append(f"{name}: missing in the reference")
            continue
        exported, expected = export[name], reference[name]
        if exported.dtype not in REAL:
            faults.append(f"{name}: dtype {exported.dtype} is not full precision")
            continue
        if fault := record.fault((name, module_name), exported):
            faults.append(fault)
            continue
        is_weight = module_name.endswith(".weight")
        dtypes = {expected.dtype, declared}
        shapes = exported.shape == expected.shape
        if shapes and _same_router(exported, expected, dtypes, is_weight):
            continue
        if not (
            is_weight and not reference.tuned and record.allows((name, module_name))
        ):
            faults.append(
                f"{name}: differs from the reference's router ({exported.dtype} here, "
                f"{expected.dtype} there)"
            )
            continue
        realigned += 1
        if not shapes or exported.dtype not in dtypes:
            faults.append(
                f"{name}: {exported.dtype} {tuple(exported.shape)}, the reference's is "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        elif not torch.isfinite(exported).all():
            faults.append(f"{name}: a re-fitted router is not finite")
    return realigned, faults


def _same_router(
    exported: Tensor,
    expected: Tensor,
    dtypes: set[torch.dtype | None],
    is_weight: bool,
) -> bool:
    """A weight may be cast to the declared dtype, a correction bias may not."""
    if torch.equal(exported.float(), expected.float()):
        return True
    return is_weight and exported.dtype in dtypes and same_numbers(exported, expected)


def _projections(module: nn.Module, router: Router) -> set[str]:
    """Linear layers of one expert beside a router, by AutoRound's unfused names."""
    names: set[str] = set()
    parent = module.get_submodule(router.name.rpartition(".")[0])
    for name, child in parent.named_modules():
        fused = [n for n, p in child.named_parameters(recurse=False) if p.ndim == 3]
        for parameter in fused:
            halves = {"gate_up_proj": ("gate_proj", "up_proj")}
            names.update(halves.get(parameter, (parameter,)))
        if re.search(r"(^|\.)experts\.0\.", name) and isinstance(child, nn.Linear):
            names.add(re.split(r"experts\.0\.", name)[1].removesuffix(".orig_layer"))
    return names


def check_experts(
    module: nn.Module,
    routers: tuple[Router, ...],
    stored: StoredNames,
    layers: set[str],
) -> tuple[int, list[str]]:
    """Check that every expert is complete; returns their number, and the faults."""
    by_block: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for layer in layers:
        match = re.match(r"^(.+\.experts)\.(\d+)\.(.+)$", layer)
        if match:
            by_block[block_of(layer)][int(match[2])].add(match[3])
    faults: list[str] = []
    count = 0
    for router in routers:
        block = block_of(stored(f"{router.name}.weight"))
        experts = by_block.get(block)
        if not experts:
            faults.append(f"{block}: no quantized experts beside {router.name}")
            continue
        count += len(experts)
        expected = _projections(module, router).union(*experts.values())
        for index in range(count_experts(module, router)):
            missing = expected - experts.get(index, set())
            if missing:
                faults.append(
                    f"{block}: expert {index} misses {', '.join(sorted(missing))}"
                )
    return count, faults


def other_missing(
    pairs: Pairs,
    routers: Mapping[str, str],
    layers: Mapping[str, str],
    experts: list[str],
) -> list[str]:
    """Faults for missing tensors that no other fault has named yet."""
    faults = []
    for name in pairs.missing:
        layer = name.removesuffix(".weight")
        expert = re.search(r"\.experts\.(\d+)\.", name)
        known = f"{block_of(name)}: expert {expert[1]} misses" if expert else "\0"
        if name in routers or layer in layers or any(known in e for e in experts):
            continue
        faults.append(f"{name}: missing")
    return faults
