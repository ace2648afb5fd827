# SPDX-License-Identifier: Apache-2.0
"""A model as AutoRound prepares it for a run, and what it would do with its layers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.utils.model import get_lm_head_name
from auto_round.utils.offload import _resolve_model_dir
from auto_round.utils.weight_handler import ModuleWeightType
from torch import nn

from vsraq.autoround.checks import check_stream
from vsraq.autoround.planning import own_fields, scheme_fields
from vsraq.autoround.unit_damage import MeasuredModel, SchemeFields
from vsraq.checkpoint import Checkpoint
from vsraq.checkpoint.planned import is_ignored, to_pattern
from vsraq.routers import Router, find_routers

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class PreparedModel:
    """A model that AutoRound has prepared, and what it would do with its layers.

    Attributes:
        name: Where it is from, or its class.
        model: The model, for measurements, with the routers that a pattern names.
        routers: All its routers, for what concerns experts.
        tokenizer: Its tokenizer.
        all_layers: The scheme of each linear layer, by AutoRound's names.
        default: The fields of the run's scheme.
        named: Layers that the user names, in `layer_config` or `ignore_layers`.
        widths: Bytes of a number of those tensors that the export has in another dtype
            than the model now, by name.
    """

    name: str
    model: MeasuredModel
    routers: tuple[Router, ...]
    tokenizer: Any
    all_layers: Mapping[str, SchemeFields]
    default: SchemeFields
    named: frozenset[str]
    widths: Mapping[str, int]

    @classmethod
    def of(
        cls,
        model: Any,
        scheme: str,
        export_format: str,
        kwargs: Mapping[str, Any],
        router_pattern: str | None = None,
    ) -> "PreparedModel":
        """Let AutoRound prepare a model as for a run.

        Raises:
            ValueError: It has no MoE router, a layer of a `layer_config` has a
                `scale_dtype` of its own, or AutoRound cannot stream the checkpoint.
            NotImplementedError: Its routers are not in one list of blocks.
        """
        run = AutoRound(
            model, scheme=scheme, alg_configs=SignRoundConfig(), **dict(kwargs)
        )
        run.formats = export_format
        run.post_init()
        module = run.model_context.model
        context = run.model_context
        check_stream(context._disk_stream_index, torch.bfloat16)  # rounds in float32
        _refuse_scale_dtypes(run)
        name = getattr(module.config, "_name_or_path", "") or type(module).__name__
        device = torch.device(run.device)
        return cls(
            name,
            MeasuredModel.of(module, run._offloader, device, router_pattern),
            find_routers(module, router_pattern=router_pattern, others=True),
            run.model_context.tokenizer,
            {n: own_fields(fields) for n, fields in run.layer_config.items()},
            own_fields(dict(run.scheme_context.items())),
            frozenset(_named(run.layer_config, kwargs)),
            _widths_on_disk(module, run._offloader.model_dir)
            | _widths_of_fp8(module, context.amp_dtype),
        )

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self.model.module

    @property
    def layers(self) -> dict[str, SchemeFields]:
        """The schemes of the decoder's quantized layers, in module order."""
        inside = tuple(f"{block}." for block in self.model.blocks)
        return {
            name: self.all_layers[name]
            for name, _ in self.module.named_modules()
            if name.startswith(inside)
            and self.all_layers.get(name, {}).get("bits", 16) < 16
        }

    @property
    def plain_layers(self) -> set[str]:
        """Linear layers of the decoder's blocks that stay in 16 bits."""
        inside = tuple(f"{block}." for block in self.model.blocks)
        quantized = self.layers
        return {
            name
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith(inside)
            and name not in quantized
        }

    def outside(self, layers: Iterable[str]) -> list[str]:
        """Those of some layers that are not in the decoder's blocks."""
        inside = tuple(f"{block}." for block in self.model.blocks)
        return [name for name in layers if not name.startswith(inside)]

    def head_layer(self) -> dict[str, SchemeFields]:
        """The output projection, in full precision or as the user asks for it.

        Raises:
            ValueError: It shares its weight with the embedding.
        """
        name = get_lm_head_name(self.module)
        if name is None or getattr(self.module.config, "tie_word_embeddings", False):
            raise ValueError(
                f"lm_head=True: the output projection of {type(self.module).__name__} "
                "shares its weight with the embedding, which AutoRound does not "
                "quantize; allowed is False"
            )
        own = self.all_layers.get(name, {})
        if own.get("bits", 16) < 16:
            return {name: own}
        return {name: {**self.default, **scheme_fields("BF16")}}


def _named(layers: Iterable[str], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the layers that the user names, as AutoRound looks names up."""
    patterns = [to_pattern(name) for name in kwargs.get("layer_config") or ()]
    ignored = kwargs.get("ignore_layers") or ""
    for layer in layers:
        if is_ignored(layer, ignored) or any(p.search(layer) for p in patterns):
            yield layer


def _refuse_scale_dtypes(run: Any) -> None:
    """Refuse what a plan, which is a file of text, does not keep."""
    for name, fields in run.layer_config.items():
        own = fields.get("scale_dtype")
        if own is None or own == run.scale_dtype or fields.get("bits", 16) >= 16:
            continue
        raise ValueError(
            f"layer_config: {name} has scale_dtype={own}, which a bit plan does not "
            f"keep for a single layer; allowed is that of all layers, {run.scale_dtype}"
            "; leave it out, or pass scale_dtype for all of them"
        )


def _widths_of_fp8(module: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of a number of layers in FP8, once AutoRound has scaled them.

    The export has such a weight in `dtype`, where it is not quantized, and no scale.
    """
    widths: dict[str, int] = {}
    for name, layer in module.named_modules():
        if getattr(layer, "quantized_weight_type", None) is not ModuleWeightType.FP8:
            continue
        own = [*layer.named_parameters(recurse=False)]
        for key, _ in [*own, *layer.named_buffers(recurse=False)]:
            if key != "bias":
                widths[f"{name}.{key}"] = dtype.itemsize if key == "weight" else 0
    return widths


def _widths_on_disk(module: nn.Module, folder: str | None) -> dict[str, int]:
    """Return the bytes of a number of tensors that AutoRound has not loaded yet.

    Until then they are float32, and afterwards what the files have. Those that have
    another name there (experts) count as what the config says.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    waiting = [n for n, t in tensors if t.is_meta and t.dtype == torch.float32]
    if not waiting or folder is None:
        return {}
    dtype = getattr(module.config, "dtype", None) or torch.float32
    with Checkpoint(_resolve_model_dir(folder)) as checkpoint:
        return {
            name: _WIDTHS[checkpoint.header(name).dtype]
            if name in checkpoint
            else dtype.itemsize
            for name in waiting
        }
