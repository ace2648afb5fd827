# SPDX-License-Identifier: Apache-2.0
"""The routing of one model, replayed in another."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from torch.nn import functional as F

import family_table
import replayed
import tiny
from replayed import BATCHES, SHAPE, check_family, damaged, run, same_routing
from test_capture import hook_count
from vsraq import RoutingRecord, VSRAQConfig, record_routing, replay_routing
from vsraq.analysis.recording import RoutingRecorder
from vsraq.checkpoint import load_model
from vsraq.routers import find_routers

REPRESENTATIVE = [
    "granitemoe",  # softmax
    "deepseek_v3",  # sigmoid + bias, in groups
    "nemotron_h",  # one mixer per layer
    "jetmoe",  # gating that sorts across tokens; two routers in a layer
    "hunyuan_v1_moe",  # a router around the linear map
    "gemma4_text",  # the same beside attention
    "dbrx",  # a router that returns logits, and experts of an unknown layout
    "llama4_text",  # weights of all experts, without indices
    "longcat_flash",  # zero experts, and a map that is never called
    "inkling_text",  # weights of shared experts
    "deepseek_v4",  # a table of experts by token id
]
# no router, or one that sees other tokens than these
REFUSED = {"doge": "holds no weight", "diffusion_gemma (with images)": "of 24 tokens"}


def pytest_generate_tests(metafunc):
    if "model_type" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        names = family_table.every_type() if every else REPRESENTATIVE
        metafunc.parametrize("model_type", names)


def test_a_family_replays_its_routing(model_type):
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            check_family(model_type)
    else:
        check_family(model_type)


@pytest.mark.parametrize("family", ["granitemoe", "deepseek_v3", "jetmoe"])
def test_in_bfloat16(family):
    model = tiny.in_bfloat16(family_table.tiny_model(family))
    replayed.check_model(model, find_routers(model))


@pytest.fixture(scope="module")
def pair():
    """A model, a quantized twin with another router, and the routing of the first."""
    model = tiny.tiny_model("qwen3_moe")
    return model, damaged(model, scale=0.2), record_routing(model, BATCHES)


def moe_forward(moe, weights, experts):
    """A MoE layer written by hand: each token's experts, one after the other."""

    def forward(hidden_states):
        shape = hidden_states.shape
        outputs = []
        for x, ws, indices in zip(
            hidden_states.flatten(0, 1), weights.pop(0), experts.pop(0), strict=True
        ):
            total = torch.zeros_like(x)
            for w, e in zip(ws, indices.tolist(), strict=True):
                gate, up = (moe.experts.gate_up_proj[e] @ x).chunk(2)
                total += w * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
            outputs.append(total)
        return torch.stack(outputs).view(shape)

    return forward


@torch.no_grad()
def test_against_a_forward_written_by_hand(pair, monkeypatch):
    model, q_model, routing = pair
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.4
    by_hand = copy.deepcopy(q_model)
    for layer, q_layer, hand in zip(
        model.model.layers, q_model.model.layers, by_hand.model.layers, strict=True
    ):
        inputs = []
        for moe in (layer.mlp, q_layer.mlp):
            seen = []
            hook = moe.register_forward_pre_hook(
                lambda _module, args, seen=seen: seen.append(args[0].flatten(0, 1))
            )
            if moe is layer.mlp:
                run(model)
            else:  # in front of a layer all earlier ones replay
                with replay_routing(q_model, routing, mask):
                    run(q_model)
            hook.remove()
            inputs.append(seen)
        weights, experts = [], []
        for fp, q, part in zip(*inputs, mask.split([2, 1]), strict=True):
            probabilities = torch.where(
                part.flatten()[:, None],
                (fp @ layer.mlp.gate.weight.T).softmax(-1),
                (q @ q_layer.mlp.gate.weight.T).softmax(-1),
            )
            best = probabilities.topk(tiny.TOP_K)
            normalized = model.config.norm_topk_prob
            total = best.values.sum(-1, keepdim=True) if normalized else 1
            weights.append(best.values / total)
            experts.append(best.indices)
        monkeypatch.setattr(
            hand.mlp, "forward", moe_forward(hand.mlp, weights, experts)
        )
    with replay_routing(q_model, routing, mask):
        found = run(q_model)
    torch.testing.assert_close(found, run(by_hand), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, run(q_model), atol=1e-2)


def test_masks_per_batch_are_those_of_all(pair):
    _, q_model, routing = pair
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.5
    results = []
    for tokens in (mask, mask.split([2, 1])):
        with replay_routing(q_model, routing, tokens):
            results.append(run(q_model))
    assert torch.equal(*results)


def test_batches_of_other_lengths(pair):
    model, q_model, _ = pair
    batches = [BATCHES[0], BATCHES[1][:, :5]]
    routing = record_routing(model, batches)
    assert routing.tokens == 2 * 12 + 5
    masks = [torch.zeros(2, 12, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)]
    with torch.no_grad(), replay_routing(q_model, routing, masks):
        first, second = (q_model(ids, use_cache=False).logits for ids in batches)
    with torch.no_grad():
        plain = [q_model(ids, use_cache=False).logits for ids in batches]
    assert torch.equal(first, plain[0])
    assert not torch.equal(second, plain[1])
    with pytest.raises(ValueError, match=r"bool of shapes \[\(2, 12\), \(1, 5\)\]"):
        replay_routing(q_model, routing, torch.ones(3, 12).bool()).__enter__()


def test_the_size_is_that_of_the_docstring(pair):
    model, _, routing = pair
    moe_layers, ids = len(routing.routers), 4 * routing.tokens
    e, k = tiny.EXPERTS, tiny.TOP_K
    per_token = moe_layers * (4 * e + (4 + 2) * k)
    assert routing.nbytes == routing.tokens * per_token + ids
    small = record_routing(model, BATCHES, logits=False)
    assert small.nbytes == routing.tokens * moe_layers * (4 + 2) * k + ids


def test_a_saved_record_replays_the_same(pair, tmp_path):
    model, q_model, routing = pair
    routing.save(tmp_path / "routing.safetensors")
    loaded = RoutingRecord.load(tmp_path / "routing.safetensors")
    assert same_routing(loaded, routing)
    assert loaded.nbytes == routing.nbytes
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5
    results = []
    for record in (routing, loaded):
        with replay_routing(q_model, record, mask):
            results.append(run(q_model))
    assert torch.equal(*results)
    small = record_routing(model, BATCHES, logits=False)
    small.save(tmp_path / "small.safetensors")
    loaded = RoutingRecord.load(tmp_path / "small.safetensors")
    assert loaded.nbytes == small.nbytes
    for name, content in (("empty", b""), ("other", save({"x": torch.ones(1)}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a record of this version"):
            RoutingRecord.load(tmp_path / name)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.ones(3, 11, dtype=torch.bool),
            r"shape \(3, 11\).*bool of shape \(3, 12",
        ),
        (torch.ones(36, dtype=torch.bool), r"shape \(36,\)"),
        (torch.ones(SHAPE), r"torch.float32 of shape \(3, 12\)"),
        ([torch.ones(2, 12, dtype=torch.bool)], r"shape \[\(2, 12\)\]"),
    ],
)
def test_masks_of_other_tokens_are_refused(pair, tokens, message):
    _, q_model, routing = pair
    with (
        pytest.raises(ValueError, match=message),
        replay_routing(q_model, routing, tokens),
    ):
        pass
    assert hook_count(q_model) == 0


def test_other_batches_are_refused(pair):
    _, q_model, routing = pair
    other = BATCHES[0].clone()
    other[0, 3] += 1
    for ids, message in (
        (other, "other tokens than the recorded batch"),
        (BATCHES[1], r"shape \(1, 12\) in call 1: another shape"),
    ):
        with pytest.raises(ValueError, match=message), replay_routing(q_model, routing):
            q_model(ids)
    assert hook_count(q_model) == 0


def test_more_calls_than_recorded_are_refused(pair):
    _, q_model, routing = pair
    with replay_routing(q_model, routing):
        run(q_model)
        with pytest.raises(ValueError, match="called 3 times, but 2 batches were"):
            q_model(BATCHES[0])
    with replay_routing(q_model, routing):  # the part that holds the blocks
        for ids in BATCHES:
            q_model.model(ids)
        with pytest.raises(ValueError, match=r"router '.*' is called 3 times, but 2"):
            q_model.model(BATCHES[0])
    with (
        replay_routing(q_model, routing),
        pytest.raises(ValueError, match="for 12 tok"),
    ):
        twice(q_model.model, BATCHES[0])
    assert hook_count(q_model) == 0


def twice(module, input_ids):
    module(input_ids)
    module(input_ids)


def test_a_pass_that_was_cut_short_does_not_shift_the_others(pair):
    _, q_model, routing = pair
    with replay_routing(q_model, routing):
        expected = run(q_model)
    last = q_model.model.layers[-1]

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), replay_routing(q_model, routing):
        handle = last.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            q_model(BATCHES[0])
        handle.remove()
        assert torch.equal(q_model(BATCHES[1]).logits, expected[2:])


def test_no_hook_is_left(pair):
    model, q_model, routing = pair
    expected = run(q_model)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), replay_routing(q_model, routing):
            raise error
        with pytest.raises(error):
            record_routing(model, iter_then(error))
        assert hook_count(q_model) == hook_count(model) == 0
    assert torch.equal(run(q_model), expected)


def iter_then(error):
    yield BATCHES[0]
    raise error


@pytest.mark.parametrize(
    "other",
    [
        {"family": "granitemoe"},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"num_experts": 4},
        {"num_experts_per_tok": 1},
        {"family": "llama"},
    ],
    ids=str,
)
def test_models_with_other_routers_are_refused(pair, other):
    q_model = tiny.tiny_model(**{"family": "qwen3_moe"} | other)
    with pytest.raises(ValueError, match="its routers are not those that were"):
        replay_routing(q_model, pair[2]).__enter__()
    assert hook_count(q_model) == 0


def test_some_routers_only(pair):
    model, q_model, routing = pair
    (first, _) = find_routers(model)
    some = record_routing(model, BATCHES, routers=[first])
    assert not some.complete
    with replay_routing(q_model, some):
        found = record_routing(q_model, BATCHES)
    for place, expected in enumerate((True, False)):
        parts = [
            replace(r, routers=r.routers[place : place + 1]) for r in (found, routing)
        ]
        assert same_routing(*parts) == expected


def test_nothing_to_record_is_refused():
    with pytest.raises(ValueError, match="has no router to record"):
        record_routing(tiny.tiny_model("llama"), BATCHES)
    with pytest.raises(ValueError, match="at least one batch"):
        record_routing(tiny.tiny_model("mixtral"), [])


def test_a_router_that_text_never_reaches_is_named():
    model = family_table.tiny_model("ernie4_5_vl_moe (with images)")
    with pytest.raises(RuntimeError, match=r"vision_moe\.gate' was not called"):
        record_routing(model, BATCHES)


def test_a_router_without_rows_per_token_is_refused():
    model = tiny.tiny_model("mixtral")
    routers = [layer.mlp.gate for layer in model.model.layers]
    routers[1].register_forward_hook(
        lambda _module, _args, output: tuple(value.flatten() for value in output)
    )
    with RoutingRecorder(model) as recorder:
        for router in routers:
            router(torch.ones(24, 64))
        with pytest.raises(ValueError, match=r"shapes \[\(192,\), \(48,\), \(48,\)\]"):
            recorder.keep(BATCHES[0])
    assert hook_count(model) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole):
    q_model = tiny.tiny_model("qwen3_moe", num_hidden_layers=1)
    routing = record_routing(damaged(q_model, scale=0.2), BATCHES[:1])
    compiled = copy.deepcopy(q_model)
    if whole:
        compiled = torch.compile(compiled, backend="eager")
    else:
        layers = compiled.model.layers
        layers[0] = torch.compile(layers[0], backend="eager")
    plain = run(compiled, BATCHES[:1])  # the code is there before the hooks are
    with replay_routing(compiled, routing, torch.zeros(2, 12, dtype=torch.bool)):
        assert torch.equal(run(compiled, BATCHES[:1]), plain)
    with replay_routing(q_model, routing):
        expected = run(q_model, BATCHES[:1])
    with replay_routing(compiled, routing):
        assert torch.equal(run(compiled, BATCHES[:1]), expected)
    with replay_routing(compiled, routing):
        assert same_routing(record_routing(compiled, BATCHES[:1]), routing)
    assert not torch.equal(plain, expected)
    assert torch.equal(run(compiled, BATCHES[:1]), plain)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, and its export with re-fitted routers, as they are loaded."""
    from auto_round import AutoRound

    root = tmp_path_factory.mktemp("replay")
    source = tiny.save("qwen3_moe", root / "source")
    autoround = AutoRound(
        tiny.in_bfloat16(tiny.tiny_model("qwen3_moe")),
        tiny.tiny_tokenizer(),
        scheme="W4A16",
        group_size=32,
        alg_configs=VSRAQConfig(iters=1, realign_routers=True),
        dataset=tiny.calibration(),
        **tiny.RUN,
    )
    _, folder = autoround.quantize_and_save(str(root / "out"), format="auto_round")
    return load_model(source), load_model(folder)


def test_an_export_leaves_the_classes_of_its_family(exported):
    """AutoRound gives the loaded model another MoE block, and all that come after."""
    model, q_model = (m.model.layers[0].mlp for m in exported)
    assert type(q_model) is not type(model)
    assert type(tiny.tiny_model("qwen3_moe").model.layers[0].mlp) is type(model)


def test_an_export_whose_router_returns_logits_only(exported):
    model, q_model = exported
    router, q_router = (m.model.layers[0].mlp.gate for m in exported)
    assert isinstance(q_router, torch.nn.Linear)  # as AutoRound loads it
    assert not torch.equal(router.weight.float(), q_router.weight.float())  # re-fitted
    routing = record_routing(model, BATCHES)
    plain = run(q_model)
    with replay_routing(q_model, routing):
        replayed_output = run(q_model)
    with replay_routing(q_model, routing):
        found = record_routing(q_model, BATCHES)
    for q, fp in zip(found.routers, routing.routers, strict=True):
        for (_, (logits,)), (_, values) in zip(q.calls, fp.calls, strict=True):
            assert torch.equal(logits, values[fp.raw_logits].to(logits))
    assert not torch.equal(plain, replayed_output)
    own = record_routing(q_model, BATCHES)
    with replay_routing(q_model, own):
        assert torch.equal(run(q_model), plain)
    small = record_routing(model, BATCHES, logits=False)
    with pytest.raises(ValueError, match="logits=True"), replay_routing(q_model, small):
        run(q_model)
    # the other way round there is no choice to replay
    with (
        pytest.raises(ValueError, match="recorded were rows"),
        replay_routing(model, own),
    ):
        run(model)
