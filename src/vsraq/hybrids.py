# SPDX-License-Identifier: Apache-2.0
"""The attention mask of models with several kinds of decoder layers.

AutoRound replays the keyword arguments of the first block into every block. In a
hybrid (Nemotron-H, LFM2-MoE, Jamba) the first block is a Mamba or convolution layer
and gets the mask of padding, (B, S) integers. Attention cannot take that, so the run
would crash at its first attention block.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def layer_kinds(model: nn.Module, block_names: Sequence[str]) -> tuple[str, ...]:
    """Return the kind of each decoder block, from the model's config or classes."""
    config = getattr(model, "config", None)
    for attribute in ("layers_block_type", "layer_types"):
        kinds = getattr(config, attribute, None)
        if kinds and len(kinds) == len(block_names):
            return tuple(kinds)
    return tuple(type(model.get_submodule(name)).__name__ for name in block_names)


def adapt_attention_mask(
    model: nn.Module, block_names: Sequence[str], cached: dict[str, Any]
) -> None:
    """Change the cached mask of a hybrid to one that every layer can take.

    Where only the end of a sample is masked, the mask is dropped: every layer is
    causal, so nothing before the masked tokens changes, and AutoRound leaves those out
    of its loss by their token ids. No other mask can be given to all layers.

    Args:
        model: The model.
        block_names: The blocks that the arguments are replayed into.
        cached: The keyword arguments of the first of them; changed in place.

    Raises:
        ValueError: The model is a hybrid and calibration samples are padded elsewhere
            than at their end, or its attention is not causal without a mask.
    """
    masks = cached.get("attention_mask")
    if isinstance(masks, Tensor):
        masks = [masks]
    if not masks or not all(isinstance(mask, Tensor) for mask in masks):
        return
    of_padding = all(m.ndim == 2 and not m.is_floating_point() for m in masks)
    kinds = layer_kinds(model, block_names)
    attention = str(getattr(model.config, "_attn_implementation", None))
    # Flash attention takes the mask of padding too.
    if not of_padding or len(set(kinds)) == 1 or attention.startswith("flash"):
        return
    described = f"model={type(model).__name__}: its layers are {_counted(kinds)}"
    padded = sum(bool((mask.int().diff(dim=-1) > 0).any()) for mask in masks)
    if padded:
        raise ValueError(
            f"{described}, and {padded} calibration samples are padded before their "
            "end; AutoRound hands one mask to all layers, which attention cannot take; "
            "allowed is padding at the end, or samples of seqlen tokens"
        )
    if attention == "eager":
        raise ValueError(
            f"{described}, and attn_implementation='eager' is not causal without a "
            "mask; allowed is 'sdpa', so load the model with it"
        )
    cached["attention_mask"] = None


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
