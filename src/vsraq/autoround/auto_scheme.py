# SPDX-License-Identifier: Apache-2.0
"""Measured damage as a method of AutoRound's AutoScheme.

    AutoScheme(avg_bits=4.0, options="W3A16,W4A16,W8A16", method="vsraq")

`avg_bits` is what AutoScheme means by it: the mean over the layers that are quantized,
with or without their scales (`ignore_scale_zp_bits`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from auto_round.auto_scheme.utils import compute_layer_bits, parse_shared_layers
from auto_round.schemes import QuantizationScheme, scheme_to_preset_name
from auto_round.utils.device_manager import get_major_device
from auto_round.utils.offload import OffloadManager
from torch import Tensor, nn

from vsraq.autoround.checks import check_stream
from vsraq.autoround.planning import (
    find_candidates,
    make_plan,
    scheme_fields,
)
from vsraq.autoround.planning_tokens import token_batches
from vsraq.autoround.unit_damage import MeasuredModel, SchemeFields
from vsraq.bits.engines import get_engine
from vsraq.bits.limits import Sizes, smallest
from vsraq.bits.units import find_units, merge_units

_TOKENS, _SEQLEN = 4096, 512
# what AutoRound sets on layers only after AutoScheme, and its rounding reads
_UNSET: dict[str, Any] = {
    **dict.fromkeys(QuantizationScheme.get_attributes()),
    "scale_dtype": torch.float16,
}


def choose_by_damage(
    auto_scheme: Any,
    model: nn.Module,
    quant_layer_names: Iterable[str],
    fixed_layer_scheme: Mapping[str, SchemeFields],
    dataset: str = "pile-10k",
    tokenizer: Any = None,
    device_map: Any = None,
    export_format: str | None = None,
    **_: Any,
) -> dict[str, dict[str, Any]]:
    """Choose the scheme of every layer; AutoRound calls this.

    Args:
        auto_scheme: The user's `AutoScheme`.
        model: The model, as AutoRound has prepared it.
        quant_layer_names: The layers to choose for.
        fixed_layer_scheme: Those among them that the user has fixed.
        dataset: The run's data set, for an `AutoScheme` without one.
        tokenizer: The model's.
        device_map: AutoRound's.
        export_format: The run's, if it is known.
        **_: What other methods need.

    Returns:
        The fields of each layer's scheme.

    Raises:
        ValueError: The model has no MoE router or cannot be streamed, an option is no
            preset, or no choice is within `avg_bits`.
        NotImplementedError: Its routers are not in one list of blocks.
        RuntimeError: AutoRound has broken the model before.
    """
    _check_norms(model)
    check_stream(getattr(model, "_disk_stream_index", None), torch.bfloat16)
    names = list(quant_layer_names)
    free = [n for n in _in_order(model, names) if n not in fixed_layer_scheme]
    options = [_preset(option) for option in auto_scheme.options]
    base = min(options, key=lambda n: abs(_bits(n) - auto_scheme.avg_bits))
    folder = getattr(model.config, "_name_or_path", None)
    offloader = OffloadManager(enabled=False, mode="clean", model_dir=folder)
    device = torch.device(get_major_device(device_map))
    measured = MeasuredModel.of(model, offloader, device)
    rules = get_engine(None)
    units = find_units(model, free, measured.routers, rules)
    shared = parse_shared_layers(model, auto_scheme.shared_layers)
    units = merge_units(units, shared)
    candidates = find_candidates(
        units,
        {name: {**_UNSET, **scheme_fields(base)} for name in free},
        base,
        [option for option in options if option != base],
        rules,
        export_format or "auto_round",
        own_groups=False,  # here a name is the whole scheme
    )
    count = _BitCount(model, auto_scheme.ignore_scale_zp_bits)
    weights = sum(map(count.weights, names))
    fixed = sum(count.bits(n, fields) for n, fields in fixed_layer_scheme.items())
    limit = auto_scheme.avg_bits * weights - fixed
    bits_of = {
        (unit.name, name): sum(count.bits(n, f) for n, f in schemes.items())
        for unit in units
        for name, schemes in candidates.schemes[unit.name].items()
    }
    smallest_bits = smallest(bits_of, units)[0]
    _check_average(auto_scheme.avg_bits, smallest_bits + fixed, weights, base)
    sizes = Sizes(bits_of, limit)
    seqlen = auto_scheme.seqlen or _SEQLEN
    tokens = (auto_scheme.nsamples or -(-_TOKENS // seqlen)) * seqlen
    data = auto_scheme.dataset or dataset
    batches = token_batches(data, tokenizer, tokens, seqlen, seed=42)
    planned = make_plan(measured, units, candidates, batches, sizes, {"kl": 1.0})
    chosen = {n: dict(fields) for n, fields in fixed_layer_scheme.items()}
    for unit in units:
        schemes = candidates.schemes[unit.name][planned.chosen[unit.name]]
        for layer, fields in schemes.items():
            chosen[layer] = {n: v for n, v in fields.items() if n != "scale_dtype"}
    return chosen


def _check_average(avg_bits: float, smallest: float, weights: int, base: str) -> None:
    """Refuse a mean below that of the smallest schemes."""
    if avg_bits * weights < smallest:
        least = math.ceil(1e4 * smallest / weights) / 1e4
        raise ValueError(
            f"avg_bits={avg_bits}: with the smallest schemes that each layer may have, "
            f"the mean is {least:g}; allowed is that or more; layers that are no "
            f"routed experts may have one bit fewer than {base} at most"
        )


def _check_norms(model: nn.Module) -> None:
    """Refuse a model that AutoRound has broken on the way here.

    AutoScheme removes the attributes of schemes from all modules before it calls a
    method; norms of groups (Mamba) have a `group_size` of their own.
    """
    for name, module in model.named_modules():
        parameters = getattr(type(module).__init__, "__code__", None)
        takes = parameters is not None and "group_size" in parameters.co_varnames
        if takes and not hasattr(module, "group_size"):
            raise RuntimeError(
                f"{name} ({type(module).__name__}): AutoRound's AutoScheme has removed "
                "its group_size, so the model cannot run; load it again, and use "
                "layer_config=vsraq.plan_bits(model, ...).layer_config instead"
            )


def _in_order(model: nn.Module, names: Sequence[str]) -> list[str]:
    wanted = set(names)
    return [name for name, _ in model.named_modules() if name in wanted]


def _preset(option: str | QuantizationScheme) -> str:
    """Return the name of an option."""
    name: str = scheme_to_preset_name(option)
    if not name or name.startswith("GGUF"):
        raise ValueError(
            f"options: {option}; allowed with method='vsraq' are names of AutoRound's "
            "schemes, GGUF left out"
        )
    return name


def _bits(name: str) -> int:
    bits: int = scheme_fields(name)["bits"]
    return bits


class _BitCount:
    """Bits of layers as AutoScheme counts them."""

    def __init__(self, model: nn.Module, ignore_scales: bool) -> None:
        self._model = model
        self._ignore_scales = ignore_scales

    def weights(self, name: str) -> int:
        """Weights of a layer."""
        weight: Tensor = self._model.get_submodule(name).weight  # type: ignore[assignment]
        return weight.numel()

    def bits(self, name: str, fields: SchemeFields) -> float:
        """Bits of a layer in a scheme, its scales included if the user counts them."""
        with _attributes(self._model.get_submodule(name), fields) as layer:
            bits, _ = compute_layer_bits(layer, self._ignore_scales)
        return float(bits)


@contextmanager
def _attributes(layer: nn.Module, fields: SchemeFields) -> Iterator[nn.Module]:
    """Set attributes of a layer; they are as before afterwards."""
    before = {n: vars(layer)[n] for n in fields if n in vars(layer)}
    try:
        vars(layer).update(fields)
        yield layer
    finally:
        for name in fields:
            vars(layer).pop(name, None)
        vars(layer).update(before)
