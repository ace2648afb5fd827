# SPDX-License-Identifier: Apache-2.0
"""What serving engines load of an export with mixed bits, as data with its sources.

The rules were read in the engines' sources, of the versions that stand here; none of
the engines was run. docs/bits.md shows the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vsraq.strict import did_you_mean

# The layers that engines load as one, by the last part of their names, and the name of
# the one: all of them need one scheme. A layer that is not here stands alone. Not here
# is what engines fuse of Kimi's linear attention (q, k, v with the gates beside and
# below them): its names differ between engines, and from those of transformers.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "r_proj"),  # r: Inkling
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
# Other names of fused layers, in other engines.
ALSO_NAMED: Mapping[str, tuple[str, ...]] = {
    "w13": ("gate_up_proj",),
    "qkv_proj": ("qkvr",),
}


@dataclass(frozen=True)
class Source:
    """Where a rule was read.

    Attributes:
        says: The rule.
        file: Inside the engine's source.
        lines: Lines or functions in it.
    """

    says: str
    file: str
    lines: str


@dataclass(frozen=True)
class Engine:
    """What an engine loads.

    Attributes:
        name: Its name.
        version: The version whose source was read; empty for no engine.
        int_bits: Bits of integer weights, of every layer and of routed experts.
        float_bits: Bits of MX or NV floats beside each other in one export, by
            AutoRound's data type, 16 included; a type that is missing is not loaded.
        formats: AutoRound's export formats that it loads with mixed bits, by data type.
        needs_other_bits: Whether an exception must have other bits than the scheme: it
            takes one that names only a group size for 16 bits.
        fuses: Whether it loads some layers as one, see `FUSED`.
        shares_experts: Whether it may load the shared experts as part of the routed
            ones, so that they need one scheme.
        reads_fused_names: Whether it looks an exception up by the fused layer's name.
        int_groups: Group sizes of integer weights; empty for any.
        symmetric_int: Whether integer weights of AutoRound's formats must be symmetric.
        sources: Where this was read.
    """

    name: str
    version: str
    int_bits: frozenset[int]
    float_bits: Mapping[str, frozenset[int]]
    formats: Mapping[str, frozenset[str]]
    needs_other_bits: bool = False
    fuses: bool = False
    shares_experts: bool = False
    reads_fused_names: bool = False
    int_groups: frozenset[int] = frozenset()
    symmetric_int: bool = False
    sources: tuple[Source, ...] = ()

    def why_not(self, fields: Mapping[str, Any], export_format: str) -> str:
        """Say why an engine does not load layers of a scheme, or return "".

        Args:
            fields: The scheme, by AutoRound's names.
            export_format: AutoRound's name of the export format.
        """
        data_type = str(fields["data_type"])
        bits = fields["bits"]
        if bits >= 16:
            return ""
        family = _family(data_type)
        if family == "int":
            allowed = self.int_bits
        else:
            allowed = self.float_bits.get(family, frozenset())
        if bits not in allowed:
            known = ", ".join(map(str, sorted(allowed))) or "none"
            return f"{self.name} loads {family} weights of {known} bits, not {bits}"
        formats = self.formats.get(family, frozenset())
        if formats and export_format not in formats:
            return (
                f"{self.name} loads mixed {family} weights from the formats "
                f"{', '.join(sorted(formats))}, not from {export_format}"
            )
        return self._why_not_int(fields, export_format) if family == "int" else ""

    def _why_not_int(self, fields: Mapping[str, Any], export_format: str) -> str:
        inputs = fields.get("act_bits") or 16
        if self.version and inputs < 16:
            return f"what {self.name} does with inputs of {inputs} bits was not read"
        group = fields.get("group_size")
        if self.int_groups and group not in self.int_groups:
            known = ", ".join(map(str, sorted(self.int_groups)))
            return f"{self.name} loads int weights in groups of {known}, not {group}"
        own_format = export_format != "llm_compressor"
        if self.symmetric_int and own_format and not fields.get("sym", True):
            return f"{self.name} loads int weights of {export_format} if symmetric only"
        return ""


def _family(data_type: str) -> str:
    """Return the kind of a data type: int, mx_fp, nv_fp, or what it says."""
    return next((f for f in ("mx_fp", "nv_fp", "int") if f in data_type), data_type)


_ALL_BITS = frozenset(range(2, 9))
_FLOATS = {"mx_fp": frozenset({4, 8, 16}), "nv_fp": frozenset({4, 16})}
_INT_FORMATS = frozenset({"auto_round", "auto_round:auto_gptq"})
_MARLIN_GROUPS = frozenset({-1, 32, 64, 128})

_VLLM = Engine(
    name="vllm",
    version="0.33.0",
    int_bits=frozenset({4, 8}),
    float_bits=_FLOATS,
    formats={
        "int": _INT_FORMATS | {"llm_compressor"},
        "mx_fp": frozenset({"auto_round", "llm_compressor"}),
        "nv_fp": frozenset({"llm_compressor"}),
    },
    needs_other_bits=True,
    fuses=True,
    int_groups=_MARLIN_GROUPS,
    symmetric_int=True,
    sources=(
        Source(
            "integers of 4 and 8 bits in AutoRound's formats are symmetric, in groups "
            "of 32, 64, 128 or whole rows",
            "vllm/model_executor/layers/quantization/utils/marlin_utils.py",
            "37, 81-89, 143",
        ),
        Source(
            "integers of 4 and 8 bits have Marlin kernels; 2, 3, 5, 6 and 7 bits go to "
            "the humming kernels, which are not counted here",
            "vllm/model_executor/layers/quantization/inc/schemes/inc_wna16_scheme.py",
            "26, 139-146, 211-216",
        ),
        Source(
            "the layers of a fused one need equal bits, group size and symmetry",
            "vllm/model_executor/layers/quantization/inc/config_parser.py",
            "192-212",
        ),
        Source(
            "the experts of a layer are looked up as one, by a name or a pattern that "
            "ends with their container, never by the name of an expert",
            "vllm/model_executor/layers/quantization/inc/config_parser.py",
            "160-190",
        ),
        Source(
            "an exception without bits counts as 16 bits",
            "vllm/model_executor/layers/quantization/inc/inc.py",
            "325-334",
        ),
        Source(
            "shared experts stay layers of their own",
            "vllm/model_executor/layers/quantization/utils/config_utils.py",
            "373-381",
        ),
        Source(
            "nv_fp is refused in AutoRound's own format",
            "vllm/model_executor/layers/quantization/inc/inc.py",
            "37-45, 87-109",
        ),
        Source(
            "compressed-tensors: several config groups; all layers of a fused one are "
            "ignored, or none; gate, up and down of experts have one scheme",
            "vllm/model_executor/layers/quantization/compressed_tensors/utils.py",
            "53-70, 105-109, 156-176",
        ),
    ),
)

_SGLANG = Engine(
    name="sglang",
    version="0.5.23",
    int_bits=frozenset({4, 8}),
    float_bits={"nv_fp": frozenset({4, 16})},
    formats={"int": _INT_FORMATS, "nv_fp": frozenset({"llm_compressor"})},
    fuses=True,
    shares_experts=True,
    reads_fused_names=True,
    int_groups=_MARLIN_GROUPS,
    symmetric_int=True,
    sources=(
        Source(
            "symmetric, in groups of 32, 64, 128 or whole rows",
            "sglang/srt/layers/quantization/marlin_utils.py",
            "68-139",
        ),
        Source(
            "only the Marlin kernels of 4 and 8 bits are left",
            "sglang/srt/layers/quantization/gptq/schemes/gptq_linear.py",
            "31-35",
        ),
        Source(
            "experts are of 4 or 8 bits",
            "sglang/srt/layers/quantization/moe_wna16.py",
            "490",
        ),
        Source(
            "a fused layer is looked up by its own name where the model does not set "
            "packed_modules_mapping; patterns must match the whole name",
            "sglang/srt/layers/quantization/auto_round.py",
            "139-181, 264-277",
        ),
        Source(
            "shared experts are loaded as routed ones by default (GLM-4.5, "
            "DeepSeek-V3, Qwen3-Next)",
            "sglang/srt/models/deepseek_v2.py",
            "3324-3399",
        ),
    ),
)

_TRANSFORMERS = Engine(
    name="transformers",
    version="5.24.0 with auto-round 0.16.1",
    int_bits=_ALL_BITS,
    float_bits=_FLOATS,
    formats={
        "int": _INT_FORMATS | {"auto_round:gptqmodel"},
        "mx_fp": frozenset({"auto_round"}),
        "nv_fp": frozenset({"auto_round"}),
    },
    sources=(
        Source(
            "integers of 2 to 8 bits, symmetric, on CPU and CUDA",
            "auto_round/inference/backend.py",
            "447-537",
        ),
        Source(
            "every layer has a backend of its own; no layers are fused",
            "auto_round/inference/convert_model.py",
            "417-487",
        ),
        Source(
            "MXFP4, MXFP8 and NVFP4, with the data type of each layer",
            "auto_round/inference/backend.py",
            "316-407",
        ),
    ),
)

# No engine: what AutoRound's formats hold and `verify` reads.
ANY = Engine("None", "", _ALL_BITS, _FLOATS, {})

ENGINES: Mapping[str, Engine] = {e.name: e for e in (_VLLM, _SGLANG, _TRANSFORMERS)}


def get_engine(name: str | None) -> Engine:
    """Return the rules of an engine.

    Args:
        name: Of `ENGINES`; None has no rules but those of the formats.

    Raises:
        ValueError: The name is unknown.
    """
    if name is None:
        return ANY
    if name not in ENGINES:
        raise ValueError(
            f"engine={name!r}: unknown{did_you_mean(name, ENGINES)} Allowed are "
            f"{', '.join(ENGINES)}, or None for no engine's rules"
        )
    return ENGINES[name]


# What AutoRound's export formats hold in one export, beside 16 bits: the data types
# (empty: those of the scheme) and bits. Read in auto-round 0.16.1: export/formats/
# backends/*.py, export_to_llmcompressor/export_to_fp.py:139-149 and 386-441,
# export_to_awq/utils.py:162.
_FORMAT_BITS: Mapping[str, frozenset[int]] = {
    "auto_gptq": frozenset({2, 3, 4, 8}),
    "auto_awq": frozenset({4}),
    "auto_round:auto_awq": frozenset({4}),
}


def why_not_held(
    fields: Mapping[str, Any], scheme: Mapping[str, Any], export_format: str
) -> str:
    """Say why an export format does not hold layers of another scheme, or return "".

    Args:
        fields: The layers' scheme.
        scheme: The scheme of all other layers.
        export_format: AutoRound's name of the export format.
    """
    if fields["bits"] >= 16:
        return ""
    family, base = _family(str(fields["data_type"])), _family(str(scheme["data_type"]))
    mixes = {family, base} <= {"mx_fp", "nv_fp"}
    if family != base and not mixes:
        return f"format {export_format} holds no {family} layers beside {base} ones"
    allowed = _FORMAT_BITS.get(export_format, _ALL_BITS)
    if family == "int" and fields["bits"] not in allowed:
        known = ", ".join(map(str, sorted(allowed)))
        return f"format {export_format} holds weights of {known} bits"
    return ""
