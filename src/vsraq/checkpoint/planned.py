# SPDX-License-Identifier: Apache-2.0
"""The bit plan beside an export: whether its layers have the schemes that were planned.

The file is read here as it is, and its `layer_config` is looked up here, so that an
error of a run, or of AutoRound's own look-up, is seen.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vsraq.checkpoint.formats.format import Scheme
from vsraq.checkpoint.names import OwnNames
from vsraq.checkpoint.reader import Checkpoint

PLAN_FILE = "vsraq_bit_plan.json"
PLAN_FORMAT = "vsraq bit plan 2"
# of a config and those inside it; they differ between copies of one model
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vsraq",
    }
)
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, re.error)
_META = re.compile(r"[\\*+?^$()\[\]{}|]")


def config_digest(config: Any) -> str:
    """Return a digest of what a model's config says of its structure.

    Args:
        config: A transformers config.
    """
    # what a class says of itself may differ between versions of transformers
    text = json.dumps(_lasting(config.to_diff_dict()), sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def check_plan_file(content: dict[str, Any]) -> None:
    """Refuse a plan that is not as it was written.

    Args:
        content: What the file says.

    Raises:
        ValueError: It has another format, or was changed.
    """
    found = content.get("format")
    if found != PLAN_FORMAT:
        raise ValueError(f"format {found!r}, not {PLAN_FORMAT!r}")
    if content.get("digest") != plan_digest(content):
        raise ValueError(
            "it was changed after it was written; make a plan anew, or change its "
            "layer_config where AutoRound gets it"
        )


def plan_digest(content: Mapping[str, Any]) -> str:
    """Return a digest of what the file of a plan says."""
    said = {name: value for name, value in content.items() if name != "digest"}
    text = json.dumps(said, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _lasting(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _lasting(v) for k, v in value.items() if k not in _VOLATILE}


class PlannedLayers:
    """The schemes of a plan's layers, by AutoRound's names of their fields.

    As AutoRound looks them up: an entry is a layer's name, the name of a module that
    the layer is in, or a regular expression with bare dots; patterns win.

    Args:
        default: The scheme of layers without an entry.
        entries: The plan's `layer_config`.
        layers: Names of its layers.
    """

    def __init__(
        self,
        default: Mapping[str, Any],
        entries: Mapping[str, Mapping[str, Any]],
        layers: Iterable[str],
    ) -> None:
        self._default: dict[str, Any] = dict(default)
        self._layers = tuple(layers)
        own = {name: dict(fields) for name, fields in entries.items()}
        # a module's name may end with a dot, so that it begins no other name
        self._names = {
            n.removesuffix("."): f for n, f in own.items() if not _META.search(n)
        }
        self._patterns = [
            # what stands before a pattern's first sign is compared first: it is faster
            (_META.split(name)[0].removesuffix("."), to_pattern(name), fields)
            for name, fields in own.items()
            if _META.search(name)
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: str) -> dict[str, Any]:
        for head, pattern, fields in self._patterns:
            if head in layer and pattern.search(layer):
                return {**self._default, **fields}
        parts = layer.split(".")
        for depth in range(len(parts), 0, -1):
            found = self._names.get(".".join(parts[:depth]))
            if found is not None:
                return {**self._default, **found}
        return dict(self._default)


def to_pattern(name: str) -> re.Pattern[str]:
    """Compile a name or pattern of a `layer_config` as AutoRound does.

    Dots are dots, except before a star. A match may lie anywhere in a layer's name.
    """
    return re.compile(re.sub(r"\.(?!\*)", r"\\.", name))


def is_ignored(layer: str, ignore_layers: str) -> bool:
    """Whether AutoRound's `ignore_layers`, parts of names, names a layer."""
    parts = (part.strip() for part in ignore_layers.split(","))
    return any(part and part in layer for part in parts)


def read_layers(path: Path) -> tuple[str, PlannedLayers]:
    """Read a kept plan.

    Returns:
        The digest of the config that it was made for, and its layers.

    Raises:
        ValueError: It is no bit plan.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        check_plan_file(plan)
        names = [name for unit in plan["units"] for name in unit["layers"]]
        layers = PlannedLayers(plan["default"], plan["layer_config"], names)
        for name in layers:
            if layers[name]["bits"] < 16:
                int(layers[name]["group_size"])
        return str(plan["config_digest"]), layers
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from error
    except _BROKEN as error:
        raise ValueError(f"no bit plan ({error!r})") from error


def check_plan(
    export: Checkpoint,
    config: Any,
    quantized: set[str],
    own_name: OwnNames,
) -> tuple[int, list[str]]:
    """Check that planned layers have their schemes, if the export holds a plan.

    Args:
        export: The export.
        config: The reference's transformers config, or None.
        quantized: Stored names of its layers with quantized weights.
        own_name: The module's names of layers, by which a plan has them.

    Returns:
        How many layers were planned, and the faults.
    """
    path = export.path / PLAN_FILE
    if not path.exists():
        return 0, []
    try:
        digest, planned = read_layers(path)
    except ValueError as error:
        return 0, [f"{PLAN_FILE}: {error}"]
    if config is not None and digest != config_digest(config):
        return 0, [
            f"{PLAN_FILE}: it was made for a model with another config than the "
            "reference's; export again with a plan for this model"
        ]
    plain = {n.removesuffix(".weight") for n in export if n.endswith(".weight")}
    known = plain | quantized
    stored = {own_name(name): name for name in known}
    faults = []
    for layer in planned:
        name = stored.get(layer, layer)
        if name not in known:
            faults.append(f"{layer}: planned {_said(planned[layer])}; it is not there")
            continue
        scheme = export.schemes(name, layer) if name in quantized else None
        if not _is_planned(scheme, planned[layer]):
            found = _said(vars(scheme) if scheme else {"bits": 16})
            faults.append(
                f"{layer}: planned {_said(planned[layer])}; the export has {found}"
            )
    return len(planned), faults


def _is_planned(scheme: Scheme | None, fields: Mapping[str, Any]) -> bool:
    if scheme is None or fields["bits"] >= 16:
        return scheme is None and fields["bits"] >= 16
    planned = fields["bits"], fields["group_size"], fields.get("sym", True)
    return (scheme.bits, scheme.group_size, scheme.sym) == planned


def _said(fields: Mapping[str, Any]) -> str:
    """Say what a scheme is."""
    if fields["bits"] >= 16:
        return "16 bits"
    sign = "symmetric" if fields.get("sym", True) else "asymmetric"
    return f"{fields['bits']} bits, group size {fields['group_size']}, {sign}"
