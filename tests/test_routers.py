import pytest
import torch
from torch import nn

import tiny
from vsraq.routers import (
    Router,
    declared_router_classes,
    find_routers,
    router_logits,
    select_experts,
)

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
        assert router.score_function == ("sigmoid" if sigmoid else "softmax")
        assert (router.correction_bias is not None) == sigmoid
        groups = (router.num_groups, router.topk_groups)
        assert groups == GROUPS.get(family, (1, 1))


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
        bias = router.correction_bias and getattr(module, router.correction_bias)
        selected = select_experts(router, logits, bias)
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
    assert find_routers(nn.Sequential(_OldMoE())) == (
        Router("0.gate", 2, 4, "softmax"),
    )


def test_unknown_top_k_is_an_error():
    with pytest.raises(ValueError, match=r"'gate'.*top_k or num_experts_per_tok"):
        find_routers(_OldMoE(top_k=None))


def test_two_candidates_are_an_error():
    moe = _OldMoE()
    moe.other = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"more than one candidate.*gate, other"):
        find_routers(moe)


def test_selection_needs_the_correction_bias():
    router = Router("gate", 1, 4, "sigmoid", "e_score_correction_bias")
    with pytest.raises(ValueError, match="selects by its e_score_correction_bias"):
        select_experts(router, torch.zeros(3, 4))


def test_correction_bias_changes_the_selection():
    router = Router("gate", 1, 2, "sigmoid", "e_score_correction_bias")
    logits = torch.tensor([[1.0, 0.0]])
    assert select_experts(router, logits, torch.zeros(2)).item() == 0
    assert select_experts(router, logits, torch.tensor([0.0, 1.0])).item() == 1
