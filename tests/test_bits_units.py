# SPDX-License-Identifier: Apache-2.0
"""Which layers share a scheme, found in models as AutoRound prepares them."""

import functools
import re
from collections import defaultdict

import pytest
import torch

import families
import tiny
from family_table import WITH_IMAGES, read
from prepared import prepare
from vsraq.autoround.block_copy import split_experts
from vsraq.bits.engines import get_engine
from vsraq.bits.units import find_units

# one of each kind: run with every `pytest`, the others with --full
SOME = [
    "afmoe",  # a gate beside q, k and v, named like that of an expert
    "gemma4",  # experts beside attention, not inside of a MLP
    "jamba",  # mamba, and experts in some layers
    "lfm2_moe",  # w1 and w3
    f"qwen3_5_moe{WITH_IMAGES}",  # linear attention, experts that AutoRound replaces
]
# No engine loads these with what reads the same input, or not by these names.
NOT_FUSED = {
    "gate_proj",  # of attention: afmoe, beam, muse_spark
    "output_gate",  # minimax
    "kv_a_proj_with_mqa",  # with q_a_proj only, and not with q_proj
    "g_proj",  # linear attention
    "g_a_proj",
    "v_proj_current",  # zaya
    "v_proj_delayed",
}


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        working = [name for name, row in read().items() if row.works]
        # the text of its two decoders is not in one list of blocks
        working = [name for name in working if name != f"dots3_note{WITH_IMAGES}"]
        metafunc.parametrize("family", working if every else SOME)


@functools.cache
def prepared(family):
    if family in tiny.CONFIGS:
        return prepare(tiny.tiny_model(family), group_size=32)
    name = family.removesuffix(WITH_IMAGES)
    multimodal = True if name != family else None
    return prepare(families.tiny_family(name, multimodal=multimodal), group_size=32)


def units_of(found, engine="vllm"):
    layers = list(found.layers)
    return find_units(found.module, layers, found.model.routers, get_engine(engine))


def kinds(units):
    """Names without the numbers of layers -> (layers in a unit, read)."""
    return {
        re.sub(r"layers\.\d+\.", "", u.name).removeprefix("model."): (
            len(u.layers),
            u.read,
        )
        for u in units
    }


ATTENTION = {"self_attn.qkv_proj": (3, 1.0), "self_attn.o_proj": (1, 1.0)}
DENSE = {"mlp.gate_up_proj": (2, 1.0), "mlp.down_proj": (1, 1.0)}
SHARED = {
    "mlp.shared_experts.gate_up_proj": (2, 1.0),
    "mlp.shared_experts.down_proj": (1, 1.0),
}
EXPERTS = {"mlp.experts": (24, 0.25)}
EXPECTED = {
    "solar_open": ATTENTION | EXPERTS | SHARED,
    "glm4_moe": ATTENTION | DENSE | EXPERTS | SHARED,
    "deepseek_v3": {
        "self_attn.q_a_proj": (1, 1.0),  # the other half has 48 outputs: 16 bits
        "self_attn.q_b_proj": (1, 1.0),
        "self_attn.kv_b_proj": (1, 1.0),
        "self_attn.o_proj": (1, 1.0),
    }
    | DENSE
    | EXPERTS
    | SHARED,
    "nemotron_h": {
        "mixer.out_proj": (1, 1.0),
        "mixer.experts": (16, 0.25),
        "mixer.shared_experts.up_proj": (1, 1.0),  # no gate
        "mixer.shared_experts.down_proj": (1, 1.0),
        "mixer.qkv_proj": (3, 1.0),
        "mixer.o_proj": (1, 1.0),
    },
    "qwen2_moe": ATTENTION
    | EXPERTS
    | {
        "mlp.shared_expert.gate_up_proj": (2, 1.0),
        "mlp.shared_expert.down_proj": (1, 1.0),
    },
    "mixtral": ATTENTION | EXPERTS,
    "gpt_oss": ATTENTION | EXPERTS,
    "granitemoe": ATTENTION | {"block_sparse_moe.experts": (24, 0.25)},
}


@pytest.mark.parametrize("known", EXPECTED)
def test_units_by_name(known):
    assert kinds(units_of(prepared(known))) == EXPECTED[known]


def test_sglang_loads_shared_experts_with_routed_ones():
    units = units_of(prepared("solar_open"), "sglang")
    # 24 of 27 layers are routed, all of one size
    shared = {"mlp.experts": (27, (24 / 4 + 3) / 27)}
    assert kinds(units) == ATTENTION | shared
    assert kinds(units_of(prepared("glm4_moe"), "sglang")) == ATTENTION | DENSE | shared


def test_what_stands_beside_experts_is_not_shared_with_them():
    """In some families the block itself holds the experts, and attention."""
    found = prepared("gemma4")
    assert units_of(found, "sglang") == units_of(found, "vllm")


def test_a_layer_with_a_scale_dtype_of_its_own_is_refused():
    """AutoRound takes a dtype there, which a plan's file cannot hold."""
    own = {"model.layers.0.self_attn.o_proj": {"bits": 8, "scale_dtype": torch.float32}}
    message = "o_proj has scale_dtype=torch.float32, which a bit plan does not keep"
    with pytest.raises(ValueError, match=message):
        prepare(tiny.tiny_model("olmoe"), group_size=32, layer_config=own)


def test_shared_experts_alone_are_no_experts():
    """Where AutoRound leaves the routed ones in full precision."""
    found = prepared("solar_open")
    layers = [n for n in found.layers if ".experts." not in n]
    sglang = get_engine("sglang")
    units = find_units(found.module, layers, found.model.routers, sglang)
    assert kinds(units) == ATTENTION | SHARED
    assert not any(unit.is_experts for unit in units)


# ── every family ──────────────────────────────────────────────────────────────


def readers_of_one_tensor(found):
    """Sets of layers that get the same tensor, routed experts left out."""
    for block in found.model.blocks:
        split_experts(found.module.get_submodule(block))
    kept, readers, handles = [], defaultdict(set), []
    for name in found.layers:

        def record(_module, args, kwargs, name=name):
            tensor = args[0] if args else next(iter(kwargs.values()))
            kept.append(tensor)  # so that no other gets its id
            readers[id(tensor)].add(name)

        layer = found.module.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    try:
        with torch.no_grad():
            found.module(input_ids=torch.cat(tiny.calibration(2)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return readers.values()


def test_structure(family):
    found = prepared(family)
    units = units_of(found)
    assert sorted(n for u in units for n in u.layers) == sorted(found.layers)
    assert len({u.name for u in units}) == len(units)
    unit_of = {layer: unit for unit in units for layer in unit.layers}
    by_router = {r.name: r for r in found.model.routers}
    experts = [unit for unit in units if unit.is_experts]
    for unit in experts:
        assert 0 < unit.read < 1
        assert all(re.search(r"\.\d+\.\w+$", layer) for layer in unit.layers)
        around = unit.name.rpartition(".")[0]
        beside = [r for name, r in by_router.items() if name.startswith(around)]
        assert len(beside) == 1  # all routed experts of a layer are one unit
        (router,) = beside
        numbers = {re.search(r"\.(\d+)\.\w+$", n).group(1) for n in unit.layers}
        assert unit.read == router.top_k / len(numbers)
    routed = {layer for unit in experts for layer in unit.layers}
    assert not any(
        re.search(r"experts\.\d+\.", n) for n in found.layers if n not in routed
    )
    for layers in readers_of_one_tensor(found):
        siblings = defaultdict(set)
        for layer in layers - routed:
            parent, _, part = layer.rpartition(".")
            if part not in NOT_FUSED:
                siblings[parent].add(unit_of[layer].name)
        assert all(len(names) == 1 for names in siblings.values()), siblings


def test_without_an_engine_that_fuses_only_experts_are_one():
    units = units_of(prepared("qwen2_moe"), None)
    assert units == units_of(prepared("qwen2_moe"), "transformers")
    assert kinds(units) == EXPERTS | {
        **{f"self_attn.{part}_proj": (1, 1.0) for part in "qkvo"},
        **{f"mlp.shared_expert.{p}_proj": (1, 1.0) for p in ("gate", "up", "down")},
    }
