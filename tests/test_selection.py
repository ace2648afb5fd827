# SPDX-License-Identifier: Apache-2.0
"""A router's rule is what the router does: learned from it, or not claimed."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from family_table import check_choice
from vsraq.routers import find_routers
from vsraq.routers.learn import learn_rule
from vsraq.routers.rule import SelectionRule

EXPERTS, HIDDEN, TOP_K = 8, 16, 2


class Gate(nn.Module):
    """A router as transformers has them; what it does with its logits is given."""

    def __init__(self, scores, biased=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.bias_of_choice = nn.Buffer(torch.zeros(EXPERTS)) if biased else None
        self.cap = 3.0
        self._scores = scores

    def forward(self, hidden):
        logits = F.linear(hidden.view(-1, HIDDEN), self.weight)
        scores = self._scores(self, logits)
        if self.bias_of_choice is not None:
            scores = scores + self.bias_of_choice
        weights, indices = scores.topk(TOP_K, sorted=False)
        return logits, weights, indices


def learn(gate, **options):
    state = torch.get_rng_state()
    learned = learn_rule(nn.ModuleDict({"gate": gate}), "gate", "", EXPERTS, **options)
    assert torch.equal(state, torch.get_rng_state())
    return learned


def sqrt_softplus(_, z):
    return F.softplus(z).sqrt()


def capped(gate, z):
    return ((z / gate.cap).tanh() * gate.cap).sigmoid()


def scaled(gate, z):
    return (z * gate.cap).sigmoid()


@pytest.mark.parametrize(
    ("scores", "biased", "rule"),
    [
        (lambda _, z: z.softmax(-1), False, SelectionRule()),
        (lambda _, z: z.sigmoid(), False, SelectionRule()),
        (lambda _, z: z, True, SelectionRule("identity", True)),
        (lambda _, z: z.softmax(-1), True, SelectionRule("softmax", True)),
        (lambda _, z: z.sigmoid(), True, SelectionRule("sigmoid", True)),
        (sqrt_softplus, True, SelectionRule("sqrt_softplus", True)),
        (capped, True, SelectionRule("sigmoid", True, logit_softcap=3.0)),
        (scaled, True, SelectionRule("sigmoid", True, logit_scale=3.0)),
    ],
)
def test_the_rule_of_a_router(scores, biased, rule):
    learned = learn(Gate(scores, biased))
    assert learned.rule == rule
    assert learned.top_k == TOP_K
    assert learned.unverified == ""
    assert learned.correction_bias == ("gate.bias_of_choice" if biased else None)


def grouped(group_score, topk_groups, masked):
    def scores(gate, z):
        p = z.sigmoid() + gate.bias_of_choice
        best = p.view(-1, 4, 2)
        best = best.sum(-1) if group_score == "top2" else best.amax(-1)
        mask = torch.zeros_like(best).scatter(1, best.topk(topk_groups)[1], 1).bool()
        mask = mask.repeat_interleave(2, dim=1)
        # the bias is added again by the gate
        return p.masked_fill(~mask, masked) - gate.bias_of_choice

    return scores


# The best K experts are always in the K groups with the best experts, so there a
# choice of groups by their best would change nothing.
@pytest.mark.parametrize(("group_score", "topk_groups"), [("top2", 2), ("max", 1)])
@pytest.mark.parametrize("masked", [-math.inf, 0.0])
def test_groups(group_score, topk_groups, masked):
    gate = Gate(grouped(group_score, topk_groups, masked), True)
    learned = learn(gate, groups=(4, topk_groups))
    expected = SelectionRule("sigmoid", True, 4, topk_groups, group_score, masked)
    assert learned.rule == expected


def test_groups_that_the_router_does_not_use():
    learned = learn(Gate(lambda _, z: z.softmax(-1)), groups=(4, 2))
    assert learned.rule == SelectionRule()


def test_a_random_choice_is_not_claimed():
    gate = Gate(lambda _, z: z + torch.randn(z.shape, generator=generator))
    generator = torch.Generator().manual_seed(0)
    learned = learn(gate)
    assert learned.rule is None
    assert learned.unverified == "its choices follow no rule that vsraq knows"


class Hashed(Gate):
    def forward(self, hidden, input_ids):
        return input_ids, super().forward(hidden)


def test_a_choice_by_token_is_not_claimed():
    learned = learn(Hashed(lambda _, z: z))
    assert learned.rule is None
    assert learned.unverified == "it chooses by more than its input: by input_ids"


class Broken(Gate):
    def forward(self, hidden):
        raise OSError("no kernel")


def test_a_router_that_fails_is_not_claimed():
    learned = learn(Broken(lambda _, z: z))
    assert learned.rule is None
    assert "its code failed on random inputs (OSError: no kernel)" in learned.unverified


class LogitsOnly(Gate):
    def forward(self, hidden):
        return super().forward(hidden)[0]


def test_logits_alone_tell_the_choice_only_without_a_bias():
    assert learn(LogitsOnly(lambda _, z: z)).rule == SelectionRule()
    assert learn(LogitsOnly(lambda _, z: z, True)).rule is None
    assert learn(LogitsOnly(lambda _, z: z), groups=(4, 2)).rule is None


class Noisy(Gate):
    def forward(self, hidden):
        if self.training:
            hidden = hidden + torch.randn_like(hidden)
        return super().forward(hidden)


def test_a_router_in_training_mode_is_asked_without_its_noise():
    gate = Noisy(lambda _, z: z).train()
    assert learn(gate).rule == SelectionRule()
    assert gate.training


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_what_reaches_the_experts(family):
    """In a whole model, for every token: not asked in isolation."""
    model = tiny.tiny_model(family)
    routers = find_routers(model)
    ids = torch.cat(tiny.calibration())
    assert check_choice(model, routers, ids) == len(routers)


def test_the_ranking_starts_with_the_choice_and_ends_with_refused_groups():
    rule = SelectionRule("sigmoid", True, 4, 2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator)
    ranking = rule.ranking(logits, bias)
    assert torch.equal(ranking.sort(-1).values, torch.arange(EXPERTS).expand(200, -1))
    scores = rule.scores(logits, bias)
    assert torch.equal(ranking[:, :TOP_K], scores.topk(TOP_K).indices)
    p = (logits.sigmoid() + bias).gather(-1, ranking)
    refused = scores.gather(-1, ranking).isinf()
    assert refused[:, :4].sum() == 0
    assert refused[:, 4:].all()  # 2 groups of 2 experts
    for half in (p[:, :4], p[:, 4:]):  # each in its own order
        assert (half.diff() <= 0).all()
