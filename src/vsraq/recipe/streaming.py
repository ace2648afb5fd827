# SPDX-License-Identifier: Apache-2.0
"""Whether AutoRound streams a model's blocks from disk, or loads the model whole."""

from pathlib import Path
from typing import Any

from auto_round import envs
from auto_round.context.model import _CUSTOM_MOE_REPLACEMENT_MODULES
from auto_round.modeling.fused_moe.moe_experts_interface import (
    _config_model_types,
    config_has_fused_moe_experts,
)
from auto_round.modeling.fused_moe.replace_modules import BUILTIN_MODULES
from auto_round.modeling.unfused_moe import MODEL_CONFIG, pre_check_config
from auto_round.utils.disk_stream_util import checkpoint_has_native_fused_moe_experts


def is_streamed(config: Any, path: str) -> bool:
    """Whether AutoRound streams a model, by its own rule.

    It streams models whose experts transformers fuses. For some families it puts a MoE
    layer of its own, with linear layers, in the place of transformers', and loads the
    model whole (Qwen3-MoE, GLM-4.5, DeepSeek-V3); for others it splits the experts
    itself (Llama 4, Qwen3.5, gpt-oss).

    Args:
        config: The model's transformers config.
        path: A folder, or the id of a model, whose files are taken to be as published:
            a tensor for each expert.
    """
    if envs.AR_DISK_STREAM_MODEL:
        return True
    if envs.AR_DISABLE_META_LOAD or envs.AR_DEBUG_LAYER_NUM is not None:
        return False
    split = {*BUILTIN_MODULES, *_CUSTOM_MOE_REPLACEMENT_MODULES}
    if split & set(_config_model_types(config)):
        return False
    local = Path(path).is_dir()
    if local and checkpoint_has_native_fused_moe_experts(path):
        return True
    if config.model_type in MODEL_CONFIG and (not local or pre_check_config(path)):
        return False
    fused: bool = config_has_fused_moe_experts(config)
    return fused


def check_streamed(config: Any, path: str) -> None:
    """Refuse a checkpoint in FP8 that AutoRound would stream without its scales.

    Args:
        config: The model's transformers config.
        path: A folder, or the id of a model.

    Raises:
        ValueError: It is one.
    """
    published = getattr(config, "quantization_config", None) or {}
    if not isinstance(published, dict):
        published = published.to_dict()
    if published.get("quant_method") == "fp8" and is_streamed(config, path):
        raise ValueError(
            f"model={path!r}: it is stored in FP8, and AutoRound streams FP8 numbers "
            "without their scales; set AR_DISABLE_META_LOAD=1, which loads the whole "
            "model"
        )
