# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest
import torch

from vsraq import losses
from vsraq.objectives import OBJECTIVES, Objective, get_objective
from vsraq.ranks import rank_logits

E, K = 12, 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_named_objective_reads_no_more_ranks_than_it_says(name):
    objective = get_objective(name)
    fp, q = torch.randn(5, E), torch.randn(5, E)
    target = objective.target(fp, top_k=K)
    assert torch.equal(objective(q, target, top_k=K), objective(q, fp, top_k=K))
    if objective.compares == "inputs":
        assert torch.equal(target, fp)
    else:
        assert target.values.shape == (5, objective.ranks(K, E))


# names of a loss with other values than its function's
PRESETS = {
    "top3k_mse": ("topk_mse", {"multiplier": 3}),
    "top2k_mse": ("topk_mse", {"multiplier": 2}),
    "full_mse": ("topk_mse", {"multiplier": "all"}),
    "ra": ("topk_mse", {"multiplier": 3}),
    "sra": ("topk_mse", {"multiplier": 3}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_names_are_the_losses_with_the_papers_values(name):
    q, fp = torch.randn(5, E), torch.randn(5, E)
    function, values = PRESETS.get(name, (name, {}))
    loss = getattr(losses, function)
    if "top_k" in inspect.signature(loss).parameters:
        values = values | {"top_k": K}
    assert torch.equal(get_objective(name)(q, fp, top_k=K), loss(q, fp, **values))


def test_hyperparameters_replace_the_defaults():
    objective = get_objective({"name": "vsraq", "alpha": 0.0, "boundary": 2})
    assert objective.hyperparameters["alpha"] == 0.0
    assert objective.hyperparameters["gamma"] == 1.0
    assert objective.ranks(K, E) == K + 2
    assert "alpha=0.0" in str(objective)


def test_what_is_compared_is_checked():
    with pytest.raises(ValueError, match=r"compares='input': .* logits or inputs"):
        Objective("mine", losses.input_mse, compares="input")


def test_an_objective_is_immutable():
    objective = get_objective("vsraq")
    with pytest.raises(TypeError):
        objective.hyperparameters["alpha"] = 1.0


def test_your_own_loss():
    def worst(q_logits, fp_logits, *, top_k, power=2.0):
        fp = fp_logits.values
        q = q_logits.gather(-1, fp_logits.indices.long())
        return (q - fp).abs().pow(power)[..., :top_k].amax(-1)

    objective = Objective("worst", worst, {"power": 1.0})
    assert get_objective(objective) is objective
    assert objective.ranks(K, E) == E
    q, fp = torch.randn(5, E), torch.randn(5, E)
    assert objective(q, rank_logits(fp), top_k=K).shape == (5,)
    with pytest.raises(ValueError, match="'worst' has no such hyper-parameter; it has"):
        Objective("worst", worst, {"alpha": 0.5})


@pytest.mark.parametrize(
    ("name", "near"), [("vsrag", "vsraq"), ("topk-mse", "topk_mse"), ("kl", None)]
)
def test_an_unknown_name_lists_the_known_ones(name, near):
    with pytest.raises(ValueError, match=f"objective='{name}': allowed are") as error:
        get_objective(name)
    assert (f"Did you mean '{near}'?" in str(error.value)) == (near is not None)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="is a int: pass one of"):
        get_objective(3)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="alpha=2"):
        get_objective({"name": "vsraq", "alpha": 2})
    with pytest.raises(ValueError, match="'topk_mse' has no such hyper-parameter"):
        get_objective({"name": "topk_mse", "alpha": 0.3})
