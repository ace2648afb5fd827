# SPDX-License-Identifier: Apache-2.0
"""What an export's config says of each layer: bits, groups, signs.

Three families of configs: AutoRound's own (also as `gptq` and `awq`, which differ in
how they name exceptions) and that of compressed-tensors. Names of layers are looked up
in a dictionary; patterns are compiled once.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsraq.checkpoint.faults import CheckpointError

_META = re.compile(r"[\\*+?^$()\[\]{}|]")


@dataclass(frozen=True)
class Scheme:
    """How one layer's weight is stored.

    Attributes:
        layout: Key of `vsraq.checkpoint.formats.FORMATS`.
        bits: Bits of a weight.
        group_size: Inputs that share a scale; -1 for a whole row, 0 for the tensor.
        sym: Whether zero is the middle level.
        static_inputs: Whether a scale of the layer's inputs is stored.
    """

    layout: str
    bits: int
    group_size: int
    sym: bool
    static_inputs: bool = False

    def groups(self, in_features: int) -> int:
        """How many scales one row has."""
        if self.group_size <= 0:
            return 1
        return -(-in_features // self.group_size)


class Patterns:
    """Values by name or by regular expression; a name goes before a pattern.

    Args:
        entries: Pairs of a name, a pattern (searched anywhere in the name), and its
            value; of several patterns that match, the longest counts, which is the one
            that names its layer most closely.
    """

    def __init__(self, entries: Iterable[tuple[str, Any]]) -> None:
        self._literal: dict[str, Any] = {}
        self._parts: list[tuple[str, Any]] = []
        self._patterns: list[tuple[re.Pattern[str], Any]] = []
        for key, value in sorted(entries, key=lambda entry: -len(entry[0])):
            if not _META.search(key):
                self._literal.setdefault(key, value)
                continue
            core = re.sub(r"^(\.\*)+|(\.\*)+$", "", key)
            part = re.sub(r"\\([.\-_])", "\0\\1", core)
            if _META.search(part) or "." in part.replace("\0.", ""):
                self._patterns.append((re.compile(key), value))
            else:  # an escaped name: a search for it is a test of containment
                self._parts.append((part.replace("\0", ""), value))

    def get(self, names: Iterable[str]) -> Any | None:
        """The value of the first of a layer's names that has one, or None."""
        names = tuple(names)
        for name in names:
            if name in self._literal:
                return self._literal[name]
        for part, value in self._parts:
            if any(part in name for name in names):
                return value
        for pattern, value in self._patterns:
            if any(pattern.search(name) for name in names):
                return value
        return None


class Schemes:
    """The scheme of each layer, as the export's config declares it.

    Args:
        path: Folder of the export, for messages.
        config: Its `quantization_config`.

    Raises:
        ValueError: The config is of a format that cannot be read.
        CheckpointError: The config contradicts itself, or lacks something.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = config
        method = config.get("quant_method")
        try:
            if method == "compressed-tensors":
                self._exceptions, self._default = _compressed(config, self._unknown)
            elif method in ("auto-round", "gptq", "awq"):
                self._exceptions, self._default = _auto_round(config, self._unknown)
            else:
                raise self._unknown()
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise CheckpointError(
                path, [f"config.json: quantization_config is broken ({error!r})"]
            ) from error

    def _unknown(self) -> ValueError:
        config = self._config
        said = ", ".join(
            f"{key}={config.get(key)!r}"
            for key in ("quant_method", "packing_format", "format", "data_type", "bits")
        )
        return ValueError(
            f"path={str(self._path)!r}: {said}; allowed are exports of AutoRound "
            "as auto_round, auto_gptq, auto_awq (integers; in auto_round also NVFP4, "
            "MXFP4, MXFP8, FP8) and llm_compressor (integers, INT8_W8A8, NVFP4, MXFP4, "
            "MXFP8, FP8)"
        )

    def __call__(self, *names: str) -> Scheme | None:
        """The scheme of a layer, or None where it is declared full precision.

        Args:
            *names: The layer's names: as stored, as its module is called.
        """
        found = self._exceptions.get(names)
        scheme = self._default if found is None else found
        return scheme if isinstance(scheme, Scheme) else None


_FULL_PRECISION = "full precision"


def _auto_round(config: Mapping[str, Any], unknown: Any) -> tuple[Patterns, Scheme]:
    default = _scheme(config, unknown)
    entries: list[tuple[str, Any]] = []
    for name, own in (config.get("extra_config") or {}).items():
        entries.append((name, _own_scheme(config, own, unknown)))
    for name, own in (config.get("dynamic") or {}).items():
        sign, _, pattern = name.partition(":")
        if sign == "-":
            entries.append((pattern, _FULL_PRECISION))
        else:
            entries.append((pattern, _own_scheme(config, own, unknown)))
    for name in config.get("modules_to_not_convert") or ():
        escaped = name if _META.search(name) else re.escape(name)
        entries.append((f".*{escaped}.*", _FULL_PRECISION))
    return Patterns(entries), default


def _own_scheme(
    config: Mapping[str, Any], own: Mapping[str, Any], unknown: Any
) -> Scheme | str:
    merged = {**config, **{k: v for k, v in own.items() if v is not None}}
    if _integer(merged, "bits") >= 16:
        return _FULL_PRECISION
    return _scheme(merged, unknown)


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key}={value!r}, allowed is an int")
    return value


def _scheme(config: Mapping[str, Any], unknown: Any) -> Scheme:
    bits = _integer(config, "bits")
    kind = str(config.get("data_type", "int"))
    packing = f"{config.get('packing_format', '')} {config.get('quant_method')}"
    static = int(config.get("act_bits") or 16) < 16 and (
        config.get("act_dynamic") is False or "static" in str(config["act_data_type"])
    )
    if "group_size" not in config or isinstance(config["group_size"], list):
        raise unknown()
    group_size = _integer(config, "group_size")
    sym = config.get("sym", True)
    if not isinstance(sym, bool):
        raise TypeError(f"sym={sym!r}, allowed is true or false")
    if kind == "int" and 2 <= bits <= 8 and int(config.get("act_bits") or 16) >= 16:
        if "awq" in packing:
            layout = "awq"
        elif "gptq" in packing and "gptqmodel" not in packing:
            layout = "gptq"
        else:
            layout = "int"
    else:
        floats = {("nv_fp", 4): "nvfp4", ("mx_fp", 4): "mxfp4", ("mx_fp", 8): "mxfp8"}
        floats |= {("fp", 8): "fp8"}
        found = floats.get((kind, bits))
        if found is None:
            raise unknown()
        layout = found
    return Scheme(layout, bits, group_size, sym, static)


_COMPRESSED = {
    ("pack-quantized", "int"): "packed",
    ("int-quantized", "int"): "int8",
    ("nvfp4-pack-quantized", "float"): "nvfp4",
    ("mxfp4-pack-quantized", "float"): "mxfp4",
    ("mxfp8-quantized", "float"): "mxfp8",
    ("float-quantized", "float"): "fp8",
}
_SIZES = {"channel": -1, "tensor": 0}


def _compressed(
    config: Mapping[str, Any], unknown: Any
) -> tuple[Patterns, Scheme | None]:
    entries: list[tuple[str, Any]] = []
    default = None
    for group in config["config_groups"].values():
        weights = group["weights"]
        inputs = group.get("input_activations") or {}
        form = group.get("format") or config.get("format")
        layout = _COMPRESSED.get((str(form), str(weights["type"])))
        if layout is None:
            raise unknown()
        strategy = weights["strategy"]
        if strategy in _SIZES:
            size = _SIZES[strategy]
        elif strategy in ("group", "tensor_group"):
            size = _integer(weights, "group_size")
        else:
            raise unknown()
        static = bool(inputs) and (
            inputs.get("dynamic") is False or layout == "nvfp4"  # its global scale
        )
        scheme = Scheme(
            layout, _integer(weights, "num_bits"), size, weights["symmetric"], static
        )
        for target in group["targets"]:
            if target == "Linear":
                default = scheme
            else:
                entries.append((target.removeprefix("re:"), scheme))
    for name in config.get("ignore") or ():
        entries.append((name.removeprefix("re:"), _FULL_PRECISION))
    return Patterns(entries), default
