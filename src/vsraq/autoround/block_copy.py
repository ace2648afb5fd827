# SPDX-License-Identifier: Apache-2.0
"""A copy of a decoder block that can run, wherever AutoRound keeps the block.

The model's own block is not touched: AutoRound loads and releases it when its turn
comes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.modeling.fused_moe.replace_modules import ReplacementModuleBase
from auto_round.utils import unsupported_meta_device
from auto_round.utils.offload import OffloadManager, load_block_from_model_files
from safetensors import safe_open
from torch import nn


def copy_block(
    model: nn.Module,
    name: str,
    offloader: OffloadManager,
    without_it: str,
    replaced: Mapping[int, nn.Module] | None = None,
) -> nn.Module:
    """Copy a block of the model; tensors in memory are shared, others read from disk.

    Args:
        model: The model.
        name: The block's qualified name.
        offloader: AutoRound's, which knows where tensors that are not loaded are.
        without_it: What is impossible if tensors are missing, and what to do then, as
            the end of the error's sentence.
        replaced: What the copy has instead of some submodules, by their `id`.

    Returns:
        The copy, without gradients.

    Raises:
        RuntimeError: A tensor is neither in memory nor on disk.
    """
    block = model.get_submodule(name)
    # deepcopy takes what is in memo instead of copying it.
    memo: dict[int, Any] = dict(replaced or {})
    for parameter in block.parameters():
        alias = nn.Parameter(parameter.detach(), requires_grad=False)
        memo[id(parameter)] = alias
    for buffer in block.buffers():
        memo[id(buffer)] = buffer.detach()
    copied: nn.Module = copy.deepcopy(block, memo)
    missing = _missing(copied)
    if missing:
        _read(copied, name, missing, offloader)
        missing = _missing(copied)
    if missing:
        raise RuntimeError(
            f"block {name}: {', '.join(missing)} are neither in memory nor on disk, so "
            f"{without_it}"
        )
    return copied


def split_experts(block: nn.Module) -> None:
    """Split the fused experts of a block in memory into layers.

    AutoRound replaces the MoE layers of some families (GPT-OSS, Llama 4, Qwen3.5) at
    the start and moves the weights from the fused experts into them when the block's
    turn comes; this does it now. Values and memory stay the same. Blocks that are read
    from disk get their layers there.

    Args:
        block: A block of the model.
    """
    for module in list(block.modules()):
        if isinstance(module, ReplacementModuleBase) and not module._materialized:
            original = module._get_original_module()
            if original is not None and not unsupported_meta_device(original):
                module.materialize_weights()


def _missing(module: nn.Module) -> list[str]:
    """List the tensors that AutoRound keeps on disk: on meta, or emptied."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, t in tensors if t.is_meta or t.numel() == 0]


def _read(
    copied: nn.Module, name: str, missing: Sequence[str], offloader: OffloadManager
) -> None:
    saved = offloader._saved.get(name)
    if saved is None:
        if offloader.model_dir is not None:  # still as in its checkpoint
            load_block_from_model_files(offloader.model_dir, name, copied)
        return
    with safe_open(saved["save_path"], framework="pt") as file:
        saved_names = set(file.keys())
        for tensor_name in missing:
            if tensor_name not in saved_names:
                continue
            owner_name, _, attribute = tensor_name.rpartition(".")
            owner = copied.get_submodule(owner_name)
            tensor = file.get_tensor(tensor_name)
            if attribute in owner._buffers:
                owner._buffers[attribute] = tensor
            else:
                setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
