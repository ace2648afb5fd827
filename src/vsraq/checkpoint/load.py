# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints through transformers where that goes wrong silently."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vsraq.checkpoint.reader import Checkpoint


def load_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a full-precision checkpoint or an export through transformers, rightly.

    Two loaders go wrong silently, and both are dealt with here:

    - Loading an `auto_round` MoE export switches off, for the whole process, the
      conversion that fuses experts, so that every later full-precision model of that
      family gets random experts. The conversion is put back afterwards.
    - transformers dequantizes compressed-tensors NVFP4 experts without their global
      scale (huggingface/transformers#48371), so such an export is refused.

    Args:
        path: Folder of the checkpoint.
        **kwargs: Of `from_pretrained`.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: The export is NVFP4 in compressed-tensors format with experts.
        FileNotFoundError: There is no checkpoint at `path`.
    """
    with Checkpoint(path) as checkpoint:
        config = checkpoint.config
        quantization = config.get("quantization_config") or {}
        if "nvfp4" in str(quantization.get("format")) and any(
            ".experts." in name for name in checkpoint
        ):
            raise ValueError(
                f"path={str(path)!r}: transformers loads NVFP4 experts in "
                "compressed-tensors format without their global scale "
                "(huggingface/transformers#48371); allowed are other formats; serve "
                "this one with vLLM, or export in auto_round format to load it here"
            )
    model_type = config["model_type"]
    conversion = get_checkpoint_conversion_mapping(model_type)
    try:
        model: PreTrainedModel = model_class(config).from_pretrained(path, **kwargs)
    finally:
        if conversion is not None:
            register_checkpoint_conversion_mapping(
                model_type, conversion, overwrite=True
            )
    return model.eval()


def model_class(config: Mapping[str, Any]) -> Any:
    """The auto class of a checkpoint; a language model inside a larger one counts too.

    Some types have both a causal model and a larger one around it; `architectures`
    says which of them the checkpoint holds.
    """
    model_type = config["model_type"]
    larger = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    architectures = config.get("architectures") or [causal]
    if larger is not None and (causal is None or architectures[0] == larger):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
