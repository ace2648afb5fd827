# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints through transformers, without three of its silent errors."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vsraq.checkpoint.reader import Checkpoint


def load_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a full-precision checkpoint or an export through transformers.

    Three errors would go unnoticed otherwise:

    - Loading an `auto_round` MoE export switches off, for the whole process, the
      conversion that fuses experts, so that every later full-precision model of that
      family gets random experts. Here the conversion is put back afterwards.
    - For some families (Qwen3-MoE, GLM-4 MoE, DeepSeek-V3, ...) it also replaces the
      class of their MoE block. Here the class is put back, too.
    - transformers dequantizes compressed-tensors NVFP4 experts without their global
      scale (huggingface/transformers#48371). Here such an export is refused.

    Args:
        path: Folder of the checkpoint.
        **kwargs: Passed on to `from_pretrained`.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: The export is NVFP4 in compressed-tensors format with experts.
        FileNotFoundError: There is no checkpoint at `path`.
    """
    with Checkpoint(path) as checkpoint:
        config = checkpoint.config
        quantization = config.get("quantization_config") or {}
        groups = (quantization.get("config_groups") or {}).values()
        formats = [kind.get("format") for kind in (quantization, *groups)]
        if "nvfp4" in str(formats) and any(".experts." in name for name in checkpoint):
            raise ValueError(
                f"path={str(path)!r}: transformers loads NVFP4 experts in "
                "compressed-tensors format without their global scale "
                "(huggingface/transformers#48371); allowed are other formats; serve "
                "this one with vLLM, or export in auto_round format to load it here"
            )
    family = config["model_type"]
    with _same_conversion_afterwards(family), _same_classes_afterwards(family):
        model: PreTrainedModel = model_class(config).from_pretrained(path, **kwargs)
    return model.eval()


def local_folder(model: str | Path, argument: str = "reference") -> Path:
    """Find a checkpoint: the folder itself, or where the hub's client has put it.

    Args:
        model: A folder, or the name of a model in the hub's cache.
        argument: What an error calls it.

    Raises:
        FileNotFoundError: It is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{argument}={str(model)!r}: neither a folder nor a model in the hub's "
            "cache on this machine; allowed are those two"
        ) from error


@contextmanager
def _same_conversion_afterwards(model_type: str) -> Iterator[None]:
    """Put a family's conversion of weights back, whatever a loader does to it."""
    conversion = get_checkpoint_conversion_mapping(model_type)
    try:
        yield
    finally:
        if conversion is not None:
            register_checkpoint_conversion_mapping(
                model_type, conversion, overwrite=True
            )


@contextmanager
def _same_classes_afterwards(model_type: str) -> Iterator[None]:
    """Put the classes of a family back, whatever a loader does to them."""
    family = model_type_to_module_name(model_type)
    name = f"transformers.models.{family}.modeling_{family}"
    known = find_spec(f"transformers.models.{family}") is not None  # no remote code
    if known and find_spec(name) is not None:
        import_module(name)
    modules = [
        module
        for found, module in list(sys.modules.items())
        if found.startswith("transformers.models.") and ".modeling_" in found
    ]
    before = [
        (module, {n: c for n, c in vars(module).items() if isinstance(c, type)})
        for module in modules
    ]
    try:
        yield
    finally:
        for module, classes in before:
            vars(module).update(classes)


def model_class(config: Mapping[str, Any]) -> Any:
    """The auto class that loads a checkpoint.

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
