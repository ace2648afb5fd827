# SPDX-License-Identifier: Apache-2.0
"""A family whose quantized twin replays the routing: what has to hold for each."""

import copy

import torch

import family_table
import tiny
from vsraq.analysis import record_routing, replay_routing
from vsraq.routers import expert_containers

BATCHES = torch.cat(tiny.calibration(samples=3, seqlen=12)).split([2, 1])
SHAPE = (3, 12)


@torch.no_grad()
def damaged(model, seed=0, scale=0.05):
    """A copy with noise on every matrix, as rounding makes it, routers included."""
    q_model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in q_model.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += noise * parameter.std() * scale
    return q_model


@torch.no_grad()
def run(model, batches=BATCHES):
    """Logits of every token, (N, S, V)."""
    return torch.cat([model(input_ids=ids, use_cache=False).logits for ids in batches])


def same_routing(a, b):
    """Whether two records agree in every bit."""
    pairs = zip(a.routers, b.routers, strict=True)
    return all(
        torch.equal(x, y)
        for left, right in pairs
        for (_, mine), (_, other) in zip(left.calls, right.calls, strict=True)
        for x, y in zip(mine, other, strict=True)
        if x is not None and y is not None
    )


def experts_called(model, routers, batches=BATCHES):
    """What reaches the modules that hold the experts: (T, K) indices and weights."""
    seen, handles = [], []
    for router in routers:

        def record(_module, args, kwargs, router=router):
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.shape[1:] == (
                    router.top_k,
                ):
                    seen.append((router.name, value.clone()))

        for name in expert_containers(model, [router]):
            experts = model.get_submodule(name)
            hook = experts.register_forward_pre_hook(record, with_kwargs=True)
            handles.append(hook)
    run(model, batches)
    for handle in handles:
        handle.remove()
    return seen


def check_family(model_type, dtype=torch.float32):
    model = family_table.tiny_model(model_type).to(dtype)
    check_model(model, family_table.routers_of(model_type, model))


def check_model(model, routers):
    q_model = damaged(model)
    fp, plain = run(model), run(q_model)
    routing = record_routing(model, BATCHES, routers=routers)
    small = record_routing(model, BATCHES, routers=routers, logits=False)
    assert small.nbytes <= routing.nbytes

    with replay_routing(q_model, routing, torch.zeros(SHAPE, dtype=torch.bool)):
        assert torch.equal(run(q_model), plain)
    with replay_routing(model, routing):
        assert torch.equal(run(model), fp)

    with replay_routing(q_model, routing):
        replayed = run(q_model)
    with replay_routing(q_model, routing):
        assert same_routing(record_routing(q_model, BATCHES, routers=routers), routing)
    with replay_routing(q_model, routing):
        reached = experts_called(q_model, routers)
    for (name, value), (other, expected) in zip(
        reached, experts_called(model, routers), strict=True
    ):
        assert name == other
        assert torch.equal(value, expected), name
    with replay_routing(q_model, small):
        assert torch.equal(run(q_model), replayed)
    assert not torch.equal(replayed, plain)

    # tokens of the second sequence from its fifth position on
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1, 5:] = True
    with replay_routing(q_model, routing, mask):
        partly = run(q_model)
    moved = (partly - plain).abs().amax(-1) > 1e-3 * plain.abs().max()
    assert moved[1, 5:].any()
    assert not moved[~mask].any()
    assert torch.equal(run(q_model), plain)
