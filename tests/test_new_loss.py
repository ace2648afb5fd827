# SPDX-License-Identifier: Apache-2.0
"""A new loss is a function and a row of the table, as CONTRIBUTING says."""

import math

import pytest
import torch
from safetensors.torch import load_file

import tiny
from vsraq import VSRAQConfig, hyperparameters, losses, objectives
from vsraq.checkpoint import verify
from vsraq.hyperparameters import check_hyperparameters
from vsraq.objectives import OBJECTIVES, Objective
from vsraq.ranks import rank_logits
from vsraq.recipe import build, parse_recipe
from vsraq.yaml_text import parse_yaml, write_yaml


def log_cosh(q_logits, fp_logits, *, top_k, sharpness=1.0):
    """(1/K) sum_{i<=K} log cosh(s (zq_pi(i) - zf_pi(i))) / s, with s the sharpness."""
    check_hyperparameters(top_k=top_k, sharpness=sharpness)
    if isinstance(fp_logits, torch.Tensor):
        fp_logits = rank_logits(fp_logits, top_k)
    q = q_logits.float().gather(-1, fp_logits.indices.long()[..., :top_k])
    error = (q - fp_logits.values[..., :top_k]) * sharpness
    return (error + torch.nn.functional.softplus(-2 * error) - math.log(2)).mean(
        -1
    ) / sharpness


def twin(q, fp, *, top_k, sharpness=1.0):
    first = sorted(range(len(fp)), key=lambda e: -fp[e])[:top_k]
    return sum(
        math.log(math.cosh(sharpness * (q[e] - fp[e]))) / sharpness for e in first
    ) / len(first)


@pytest.fixture
def added(monkeypatch):
    row = Objective("log_cosh", log_cosh, {}, lambda top_k, num_experts, _: top_k)
    table = {**OBJECTIVES, row.name: row}
    monkeypatch.setattr(objectives, "OBJECTIVES", table)
    sharp = (lambda v: isinstance(v, float) and v > 0, "a number > 0")
    monkeypatch.setitem(hyperparameters.ALLOWED, "sharpness", sharp)


def test_it_equals_its_twin():
    q, fp = torch.randn(5, 12), torch.randn(5, 12)
    expected = [
        twin(a, b, top_k=3, sharpness=0.5)
        for a, b in zip(q.tolist(), fp.tolist(), strict=True)
    ]
    loss = log_cosh(q, fp, top_k=3, sharpness=0.5)
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.usefixtures("added")
def test_it_runs_from_a_recipe_to_a_verified_export(tmp_path, vsraq_log):
    tiny.tiny_model("solar_open").save_pretrained(tmp_path / "model")
    recipe = parse_recipe(
        {
            "model": str(tmp_path / "model"),
            "scheme": "W4A16",
            "output": str(tmp_path / "out"),
            "algorithm": parse_yaml(
                "{objective: {name: log_cosh, sharpness: 0.5}, router_weight: 100.0, "
                "iters: 3, not_use_best_mse: true, group_size: 32}"
            ),
        }
    )
    again = parse_recipe(parse_yaml(write_yaml(recipe.resolved())))
    chosen = {"name": "log_cosh", "sharpness": 0.5}
    assert again.algorithm["objective"] == chosen
    exports = []
    for sharpness in (0.5, 4.0):
        config = VSRAQConfig(
            **dict(recipe.algorithm) | {"objective": chosen | {"sharpness": sharpness}}
        )
        arguments = {**tiny.RUN, "dataset": tiny.calibration()}
        run = build(
            recipe,
            tiny.tiny_model("solar_open"),
            config,
            tokenizer=tiny.tiny_tokenizer(),
            **arguments,
        )
        _, folder = run.quantize_and_save(
            str(tmp_path / str(sharpness)), format="auto_round"
        )
        verify(folder, tmp_path / "model")
        exports.append(load_file(next(tmp_path.glob(f"{sharpness}/**/*.safetensors"))))
    assert any("objective log_cosh(sharpness=0.5)" in line for line in vsraq_log)
    first, second = exports
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "log_cosh", "sharpness": 0.0}, "sharpness=0.0: allowed is a number"),
        ({"name": "log_cosh", "alpha": 0.5}, "no such hyper-parameter; it has sharp"),
    ],
)
def test_its_hyperparameters_are_checked(objective, message):
    with pytest.raises(ValueError, match=message):
        VSRAQConfig(objective=objective, router_weight=1.0)


def test_a_function_has_the_name_of_its_objective():
    """Or it is one function with the hyper-parameters of several names."""
    names = {o.token_loss.__name__ for o in OBJECTIVES.values()}
    assert names <= OBJECTIVES.keys()
    for name in names:
        assert OBJECTIVES[name].token_loss is getattr(losses, name)
