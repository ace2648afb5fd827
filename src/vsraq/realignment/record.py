# SPDX-License-Identifier: Apache-2.0
"""The record of re-fitted routers that travels with a model's config.

`config.json` of an export then holds

    "vsraq": {"realign_routers": true, "router_digests": {name: "sha256:<hex>"}}

with the names and the bytes as they are stored.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vsraq.routers import linear_map
from vsraq.whole_file import write_whole


def router_weight(name: str, module: nn.Module) -> tuple[str, Tensor]:
    """Find the parameter that a re-fit changes.

    Args:
        name: The router's name in the model.
        module: The router.

    Returns:
        The parameter's name in the model, and the parameter.
    """
    weight: Tensor = linear_map(module).weight  # type: ignore[assignment]
    parameter_name = next(n for n, p in module.named_parameters() if p is weight)
    return f"{name}.{parameter_name}", weight


def stored_name(model: nn.Module, name: str) -> str:
    """Return a parameter's name on disk; transformers renames some while saving."""
    if not isinstance(model, PreTrainedModel):
        return name
    empty = torch.empty(0, 0, device="meta")
    stored = list(revert_weight_conversion(model, {name: empty}))
    return stored[0] if len(stored) == 1 else name


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def digest(stored: bytes) -> str:
    """Return `sha256:<hex>` of stored bytes."""
    return f"sha256:{hashlib.sha256(stored).hexdigest()}"


def realignment_record(digests: Mapping[str, str]) -> dict[str, Any]:
    """Build what a config says about re-fitted routers.

    Args:
        digests: By stored name; see `digest`.
    """
    return {"realign_routers": True, "router_digests": dict(digests)}


def record_realignment(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Note in the model's config which routers were re-fitted.

    It travels with the export, where `vsraq.checkpoint.verify` reads it.

    Args:
        model: The model; without a config (a single block) nothing is noted.
        weights: The new weights by their names in the model, (E, H); at least one.

    Raises:
        ValueError: There are no weights.
    """
    if not weights:
        raise ValueError(
            "weights={}: allowed are the weights of one re-fitted router or more; a "
            "model without them needs no record"
        )
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    config.vsraq = realignment_record(
        {
            stored_name(model, name): digest(tensor_bytes(weight))
            for name, weight in weights.items()
        }
    )


def drop_record(model: nn.Module) -> None:
    """Remove the record of an earlier run from the model's config."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "vsraq"):
        del config.vsraq


def write_record(folder: Path, digests: Mapping[str, str]) -> None:
    """Set, or with no digests remove, the record in an export's `config.json`.

    Raises:
        OSError: The file cannot be read or written.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    before = config.pop("vsraq", None)
    if digests:
        config["vsraq"] = realignment_record(digests)
    if config.get("vsraq") != before:
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
