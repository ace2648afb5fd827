# SPDX-License-Identifier: Apache-2.0
"""Which engines load what a recipe exports, by the rules of `vsraq.bits.engines`.

The kernels for integers have rules for shapes, too: `verify_marlin_supports_shape` and
`check_moe_marlin_supports_layer` in
vllm/model_executor/layers/quantization/utils/marlin_utils.py of vLLM 0.33, and the same
functions in sglang/srt/layers/quantization/marlin_utils.py. No engine was run.
"""

from collections.abc import Sequence

from vsraq.bits.engines import ENGINES, Engine
from vsraq.recipe.inspect import Inspected
from vsraq.recipe.layers import Layer

_ROWS, _COLUMNS = 64, 128  # of a linear layer, multiples of
_HIDDEN, _WIDTH = 128, 64  # of experts: hidden width, and their own
# These are split by columns, if a model is split over several devices; others by rows.
_SPLIT_COLUMNS = ("o_proj", "down_proj", "out_proj", "w2")
_NOT_SPLIT = ("q_a_proj", "kv_a_proj_with_mqa")  # every device has the whole of these


def why_not_served(engine: Engine, found: Inspected, split: int = 1) -> str:
    """Say why an engine does not load a recipe's export, or return "".

    Args:
        engine: The engine.
        found: The recipe and its model.
        split: Over how many devices it splits each layer (tensor parallelism).
    """
    quantized = [layer for layer in found.layers if layer.is_quantized]
    for form in found.recipe.formats:
        for layer in quantized:
            reason = engine.why_not(layer.fields, form) or (
                _why_not_shape(layer, split) if engine.int_groups else ""
            )
            if reason:
                return reason
    return ""


def served_by(found: Inspected) -> dict[str, str]:
    """Return why each engine does not load a recipe's export, "" if it does."""
    return {name: why_not_served(engine, found) for name, engine in ENGINES.items()}


def _why_not_shape(layer: Layer, split: int) -> str:
    """Say why the engines' kernels do not take an integer layer, or return ""."""
    if "int" not in str(layer.fields["data_type"]):
        return ""
    part = layer.name.rpartition(".")[2]
    by_columns = part in _SPLIT_COLUMNS
    split = 1 if part in _NOT_SPLIT else split
    rows = layer.out_features // (1 if by_columns else split)
    columns = layer.in_features // (split if by_columns else 1)
    group = int(layer.fields["group_size"])
    whole = columns % group == 0 if 0 < group < layer.in_features else True
    if layer.copies > 1:
        hidden, width = (rows, columns) if by_columns else (columns, rows)
        fits = hidden % _HIDDEN == 0 and width % max(_WIDTH, group) == 0
    else:
        fits = rows % _ROWS == 0 and columns % _COLUMNS == 0
    if fits and whole:
        return ""
    parts = f" on each of {split} devices" if split > 1 else ""
    return (
        f"its kernels take no {rows} x {columns} weights in groups of {group}{parts} "
        f"({layer.name})"
    )


def describe_serving(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each engine."""
    return [
        f"{name} loads it" if not reason else f"{name} does not load it: {reason}"
        for name, reason in reasons
    ]
