# SPDX-License-Identifier: Apache-2.0
"""Read an exported checkpoint and verify it against the model it came from.

The tensors are read from the safetensors files themselves and decoded here, so that
no loader of another library can hide what is missing. Formats: integer weights in
AutoRound's format (`auto_round`, also `auto_gptq` packing) and NVFP4 in the
`auto_round` and `llm_compressor` formats.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vsraq.routers import Router, count_experts, find_routers

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FULL_PRECISION = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_SHOWN = 20


class CheckpointError(ValueError):
    """An exported checkpoint is faulty.

    Attributes:
        faults: One line per fault, each naming its tensor or layer.
    """

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.faults = tuple(faults)
        shown = "\n".join(f"  - {fault}" for fault in faults[:_MAX_SHOWN])
        more = len(faults) - _MAX_SHOWN
        tail = f"\n  ... and {more} more" if more > 0 else ""
        super().__init__(
            f"checkpoint {path} has {len(faults)} fault(s):\n{shown}{tail}\n"
            "Do not serve it; export again, and report what repeats."
        )


@dataclass(frozen=True)
class Verification:
    """What `verify` has checked, all of it found in order.

    Attributes:
        kind: How the quantized weights are stored.
        quantized_layers: Layers with quantized weights.
        full_precision_layers: Linear layers that the export declares unquantized.
        routers: Routers found in full precision, equal to the reference or re-fitted.
        realigned_routers: Those among them that differ from a full-precision
            reference, in an export whose config says that routers were re-fitted. A
            tuned reference must hold the same ones, so then this is 0.
        experts: Experts found, over all layers.
        compared_weights: Dequantized weights found equal to the tuned ones; 0 if the
            reference holds no tuned weights.
    """

    kind: Literal["int", "nvfp4"]
    quantized_layers: int
    full_precision_layers: int
    routers: int
    realigned_routers: int
    experts: int
    compared_weights: int


class Checkpoint:
    """The tensors of a checkpoint folder, read one at a time.

    Use it as a context manager. Reads the shards that `*.safetensors.index.json`
    names, or every safetensors file where there is no index.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: The folder has no config.json, no safetensors file, or not
            all shards of its index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config = self.path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(
                f"path={str(path)!r}: no config.json there; allowed is the folder of a "
                "saved model"
            )
        self.config: dict[str, Any] = json.loads(config.read_text())
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> Self:
        files = sorted(self.path.glob("*.safetensors"))
        for index in self.path.glob("*.safetensors.index.json"):
            shards = set(json.loads(index.read_text())["weight_map"].values())
            missing = sorted(shards - {file.name for file in files})
            if missing:
                raise FileNotFoundError(
                    f"path={str(self.path)!r}: {index.name} names "
                    f"{', '.join(missing)}, not there; allowed is a complete checkpoint"
                )
        if not files:
            raise FileNotFoundError(
                f"path={str(self.path)!r}: no safetensors file there; allowed is the "
                "folder of a model saved with safetensors"
            )
        for file in files:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            for name in handle.keys():
                self._owner[name] = handle
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._owner.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._owner[name].get_tensor(name)
        return tensor

    @property
    def quantization_config(self) -> dict[str, Any]:
        """`quantization_config` of config.json.

        Raises:
            ValueError: The checkpoint is not quantized.
        """
        config = self.config.get("quantization_config")
        if not isinstance(config, dict):
            raise ValueError(
                f"path={str(self.path)!r}: config.json has no quantization_config; "
                "allowed is a quantized export"
            )
        return config

    @property
    def realigned(self) -> bool:
        """Whether the export's config says that its routers were re-fitted."""
        return bool((self.config.get("vsraq") or {}).get("realign_routers"))

    def quantized_layers(self) -> tuple[str, ...]:
        """Names of the layers whose weight is stored quantized, in file order."""
        suffixes = (".qweight", ".weight_packed")
        return tuple(
            name.removesuffix(suffix)
            for name in self
            for suffix in suffixes
            if name.endswith(suffix)
        )

    def dequantize(self, layer: str) -> Tensor:
        """The weight of a quantized layer as numbers, float32, (out, in).

        Integers: (level - zero point) * scale, per group. NVFP4: E2M1 value * block
        scale / global scale.

        Args:
            layer: A name from `quantized_layers`.

        Returns:
            The weight, computed in the export's own arithmetic.

        Raises:
            KeyError: A tensor of the layer is missing.
        """
        if f"{layer}.qweight" in self:
            return self._dequantize_int(layer)
        return self._dequantize_nvfp4(layer)

    def _dequantize_int(self, layer: str) -> Tensor:
        bits, group_size = self.bits_and_group_size(layer)
        scales = self[f"{layer}.scales"].float()  # (groups, out)
        levels = _unpack(self[f"{layer}.qweight"], bits, dim=0)  # (in, out)
        zeros = _unpack(self[f"{layer}.qzeros"], bits, dim=1)  # (groups, out)
        config = self.quantization_config
        if "gptq" in str(config.get("packing_format", config.get("quant_method"))):
            zeros = zeros + 1  # GPTQ stores the zero point minus one
        if group_size <= 0:
            group_size = levels.shape[0]
        group = torch.arange(levels.shape[0]) // group_size
        return ((levels - zeros[group]).float() * scales[group]).t()

    def bits_and_group_size(self, layer: str) -> tuple[int, int]:
        """Of an integer layer, as the config declares them for it.

        `extra_config` goes before the whole model's values: by the layer's name, else
        by a regular expression. A group size of -1 is the whole row.
        """
        config = self.quantization_config
        extra = config.get("extra_config") or {}
        own = extra.get(layer)
        if own is None:
            matching = (own for key, own in extra.items() if re.search(key, layer))
            own = next(matching, {})
        merged = {**config, **own}
        return int(merged["bits"]), int(merged["group_size"])

    def _dequantize_nvfp4(self, layer: str) -> Tensor:
        packed = self[f"{layer}.weight_packed"].int()  # (out, in / 2), low nibble first
        nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
        values = _E2M1[nibbles & 0x7]
        values = torch.where(nibbles >= 8, -values, values)
        block_scale = self[f"{layer}.weight_scale"].float()  # (out, in / 16)
        global_scale = self[f"{layer}.weight_global_scale"].float()
        block_size = values.shape[-1] // block_scale.shape[-1]
        # The order of AutoRound's own rounding during tuning, two reciprocals included:
        # the plain quotient is the same number up to float32 rounding, but not the
        # same bits.
        scale = (block_scale * global_scale.reciprocal()).reciprocal().reciprocal()
        return values * scale.repeat_interleave(block_size, dim=-1)


def _unpack(packed: Tensor, bits: int, *, dim: int) -> Tensor:
    """Little-endian bit stream of int32 words along `dim` -> int64 values."""
    words = packed.movedim(dim, -1).long() & 0xFFFFFFFF
    count = words.shape[-1] * 32 // bits
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    low = words[..., word] >> shift
    following = words[..., (word + 1).clamp(max=words.shape[-1] - 1)]
    values = (low | (following << (32 - shift))) & ((1 << bits) - 1)
    return values.movedim(-1, dim)


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
        model: PreTrainedModel = _model_class(config).from_pretrained(path, **kwargs)
    finally:
        if conversion is not None:
            register_checkpoint_conversion_mapping(
                model_type, conversion, overwrite=True
            )
    return model.eval()


def verify(
    path: str | Path,
    reference: nn.Module | str | Path,
    *,
    trust_remote_code: bool = False,
) -> Verification:
    """Check an export tensor by tensor.

    Checked are: every expected layer is quantized (or declared full precision in the
    export's config) in groups that divide it, every router is there in full precision
    and equal to the reference's (its weight may differ from a full-precision
    reference's if the export's config says that routers were re-fitted, as
    `realign_routers` writes it), all experts of every MoE layer are there and
    complete, every scale
    (`scales`, `weight_scale`, `weight_global_scale`, `input_global_scale`) is there,
    finite and non-zero, and, if the reference holds the tuned weights, the dequantized
    weights are those, bit for bit after rounding to the reference's dtype.

    Args:
        path: Folder of the export.
        reference: The model that AutoRound's `quantize()` returned (its linear layers
            hold the tuned weights), or the full-precision model, or the path or hub
            name of its checkpoint (read without loading it as a whole; a hub model
            must be on this machine already).
        trust_remote_code: Of transformers, for a reference given by path.

    Returns:
        What was checked.

    Raises:
        CheckpointError: With every fault found.
        FileNotFoundError: There is no checkpoint at `path`, or the reference is not on
            this machine.
        ValueError: The export is not quantized, its format is not supported, or the
            reference has no MoE router.
    """
    with ExitStack() as stack:
        export = stack.enter_context(Checkpoint(path))
        kind = _kind(export)
        if isinstance(reference, nn.Module):
            module = reference
            tensors: Mapping[str, Tensor] | Checkpoint = reference.state_dict()
        else:
            folder = _local_folder(reference)
            module = _skeleton(folder, trust_remote_code)
            tensors = stack.enter_context(Checkpoint(folder))
        routers = find_routers(module)
        if not routers:
            raise ValueError(
                f"reference={type(module).__name__}: it has no MoE router; allowed are "
                "mixture-of-experts models"
            )
        stored = _StoredNames(module)
        quantized = set(export.quantized_layers())
        routers = _in_quantized_stacks(routers, stored, quantized)
        linears = _linear_layers(module, routers, stored)
        exempt, layer_faults = _check_layers(export, linears, quantized)
        experts, expert_faults = _check_experts(
            module, routers, stored, quantized | exempt
        )
        scale_faults = _check_scales(export, kind, quantized)
        tuned = any(hasattr(layer, "bits") for _, layer in linears.values())
        realigned, router_faults = _check_routers(
            export,
            tensors,
            module,
            routers,
            stored,
            quantized,
            may_differ=export.realigned and not tuned,
        )
        faults = [
            *layer_faults,
            *router_faults,
            *expert_faults,
            *scale_faults,
        ]
        compared = 0
        if not scale_faults:
            compared, weight_faults = _check_weights(export, linears, quantized)
            faults += weight_faults
        if faults:
            raise CheckpointError(export.path, faults)
        return Verification(
            kind=kind,
            quantized_layers=len(quantized),
            full_precision_layers=len(exempt),
            routers=len(routers),
            realigned_routers=realigned,
            experts=experts,
            compared_weights=compared,
        )


def _kind(export: Checkpoint) -> Literal["int", "nvfp4"]:
    config = export.quantization_config
    endings = {name.rpartition(".")[2] for name in export}
    is_awq = "awq" in f"{config.get('packing_format')} {config.get('quant_method')}"
    if not is_awq and {"qweight", "scales"} <= endings:
        return "int"
    if "weight_packed" in endings and "weight_global_scale" in endings:
        return "nvfp4"
    is_nvfp4 = "nv_fp" in str(config.get("data_type")) or "nvfp4" in str(
        config.get("format")
    )
    if is_nvfp4 and "weight_packed" in endings:
        return "nvfp4"
    raise ValueError(
        f"path={str(export.path)!r}: quant_method={config.get('quant_method')!r}, "
        f"packing_format={config.get('packing_format')!r} with tensors "
        f"{sorted(endings)}; allowed are integer weights in auto_round format (GPTQ "
        "packing) and NVFP4 in auto_round or llm_compressor format"
    )


def _local_folder(reference: str | Path) -> Path:
    """The folder itself, or where the hub's client has put a model's files."""
    if Path(reference).is_dir():
        return Path(reference)
    try:
        return Path(snapshot_download(str(reference), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"reference={str(reference)!r}: neither a folder nor a model in the hub's "
            "cache on this machine; allowed are those two"
        ) from error


def _skeleton(path: Path, trust_remote_code: bool) -> nn.Module:
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    model_class = _model_class(config.to_dict())
    with torch.device("meta"):
        model: nn.Module = model_class.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model


def _model_class(config: Mapping[str, Any]) -> Any:
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


def _declared_full_precision(export: Checkpoint) -> list[re.Pattern[str]]:
    """Layers that the export's own config exempts from quantization."""
    config = export.quantization_config
    patterns = [
        name
        for name, own in (config.get("extra_config") or {}).items()
        if int(own.get("bits", 0)) >= 16
    ]
    for name in config.get("ignore") or []:
        patterns.append(name.removeprefix("re:") if name.startswith("re:") else name)
    return [re.compile(pattern) for pattern in patterns]


class _StoredNames:
    """Names of a model's tensors on disk, where transformers renames them.

    `model.layers.3.mlp.gate.weight` of Mixtral is stored as
    `model.layers.3.block_sparse_moe.gate.weight`, say. Names that differ in their
    numbers alone are renamed alike, so each pattern is asked for once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._model = module if isinstance(module, PreTrainedModel) else None
        self._patterns: dict[str, list[str]] = {}

    def __call__(self, name: str) -> str:
        if self._model is None:
            return name
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        if pattern not in self._patterns:
            empty = torch.empty(0, 0, device="meta")  # some are transposed, too
            stored = list(revert_weight_conversion(self._model, {name: empty}))
            renamed = stored[0] if len(stored) == 1 else name  # or into several
            self._patterns[pattern] = re.split(r"(?<=\.)\d+(?=\.)", renamed)
        pieces = self._patterns[pattern]
        if len(pieces) != len(numbers) + 1:
            return name
        return pieces[0] + "".join(
            number + piece for number, piece in zip(numbers, pieces[1:], strict=True)
        )


def _block_of(name: str) -> str:
    """`model.layers.3` from the name of anything inside that block."""
    match = re.match(r"^(.*?\.\d+)\.", name)
    return match[1] if match else ""


def _in_quantized_stacks(
    routers: tuple[Router, ...], stored: _StoredNames, quantized: set[str]
) -> tuple[Router, ...]:
    """Leave out routers of stacks that the export left alone, a vision tower's."""
    stacks = {_block_of(layer).rpartition(".")[0] for layer in quantized}
    inside = tuple(
        router
        for router in routers
        if _block_of(stored(f"{router.name}.weight")).rpartition(".")[0] in stacks
    )
    return inside or routers  # nothing quantized is a fault of every layer


def _linear_layers(
    module: nn.Module, routers: tuple[Router, ...], stored: _StoredNames
) -> dict[str, tuple[str, nn.Linear]]:
    """Linear layers of the decoder blocks, routers left out.

    Stored name -> the module's own name and the layer.
    """
    router_names = {router.name for router in routers}
    stacks = {_block_of(name).rpartition(".")[0] for name in router_names}
    layers: dict[str, tuple[str, nn.Linear]] = {}
    for name, layer in module.named_modules():
        # AutoRound wraps layers whose activations are quantized
        name = name.removesuffix(".orig_layer")
        in_block = _block_of(name).rpartition(".")[0] in stacks
        if isinstance(layer, nn.Linear) and in_block and name not in router_names:
            layers[stored(f"{name}.weight").removesuffix(".weight")] = name, layer
    return layers


def _check_layers(
    export: Checkpoint,
    linears: Mapping[str, tuple[str, nn.Linear]],
    quantized: set[str],
) -> tuple[set[str], list[str]]:
    """Every linear layer, and every expert on disk, is quantized or exempt.

    Returns the exempt layers and the faults.
    """
    declared = _declared_full_precision(export)
    plain = {
        name.removesuffix(".weight")
        for name in export
        # fused experts of the reference are no linear layers: look on disk
        if re.search(r"\.experts\.\d+\.", name) and name.endswith(".weight")
    }
    faults: list[str] = []
    exempt: set[str] = set()
    for name in sorted(linears.keys() | plain):
        if name in quantized:
            continue
        # AutoRound declares layers by the module's name, whatever they are stored as
        own_name, layer = linears.get(name, (name, None))
        if f"{name}.weight" not in export:
            faults.append(f"{name}: neither a quantized nor a plain weight is there")
        elif getattr(layer, "bits", 0) >= 16 or any(
            pattern.search(n) for pattern in declared for n in (name, own_name)
        ):
            exempt.add(name)
        else:
            faults.append(f"{name}: expected quantized, but stored in full precision")
    return exempt, faults


def _check_routers(
    export: Checkpoint,
    tensors: Mapping[str, Tensor] | Checkpoint,
    module: nn.Module,
    routers: tuple[Router, ...],
    stored: _StoredNames,
    quantized: set[str],
    *,
    may_differ: bool,
) -> tuple[int, list[str]]:
    """Returns how many routers were re-fitted, and the faults."""
    faults = []
    realigned = 0
    for router in routers:
        for suffix in module.get_submodule(router.name).state_dict():
            own_name = f"{router.name}.{suffix}"
            name = stored(own_name)
            if name.removesuffix(".weight") in quantized:
                faults.append(f"{router.name}: the router is quantized")
                continue
            if name not in export:
                faults.append(f"{name}: missing")
                continue
            # a module knows its own names, a folder the stored ones
            key = name if isinstance(tensors, Checkpoint) else own_name
            if key not in tensors:
                faults.append(f"{name}: missing in the reference")
                continue
            exported, expected = export[name], tensors[key]
            if exported.dtype not in _FULL_PRECISION:
                faults.append(f"{name}: dtype {exported.dtype} is not full precision")
                continue
            if torch.equal(exported.float(), expected.detach().cpu().float()):
                continue
            if may_differ and suffix.rpartition(".")[2] == "weight":
                realigned += 1
                if exported.shape != expected.shape or exported.dtype != expected.dtype:
                    faults.append(
                        f"{name}: {exported.dtype} {tuple(exported.shape)}, the "
                        f"reference's is {expected.dtype} {tuple(expected.shape)}"
                    )
                elif not torch.isfinite(exported).all():
                    faults.append(f"{name}: a re-fitted router is not finite")
            else:
                faults.append(
                    f"{name}: differs from the reference's router ({exported.dtype} "
                    f"here, {expected.dtype} there)"
                )
    return realigned, faults


def _projections(module: nn.Module, router: Router) -> set[str]:
    """Linear layers of one expert beside a router, by AutoRound's unfused names."""
    names: set[str] = set()
    parent = module.get_submodule(router.name.rpartition(".")[0])
    for name, child in parent.named_modules():
        fused = [n for n, p in child.named_parameters(recurse=False) if p.ndim == 3]
        for parameter in fused:
            halves = {"gate_up_proj": ("gate_proj", "up_proj")}
            names.update(halves.get(parameter, (parameter,)))
        if re.search(r"(^|\.)experts\.0\.", name) and isinstance(child, nn.Linear):
            names.add(re.split(r"experts\.0\.", name)[1].removesuffix(".orig_layer"))
    return names


def _check_experts(
    module: nn.Module,
    routers: tuple[Router, ...],
    stored: _StoredNames,
    layers: set[str],
) -> tuple[int, list[str]]:
    """How many experts there are, and the faults."""
    by_block: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for layer in layers:
        match = re.match(r"^(.+\.experts)\.(\d+)\.(.+)$", layer)
        if match:
            by_block[_block_of(layer)][int(match[2])].add(match[3])
    faults: list[str] = []
    count = 0
    for router in routers:
        block = _block_of(stored(f"{router.name}.weight"))
        experts = by_block.get(block)
        if not experts:
            faults.append(f"{block}: no quantized experts beside {router.name}")
            continue
        count += len(experts)
        expected = _projections(module, router).union(*experts.values())
        for index in range(count_experts(module, router)):
            missing = expected - experts.get(index, set())
            if missing:
                faults.append(
                    f"{block}: expert {index} misses {', '.join(sorted(missing))}"
                )
    return count, faults


def _check_scales(
    export: Checkpoint, kind: Literal["int", "nvfp4"], quantized: set[str]
) -> list[str]:
    if kind == "int":
        required = ["scales", "qzeros"]
        scales = ["scales"]
    else:
        scales = ["weight_scale", "weight_global_scale"]
        if _quantizes_activations(export):
            scales.append("input_global_scale")
        required = scales
    faults = []
    for layer in sorted(quantized):
        for suffix in required:
            name = f"{layer}.{suffix}"
            if name not in export:
                faults.append(f"{name}: missing")
                continue
            if suffix not in scales:
                continue
            values = export[name].float()
            if suffix == "scales" and (fault := _group_fault(export, layer)):
                faults.append(fault)
            if not torch.isfinite(values).all():
                faults.append(f"{name}: has a non-finite scale")
            elif (values == 0).any():
                zeros = int((values == 0).sum())
                faults.append(f"{name}: {zeros} of {values.numel()} scales are zero")
    return faults


def _group_fault(export: Checkpoint, layer: str) -> str | None:
    """Loaders take the declared group literally, also where it exceeds the layer."""
    bits, group_size = export.bits_and_group_size(layer)
    in_features = export[f"{layer}.qweight"].shape[0] * 32 // bits
    if group_size <= 0 or in_features % group_size == 0:
        return None
    return (
        f"{layer}: group_size {group_size} does not divide its {in_features} inputs, "
        "so loaders refuse it; give this layer another one in layer_config"
    )


def _quantizes_activations(export: Checkpoint) -> bool:
    config = export.quantization_config
    if "act_bits" in config:
        return int(config["act_bits"]) < 16
    groups = (config.get("config_groups") or {}).values()
    return any(group.get("input_activations") for group in groups)


def _check_weights(
    export: Checkpoint,
    linears: Mapping[str, tuple[str, nn.Linear]],
    quantized: set[str],
) -> tuple[int, list[str]]:
    """Compare with tuned weights, which AutoRound marks by `bits` on the layer.

    Returns how many weights were compared, and the faults.
    """
    faults: list[str] = []
    compared = 0
    if not any(hasattr(layer, "bits") for _, layer in linears.values()):
        return 0, []  # a full-precision reference
    for name in sorted(quantized):
        _, layer = linears.get(name, (name, None))
        if layer is None or not hasattr(layer, "bits"):
            faults.append(f"{name}: the tuned reference has no such layer")
            continue
        compared += 1
        tuned = layer.weight.detach().cpu()
        exported = export.dequantize(name)
        if exported.shape != tuned.shape:
            faults.append(
                f"{name}: shape {tuple(exported.shape)}, tuned {tuple(tuned.shape)}"
            )
        elif not torch.equal(exported.to(tuned.dtype), tuned):
            error = (exported - tuned.float()).abs().max().item()
            faults.append(
                f"{name}: dequantized weight differs from the tuned one by up to "
                f"{error:.3g}"
            )
    return compared, faults
