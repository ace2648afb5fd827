# SPDX-License-Identifier: Apache-2.0
"""What an export's config says about each layer: its format, bits, groups, signs.

There are two kinds of configs: AutoRound's own (also as `gptq` and `awq`, which differ
in how they name exceptions), and that of compressed-tensors. Which format they mean is
said in `vsraq.checkpoint.formats`. Names of layers are looked up in a dictionary;
patterns are compiled once.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vsraq.checkpoint.faults import CheckpointError
from vsraq.checkpoint.formats import exported_kinds, find_format
from vsraq.checkpoint.formats.format import Declared, Scheme

_META = re.compile(r"[\\*+?^$()\[\]{}|]")


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
        try:
            self._exceptions, self._default = _read(config)
        except _UnknownFormatError as error:
            raise ValueError(_unknown(path, config)) from error
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise CheckpointError(
                path, [f"config.json: quantization_config is broken ({error!r})"]
            ) from error

    def __call__(self, *names: str) -> Scheme | None:
        """The scheme of a layer, or None where it is declared full precision.

        Args:
            *names: The layer's names: as stored, as its module is called.
        """
        found = self._exceptions.get(names)
        scheme = self._default if found is None else found
        return scheme if isinstance(scheme, Scheme) else None


_FULL_PRECISION = "full precision"


class _UnknownFormatError(Exception):
    """The config names a format that is not in the table."""


def _unknown(path: Path, config: Mapping[str, Any]) -> str:
    said = ", ".join(
        f"{key}={config.get(key)!r}"
        for key in ("quant_method", "packing_format", "format", "data_type", "bits")
    )
    allowed = ", ".join(
        f"{name} ({', '.join(kinds)})" for name, kinds in exported_kinds().items()
    )
    return (
        f"path={str(path)!r}: {said}; allowed are exports of AutoRound in the formats "
        f"{allowed}; export in one of these"
    )


def _read(config: Mapping[str, Any]) -> tuple[Patterns, Scheme | None]:
    """The exceptions, and the scheme of all other layers."""
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method in ("auto-round", "gptq", "awq"):
        return _auto_round(config)
    raise _UnknownFormatError


def _scheme(declared: Declared) -> Scheme:
    form = find_format(declared)
    if form is None:
        raise _UnknownFormatError
    return form.scheme(declared)


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key}={value!r}, allowed is an int")
    return value


def _auto_round(config: Mapping[str, Any]) -> tuple[Patterns, Scheme]:
    default = _scheme(_declared_by_auto_round(config))
    entries: list[tuple[str, Any]] = []
    for name, overrides in (config.get("extra_config") or {}).items():
        entries.append((name, _layer_scheme(config, overrides)))
    for name, overrides in (config.get("dynamic") or {}).items():
        sign, _, pattern = name.partition(":")
        if sign == "-":
            entries.append((pattern, _FULL_PRECISION))
        else:
            entries.append((pattern, _layer_scheme(config, overrides)))
    for name in config.get("modules_to_not_convert") or ():
        escaped = name if _META.search(name) else re.escape(name)
        entries.append((f".*{escaped}.*", _FULL_PRECISION))
    return Patterns(entries), default


def _layer_scheme(
    config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Scheme | str:
    merged = {**config, **{k: v for k, v in overrides.items() if v is not None}}
    if _integer(merged, "bits") >= 16:
        return _FULL_PRECISION
    return _scheme(_declared_by_auto_round(merged))


def _declared_by_auto_round(config: Mapping[str, Any]) -> Declared:
    bits = _integer(config, "bits")
    quantized_inputs = int(config.get("act_bits") or 16) < 16
    static_inputs = quantized_inputs and (
        config.get("act_dynamic") is False or "static" in str(config["act_data_type"])
    )
    if "group_size" not in config or isinstance(config["group_size"], list):
        raise _UnknownFormatError
    sym = config.get("sym", True)
    group_size = _integer(config, "group_size")
    if not isinstance(sym, bool):
        raise TypeError(f"sym={sym!r}, allowed is true or false")
    return Declared(
        quant_method=str(config["quant_method"]),
        packing=f"{config.get('packing_format', '')} {config['quant_method']}",
        data_type=str(config.get("data_type", "int")),
        bits=bits,
        group_size=group_size,
        sym=sym,
        quantized_inputs=quantized_inputs,
        static_inputs=static_inputs,
    )


_SIZES = {"channel": -1, "tensor": 0}  # of a group, by compressed-tensors' strategy


def _compressed_tensors(
    config: Mapping[str, Any],
) -> tuple[Patterns, Scheme | None]:
    entries: list[tuple[str, Any]] = []
    default = None
    for group in config["config_groups"].values():
        scheme = _scheme(_declared_by_compressed_tensors(config, group))
        for target in group["targets"]:
            if target == "Linear":
                default = scheme
            else:
                entries.append((target.removeprefix("re:"), scheme))
    for name in config.get("ignore") or ():
        entries.append((name.removeprefix("re:"), _FULL_PRECISION))
    return Patterns(entries), default


def _declared_by_compressed_tensors(
    config: Mapping[str, Any], group: Mapping[str, Any]
) -> Declared:
    weights = group["weights"]
    data_type = str(weights["type"])
    inputs = group.get("input_activations") or {}
    strategy = weights["strategy"]
    if strategy in _SIZES:
        size = _SIZES[strategy]
    elif strategy in ("group", "tensor_group"):
        size = _integer(weights, "group_size")
    else:
        raise _UnknownFormatError
    return Declared(
        quant_method=str(config["quant_method"]),
        packing=str(group.get("format") or config.get("format")),
        data_type=data_type,
        bits=_integer(weights, "num_bits"),
        group_size=size,
        sym=weights["symmetric"],
        quantized_inputs=bool(inputs),
        static_inputs=bool(inputs) and inputs.get("dynamic") is False,
    )
