# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import families
import tiny
from vsraq.routers import (
    Router,
    SelectionRule,
    declared_router_classes,
    expert_containers,
    find_routers,
    router_logits,
)

BIASED = SelectionRule("sigmoid", biased=True)
GROUPS = {"glm4_moe": (2, 1), "deepseek_v3": (4, 2)}
SIGMOID = {"solar_open", "glm4_moe", "deepseek_v3", "nemotron_h"}


@pytest.fixture(params=tiny.MOE_FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny.tiny_model(family)


def test_every_moe_layer_has_its_router(family, model):
    routers = find_routers(model)
    assert len(routers) == tiny.MOE_LAYERS[family]
    for router in routers:
        assert router.top_k == tiny.TOP_K
        assert router.num_experts == tiny.EXPERTS
        sigmoid = family in SIGMOID
        groups = GROUPS.get(family, (1, 1))
        assert router.rule == SelectionRule(
            "sigmoid" if sigmoid else "identity", sigmoid, *groups
        )
        assert router.unverified == ""
        bias = f"{router.name}.e_score_correction_bias" if sigmoid else None
        assert router.correction_bias == bias


def test_structure_alone_finds_the_same(model):
    assert find_routers(model, router_classes=()) == find_routers(model)


def test_a_block_has_the_routers_of_the_model(model):
    prefixes = {router.name.split(".layers.")[0] for router in find_routers(model)}
    (prefix,) = prefixes
    classes = declared_router_classes(model)
    in_blocks = []
    for index, block in enumerate(model.get_submodule(f"{prefix}.layers")):
        for router in find_routers(block, router_classes=classes):
            in_blocks.append(f"{prefix}.layers.{index}.{router.name}")
    assert in_blocks == [router.name for router in find_routers(model)]


def test_logits_and_selection_are_the_modules_own(model):
    generator = torch.Generator().manual_seed(0)
    for router in find_routers(model):
        module = model.get_submodule(router.name)
        hidden = torch.randn(50, module.weight.shape[-1], generator=generator)
        with torch.no_grad():
            own_logits, _, own_selected = module(hidden)
        logits = router_logits(module, hidden)
        torch.testing.assert_close(logits, own_logits)
        selected = router.bind(model).select(logits)
        assert torch.equal(selected.sort(-1).values, own_selected.sort(-1).values)


def test_logits_do_not_depend_on_autocast_or_shape(model):
    router = find_routers(model)[0]
    module = model.get_submodule(router.name)
    hidden = torch.randn(2, 5, module.weight.shape[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router_logits(module, hidden)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, router_logits(module, hidden.view(10, -1)))


def test_a_dense_model_has_none():
    assert find_routers(tiny.tiny_model("llama")) == ()


def test_meta_tensors_are_enough():
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(tiny.CONFIGS["solar_open"]())
    assert find_routers(model) == find_routers(tiny.tiny_model("solar_open"))


class _OldMoE(nn.Module):
    """The layout of transformers 4 and of remote code: linear gate, list of experts."""

    def __init__(self, top_k=2):
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.shared_expert_gate = nn.Linear(16, 1, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        if top_k is not None:
            self.num_experts_per_tok = top_k


def test_linear_gates_are_found_by_structure():
    (router,) = find_routers(nn.Sequential(_OldMoE()))
    assert router == Router("0.gate", 2, 4, SelectionRule())
    assert "other code chooses; the highest are assumed to win" in router.unverified


def test_a_pattern_names_routers_that_are_not_found():
    moe = _OldMoE()
    moe.experts = nn.Identity()
    model = nn.Sequential(moe)
    assert find_routers(model) == ()
    (router,) = find_routers(model, router_pattern="gate")
    assert router == Router("0.gate", 2, 4)
    assert find_routers(model, router_pattern="ate") == ()
    with pytest.raises(ValueError, match=r"matches '0.experts' \(Identity\)"):
        find_routers(model, router_pattern=r".*experts")


def test_a_pattern_keeps_the_rule():
    """Also where the map is inside the router, and the bias beside it."""
    model = families.tiny_family("afmoe")
    assert find_routers(model, router_pattern=r"router\.gate") == find_routers(model)


class _BiasBeside(_OldMoE):
    """Remote code: the layer adds the bias to what a linear gate returns."""

    def __init__(self):
        super().__init__()
        self.expert_bias = nn.Parameter(torch.zeros(4))


def test_a_bias_beside_a_linear_gate_is_not_overlooked():
    (router,) = find_routers(nn.Sequential(_BiasBeside()))
    assert router.rule is None


class _TwoMatricesMoE(nn.Module):
    """A module for each matrix of all experts, and convolutions that are none."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.input_linear = _Stack(4)
        self.output_linear = _Stack(4)
        self.conv = nn.Conv1d(16, 16, 3)
        self.top_k = 2


class _Stack(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, 16, 16))


def test_experts_of_one_module_per_matrix():
    model = nn.Sequential(_TwoMatricesMoE())
    routers = find_routers(model)
    assert [router.name for router in routers] == ["0.router"]
    assert expert_containers(model, routers) == ("0.input_linear", "0.output_linear")


def test_unknown_top_k_is_an_error():
    with pytest.raises(ValueError, match=r"'gate'.*top_k or num_experts_per_tok"):
        find_routers(_OldMoE(top_k=None))


def test_two_candidates_are_an_error():
    moe = _OldMoE()
    moe.other = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"more than one candidate.*gate, other"):
        find_routers(moe)


def test_selection_needs_the_correction_bias():
    with pytest.raises(ValueError, match="selects by a correction bias"):
        BIASED.scores(torch.zeros(3, 4))


def test_an_unknown_rule_is_an_error():
    router = Router("gate", 1, 4, None, unverified="it needs token ids")
    with pytest.raises(ValueError, match=r"'gate'.*unknown, because it needs token"):
        router.bind(nn.ModuleDict({"gate": nn.Linear(2, 4)})).select(torch.zeros(3, 4))


def test_correction_bias_changes_the_selection():
    router = Router("gate", 1, 2, BIASED, "gate.bias")
    logits = torch.tensor([[1.0, 0.0]])
    module = nn.ModuleDict({"gate": nn.Linear(2, 2)})
    module.gate.bias.data.zero_()
    bound = router.bind(module)
    assert bound.select(logits).item() == 0
    module.gate.bias.data[1] = 1
    assert bound.select(logits).item() == 1
