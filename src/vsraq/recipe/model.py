# SPDX-License-Identifier: Apache-2.0
"""The model of a recipe, without its weights."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import is_offline_mode
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from vsraq.recipe.recipe import Recipe


def model_config(recipe: Recipe) -> Any:
    """Read the transformers config of a recipe's model.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Its config cannot be read.
    """
    path = Path(recipe.model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model={recipe.model!r}: the folder has no config.json; allowed is "
                "the folder of a saved model"
            )
    elif path.exists() or recipe.model.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"model={recipe.model!r}: no such folder; allowed is the folder of a saved "
            "model, or a model id of the hub"
        )
    try:
        return AutoConfig.from_pretrained(
            recipe.model,
            trust_remote_code=bool(recipe.runtime.get("trust_remote_code", False)),
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        where = (
            ", and the hub is switched off (HF_HUB_OFFLINE), so only models in its "
            "cache are available"
            if not path.is_dir() and is_offline_mode()
            else ""
        )
        raise ValueError(
            f"model={recipe.model!r}: its config cannot be read{where} ({reason})"
        ) from error


def skeleton(config: Any, recipe: Recipe) -> nn.Module:
    """Build a recipe's model on meta, from its config."""
    larger = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    auto = AutoModelForImageTextToText if larger else AutoModelForCausalLM
    remote = bool(recipe.runtime.get("trust_remote_code", False))
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, trust_remote_code=remote)
    return model
