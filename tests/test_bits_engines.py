# SPDX-License-Identifier: Apache-2.0
"""Rules of engines, and exceptions as AutoRound and engines understand them."""

import random
import re

import pytest

import tiny
from prepared import prepare, resolve
from vsraq.autoround.plan_bits import default_options, plan_bits
from vsraq.autoround.planning import OWN, find_candidates, scheme_fields
from vsraq.bits.engines import ENGINES, FUSED, get_engine, why_not_held
from vsraq.bits.exceptions import check_layers, exceptions
from vsraq.bits.units import Unit, find_units

# ── rules ─────────────────────────────────────────────────────────────────────

W4 = scheme_fields("W4A16")


@pytest.mark.parametrize(
    ("engine", "fields", "export_format", "reason"),
    [
        ("vllm", W4, "auto_round", ""),
        ("vllm", scheme_fields("W8A16"), "llm_compressor", ""),
        ("vllm", scheme_fields("BF16"), "auto_round", ""),
        (
            "vllm",
            scheme_fields("W3A16"),
            "auto_round",
            "int weights of 4, 8 bits, not 3",
        ),
        (
            "vllm",
            scheme_fields("W2A16"),
            "auto_round",
            "int weights of 4, 8 bits, not 2",
        ),
        ("vllm", W4, "auto_awq", "mixed int weights from the formats auto_round, "),
        ("vllm", W4 | {"group_size": 16}, "auto_round", "in groups of -1, 32, 64, 128"),
        ("vllm", W4 | {"sym": False}, "auto_round", "if symmetric only"),
        ("vllm", W4 | {"sym": False}, "llm_compressor", ""),
        ("vllm", scheme_fields("NVFP4"), "llm_compressor", ""),
        ("vllm", scheme_fields("NVFP4"), "auto_round", "llm_compressor, not from auto"),
        ("vllm", scheme_fields("MXFP4"), "auto_round", ""),
        ("vllm", scheme_fields("MXFP8"), "llm_compressor", ""),
        ("sglang", W4, "auto_round", ""),
        ("sglang", W4, "llm_compressor", "not from llm_compressor"),
        ("sglang", scheme_fields("W3A16"), "auto_round", "not 3"),
        ("sglang", W4 | {"sym": False}, "auto_round", "if symmetric only"),
        ("sglang", scheme_fields("NVFP4"), "llm_compressor", ""),
        ("sglang", scheme_fields("MXFP4"), "llm_compressor", "mx_fp weights of none"),
        ("transformers", scheme_fields("W3A16"), "auto_round", ""),
        ("transformers", W4 | {"group_size": 16}, "auto_round", ""),
        ("transformers", scheme_fields("NVFP4"), "auto_round", ""),
        ("transformers", scheme_fields("NVFP4"), "llm_compressor", "not from llm_comp"),
        ("transformers", scheme_fields("MXFP8"), "auto_round", ""),
        (None, scheme_fields("W2A16"), "auto_gptq", ""),
        (None, scheme_fields("FP8_STATIC"), "auto_round", "fp weights of none bits"),
        ("vllm", scheme_fields("INT8_W8A8"), "llm_compressor", "8 bits was not read"),
    ],
)
def test_what_an_engine_loads(engine, fields, export_format, reason):
    found = get_engine(engine).why_not(fields, export_format)
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("fields", "scheme", "export_format", "reason"),
    [
        ("W8A16", "W4A16", "auto_gptq", ""),
        ("W5A16", "W4A16", "auto_round", ""),
        ("W5A16", "W4A16", "auto_gptq", "auto_gptq holds weights of 2, 3, 4, 8 bits"),
        ("W8A16", "W4A16", "auto_awq", "auto_awq holds weights of 4 bits"),
        ("W4A16", "NVFP4", "llm_compressor", "holds no int layers beside nv_fp ones"),
        ("MXFP8", "NVFP4", "llm_compressor", ""),
        ("BF16", "NVFP4", "auto_round", ""),
    ],
)
def test_what_a_format_holds(fields, scheme, export_format, reason):
    default = scheme_fields(scheme)
    found = why_not_held(scheme_fields(fields), default, export_format)
    assert reason in found
    assert bool(reason) == bool(found)


def test_an_unknown_engine():
    with pytest.raises(ValueError, match=r"engine='vlm': unknown.* vllm.*Allowed are"):
        get_engine("vlm")


def test_every_rule_has_a_source():
    for engine in ENGINES.values():
        assert engine.version
        for source in engine.sources:
            assert source.says
            assert re.fullmatch(r"[\w/]+\.py", source.file)
            assert re.fullmatch(r"\d+(-\d+)?(, \d+(-\d+)?)*", source.lines)
    names = [part for parts in FUSED.values() for part in parts]
    assert len(set(names)) == len(names)


def test_default_options_are_what_engines_load():
    def options(engine, scheme="W4A16", export_format="auto_round"):
        return default_options(scheme, get_engine(engine), export_format)

    every = ["W2A16", "W3A16", "W5A16", "W6A16", "W8A16"]
    assert options(None) == options("transformers") == every
    assert options("vllm") == options("sglang") == ["W8A16"]
    assert options(None, export_format="auto_gptq") == ["W2A16", "W3A16", "W8A16"]
    assert options("vllm", "MXFP4") == ["MXFP8", "BF16"]
    assert options("vllm", "W4A16_MIXED") == ["W8A16"]
    for engine, form in ((None, "auto_round"), ("vllm", "llm_compressor")):
        assert options(engine, "NVFP4", form) == ["MXFP8", "BF16"]


def test_three_bits_are_refused():
    unit = Unit("a.experts", ("a.experts.0.up_proj",), 0.25, True)
    vllm = get_engine("vllm")
    layers = dict.fromkeys(unit.layers, W4) | {"a.o_proj": W4}
    with pytest.raises(ValueError, match="W3A16 is not allowed, because vllm loads"):
        find_candidates([unit], layers, "W4A16", ["W3A16"], vllm, "auto_round")
    with pytest.raises(
        ValueError, match=r"W4A16G64 .* an exception without other bits"
    ):
        find_candidates([unit], layers, "W4A16", ["W4A16G64"], vllm, "auto_round")
    dense = Unit("a.o_proj", ("a.o_proj",))
    rules = get_engine(None)
    with pytest.raises(ValueError, match=r"no unit may have W2A16; .* routed experts"):
        find_candidates([dense], layers, "W4A16", ["W2A16"], rules, "auto_round")


def test_the_groups_of_an_option():
    """Those of the layer, if the option's name has none; else those of the name."""
    dense = Unit("a.o_proj", ("a.o_proj",))
    own = {"a.o_proj": W4 | {"group_size": 32}}

    def groups(*names):
        found = find_candidates(
            [dense], own, "W4A16", names, get_engine(None), "auto_round"
        )
        schemes = found.schemes["a.o_proj"].items()
        return {name: fields["a.o_proj"]["group_size"] for name, fields in schemes}

    assert groups("W8A16", "W4A16G64") == {"W4A16": 32, "W8A16": 32, "W4A16G64": 64}
    named = find_candidates(
        [dense], own, "W4A16G32", ["W8A16"], get_engine(None), "auto_round"
    )
    assert named.schemes["a.o_proj"]["W8A16"]["a.o_proj"]["group_size"] == 32
    with pytest.raises(ValueError, match=r"W4A16G32; .* have already"):
        groups("W4A16G32")
    inputs = groups("INT8_W8A8")
    assert inputs == {"W4A16": 32, "INT8_W8A8": -1}


def test_a_layer_of_the_users_is_named_by_its_own_scheme():
    rules = get_engine(None)

    def candidates(own, options):
        unit = Unit("a.o_proj", ("a.o_proj",))
        layers = {"a.o_proj": W4 | own}
        arguments = [unit], layers, "W4A16", options, rules, "auto_round"
        found = find_candidates(*arguments)
        return found.base["a.o_proj"], found.schemes["a.o_proj"]

    base, schemes = candidates({"bits": 8, "group_size": 32}, ["W8A16", "W3A16"])
    assert base == next(iter(schemes)) == "W8A16"
    bits = {name: fields["a.o_proj"]["bits"] for name, fields in schemes.items()}
    assert bits == {"W8A16": 8, "W4A16": 4, "W3A16": 3}
    assert {f["a.o_proj"]["group_size"] for f in schemes.values()} == {32}
    base, schemes = candidates({"bits": 8}, ["W3A16"])
    assert (base, list(schemes)) == ("W8A16", ["W8A16", "W4A16", "W3A16"])
    # two layers of one unit, each with bits of its own
    unit = Unit(
        "a.experts", ("a.experts.0.up_proj", "a.experts.0.down_proj"), 0.5, True
    )
    layers = dict(zip(unit.layers, (W4, W4 | {"bits": 8}), strict=True))
    found = find_candidates([unit], layers, "W4A16", ["W8A16"], rules, "auto_round")
    assert found.base == {"a.experts": OWN}
    assert list(found.schemes["a.experts"]) == [OWN, "W4A16", "W8A16"]


def test_a_scheme_that_is_not_there():
    with pytest.raises(ValueError, match=r"'W9A16': unknown; did you mean W.A16"):
        scheme_fields("W9A16")
    # before the model is touched
    with pytest.raises(ValueError, match="scheme 'W9A16': unknown"):
        plan_bits(None, options=["W9A16"])


GROUP = {"group_size": 64}


@pytest.mark.parametrize(
    ("engine", "own", "message"),
    [
        ("vllm", GROUP, "vllm reads an exception without other bits as 16"),
        ("sglang", GROUP, "sglang loads it as one with a.q_proj, which differs"),
        ("vllm", {"bits": 8}, "vllm loads it as one with a.q_proj, which differs"),
        ("sglang", {"group_size": 16}, "sglang loads int weights in groups of"),
        ("vllm", {"bits": 3}, "vllm loads int weights of 4, 8 bits, not 3"),
        ("transformers", GROUP, None),
        (None, {"bits": 3, "sym": False}, None),
    ],
)
def test_layers_that_an_engine_does_not_load_as_they_are(engine, own, message):
    unit = Unit("a.qkv_proj", ("a.q_proj", "a.k_proj"))
    layers = {"a.q_proj": W4, "a.k_proj": W4 | own}
    arguments = [unit], layers, W4, get_engine(engine), "auto_round"
    if message is None:
        check_layers(*arguments)
    else:
        with pytest.raises(ValueError, match=f"layer_config: a.k_proj is .*{message}"):
            check_layers(*arguments)


# ── exceptions ────────────────────────────────────────────────────────────────

SOME = ["solar_open", "qwen2_moe", "nemotron_h", "gpt_oss"]
OWN_GROUPS = {"down_proj": {"group_size": 16}, "o_proj": {"group_size": 64}}
CASES = [
    ("W4A16", "auto_round", "vllm", {}),
    ("W4A16", "auto_round", "sglang", {}),
    ("W4A16", "auto_round", None, OWN_GROUPS),
    ("MXFP4", "auto_round", "vllm", {}),
]


def pytest_generate_tests(metafunc):
    if "known" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("known", tiny.MOE_FAMILIES if full else SOME)


def quantized_only(layers):
    return {n: f for n, f in layers.items() if f["bits"] < 16}


def planned(known, scheme, export_format, engine, own, seed):
    """A choice by chance: the units, schemes of all layers, and its exceptions."""
    options = {"group_size": 32} if scheme == "W4A16" else {}
    model = tiny.tiny_model(known)
    found = prepare(model, scheme, export_format, layer_config=own, **options)
    rules = get_engine(engine)
    has_head = seed % 2 and not found.module.config.tie_word_embeddings
    layers = found.layers | (found.head_layer() if has_head else {})
    units = find_units(found.module, list(layers), found.model.routers, rules)
    check_layers(units, found.layers | layers, found.default, rules, export_format)
    names = default_options(scheme, rules, export_format)
    candidates = find_candidates(units, layers, scheme, names, rules, export_format)
    rng = random.Random(seed)
    schemes = dict(found.all_layers)
    for unit in units:
        schemes |= candidates.schemes[unit.name][
            rng.choice([*candidates.schemes[unit.name]])
        ]
    layer_config = exceptions(
        units, schemes, found.default, rules, outside=found.outside(schemes)
    )
    again = resolve(
        tiny.tiny_model(known),
        scheme,
        export_format,
        layer_config=layer_config,
        **options,
    )
    return units, schemes, layer_config, again


@pytest.mark.parametrize(("scheme", "export_format", "engine", "own"), CASES)
def test_autoround_resolves_what_was_planned(
    known, scheme, export_format, engine, own, full
):
    for seed in (0, 1) if full else (1,):  # odd ones have an output projection
        units, schemes, layer_config, again = planned(
            known, scheme, export_format, engine, own, seed
        )
        assert quantized_only(again) == quantized_only(schemes)
        different = 0
        for unit in units:
            fields = [schemes[layer] for layer in unit.layers]
            different += fields[0]["bits"] != scheme_fields(scheme)["bits"]
            if engine is not None:
                assert all(f == fields[0] for f in fields)
        assert different > 1
        if engine is not None:
            check_lookups(units, schemes, layer_config, engine)


def check_lookups(units, schemes, layer_config, engine):
    """Engines find the exception of each unit, by rules of their own."""
    default = W4
    for unit in units:
        scheme = schemes[unit.layers[0]]
        if scheme["bits"] == default["bits"] or unit.layers == ("lm_head",):
            continue
        # the export has a name as it is, anything else as a pattern around it
        entries = {
            name: fields
            for name, fields in layer_config.items()
            if re.search(re.escape(name) if "(" not in name else name, unit.name)
        }
        if unit.is_experts or (engine == "sglang" and len(unit.layers) > 1):
            assert len(entries) == 1, unit
            assert next(iter(entries.values()))["bits"] == scheme["bits"]
        else:
            assert all(layer_config[n]["bits"] == scheme["bits"] for n in unit.layers)


def test_patterns_of_fused_layers():
    units = [
        Unit("a.qkv_proj", ("a.q_proj", "a.k_proj", "a.v_proj")),
        Unit("a.o_proj", ("a.o_proj",)),
        Unit("a.w13", ("a.w1", "a.w3")),
    ]
    schemes = {n: W4 | {"bits": 8} for u in units for n in u.layers}
    assert exceptions(units, schemes, W4, get_engine("sglang")) == {
        "a.(q_proj|k_proj|v_proj|qkv_proj|qkvr)": {"bits": 8},
        "a.o_proj": {"bits": 8},
        "a.(w1|w3|w13|gate_up_proj)": {"bits": 8},
    }
    assert exceptions(units, schemes, W4, get_engine("vllm")) == {
        n: {"bits": 8} for n in schemes
    }


def test_nothing_differs():
    unit = Unit("a.o_proj", ("a.o_proj",))
    assert exceptions([unit], {"a.o_proj": W4}, W4, get_engine("vllm")) == {}


def test_a_layer_among_experts_that_cannot_be_quantized():
    """AutoRound would write its 16 bits into the entry that all experts share."""
    layers = tuple(f"m.0.experts.{i}.{p}" for i in (0, 1) for p in ("up_proj", "gate"))
    unit = Unit("m.0.experts", layers, 0.5, True)
    schemes = {n: W4 | {"bits": 8} for n in layers}
    outside = {f"m.0.experts.{i}.down_proj": {"bits": 16} for i in (0, 1)}
    found = exceptions([unit], schemes | outside, W4, get_engine(None))
    assert (
        found
        == {
            "m.0.experts.*up_proj": {"bits": 8},
            "m.0.experts.*gate": {"bits": 8},
        }
        | outside
    )
