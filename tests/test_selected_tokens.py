# SPDX-License-Identifier: Apache-2.0
"""Runs that align their routers on selected tokens only."""

import gc

import pytest
import torch
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

import tiny
from test_autoround import padded, same, tuned, weights
from test_capture import hook_count
from vsraq import VSRAQConfig, select_tokens
from vsraq.autoround import VSRAQQuantizer
from vsraq.tokens import Sampling, TokenMask

FAMILY = "solar_open"


def mask_of(masks, samples=None):
    return TokenMask.of(
        masks,
        samples or tiny.calibration(),
        model=FAMILY,
        scheme="W4A16",
        tau=1e-4,
        shift_threshold=None,
        sampling=Sampling(),
    )


def constant(value):
    return mask_of([torch.full((tiny.SEQLEN,), value) for _ in range(8)])


def some():
    generator = torch.Generator().manual_seed(0)
    return mask_of(
        [torch.rand(tiny.SEQLEN, generator=generator) < 0.5 for _ in range(8)]
    )


def config(objective="sra", **kwargs):
    options = {"iters": 3, "router_weight": 10.0, "not_use_best_mse": True}
    return VSRAQConfig(objective=objective, **options | kwargs)


def at(tau):
    return {"token_selection": {"tau": tau}}


PARTS = [
    {},
    {"next_router_weight": 10.0},
    {"router_weight": "auto", "next_router_weight": "auto", "realign_routers": True},
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: ",".join(p) or "own")
@pytest.mark.parametrize("text", [False, True])
def test_a_mask_of_ones_is_ra_bit_for_bit(parts, text, quantize, tmp_path):
    """With AutoRound's own mask (tensors), and without one (text)."""
    dataset = tiny.save_text(tmp_path / "text.jsonl") if text else tiny.calibration()

    def run(config):
        _, model = quantize(tiny.tiny_model(FAMILY), config, dataset=dataset)
        return weights(model), [layer.mlp.gate.weight for layer in model.model.layers]

    plain, plain_gates = run(config("ra", **parts))
    # tau=0 selects every token whose output changed at all
    ones, gates = run(
        config(token_selection={"tau": 0.0}, **parts)
        if text
        else config(token_mask=constant(True), **parts)
    )
    assert same(plain, ones)
    assert all(torch.equal(a, b) for a, b in zip(gates, plain_gates, strict=True))


def test_without_a_weight_it_is_autoround(quantize):
    plain = tuned(quantize, SignRoundConfig(iters=3, not_use_best_mse=True))
    assert same(plain, tuned(quantize, config("sra", **tiny.PLAIN)))


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: ",".join(p) or "own")
def test_other_tokens_give_other_weights(parts, quantize):
    all_tokens = tuned(quantize, config("ra", **parts))
    assert not same(all_tokens, tuned(quantize, config(token_mask=some(), **parts)))


def test_the_re_fit_counts_selected_tokens(quantize, vsraq_log):
    options = {"iters": 1, "router_weight": 0, "realign_routers": True}
    quantize(tiny.tiny_model(FAMILY), VSRAQConfig(**options))
    masked = VSRAQConfig(**options, token_selection=True, token_mask=some())
    quantize(tiny.tiny_model(FAMILY), masked)
    lines = [m for m in vsraq_log if "held-out logit error" in m]
    first, second = lines[0], lines[2]  # the first router of each run
    assert first.split(" left")[0] == second.split(" left")[0]
    assert first != second


def test_no_selected_token_is_no_router_loss(quantize, vsraq_log):
    """In a whole run: 0 and not NaN, and said."""
    plain = tuned(quantize, SignRoundConfig(iters=3, not_use_best_mse=True))
    none = tuned(quantize, config(token_mask=constant(False)))
    assert same(plain, none)
    (warning,) = [m for m in vsraq_log if "are selected with tau" in m]
    assert "0 of 256 tokens (0.00%)" in warning


def test_masks_multiply(quantize):
    """A selected token that is padding does not count."""
    samples, half = padded(0), torch.arange(tiny.SEQLEN) < tiny.SEQLEN // 2
    quarter = torch.arange(tiny.SEQLEN) < tiny.SEQLEN // 4

    def run(mask):
        masked = config(token_mask=mask_of([mask] * 8, samples))
        return tuned(quantize, masked, dataset=samples)

    # the second half is padding: selecting some of it changes nothing
    some_padding = half.roll(tiny.SEQLEN // 4)
    assert same(run(some_padding), run(some_padding & half))
    assert not same(run(some_padding), run(quarter))


def test_selected_at_the_start_of_the_run(quantize, vsraq_log):
    """The same as with that mask given."""
    run, model = quantize(tiny.tiny_model(FAMILY), config(**at(0.05)))
    computed, mask = weights(model), run.alg_composer.block_quantizer.token_mask
    assert same(computed, tuned(quantize, config(token_mask=mask)))
    (line,) = [m for m in vsraq_log if "vsraq: selected" in m]
    assert "of 256 tokens" in line
    assert "tau=0.05" in line
    assert not same(computed, tuned(quantize, config("ra")))
    assert same(computed, tuned(quantize, config(**at(0.05))))


NEXT = {"router_weight": 0.0, "next_router_weight": 100.0}
ACCUMULATED = {
    "own": {"router_weight": 100.0, "next_router_weight": 0.0},
    "next": NEXT,
    "default": {
        "router_weight": "auto",
        "next_router_weight": "auto",
        "auto_ratio": 1.0,
    },
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "selected"])
@pytest.mark.parametrize("parts", ACCUMULATED.values(), ids=ACCUMULATED)
def test_gradient_accumulation_is_the_undivided_batch(
    parts, masked, quantize, monkeypatch, terms
):
    """Eq. 8 over the tokens of the step: 8 micro-batches of 1 are one batch of 8."""
    step = VSRAQQuantizer._step
    gradients = []

    def spy(self, scaler, optimizer, lr_schedule):
        rounding = optimizer.param_groups[0]["params"]
        gradients.append(torch.cat([p.grad.flatten() for p in rounding]))
        step(self, scaler, optimizer, lr_schedule)

    monkeypatch.setattr(VSRAQQuantizer, "_step", spy)
    # from 1 to 29 selected tokens a sample, and padding in two of them
    counts = [1, 2, 3, 5, 8, 13, 21, 29]
    masks = [torch.arange(tiny.SEQLEN) < count for count in counts]
    samples = tiny.calibration()
    for ids in samples[:2]:
        ids[:, 20:] = 0
    mask = {"token_mask": mask_of(masks, samples)} if masked else {}

    def first_gradients(parts, batch_size, steps):
        gradients.clear()
        own = config(
            "sra" if masked else "ra",
            iters=1,
            gradient_accumulate_steps=steps,
            **{"realign_routers": False} | parts | mask,
        )
        run = {"batch_size": batch_size, "amp": False, "dataset": samples}
        tuned(quantize, own, **run)
        weights = [term.weight for term in terms[0][1].values()]
        terms.clear()
        return gradients[0] / (1 if steps == 1 else 8 * tiny.SEQLEN * 64), weights

    at_once, weights_at_once = first_gradients(parts, 8, 1)
    accumulated, weights = first_gradients(parts, 1, 8)
    assert weights == pytest.approx(weights_at_once, rel=1e-3)
    close = {"rtol": 1e-3, "atol": 1e-3 * at_once.abs().mean().item()}
    torch.testing.assert_close(accumulated, at_once, **close)
    reconstruction, _ = first_gradients(
        {name: 1e-9 for name, value in parts.items() if "weight" in name and value},
        8,
        1,
    )
    router = (at_once - reconstruction).abs().mean()
    assert router > 0.1 * reconstruction.abs().mean()  # so the term is in it


def test_selected_before_the_run(quantize):
    arguments = tiny.RUN | {"tokenizer": tiny.tiny_tokenizer()}
    model, dataset = tiny.tiny_model(FAMILY), tiny.calibration()
    mask = select_tokens(model, dataset, "W4A16", tau=0.05, **arguments)
    run, _ = quantize(tiny.tiny_model(FAMILY), config(**at(0.05), iters=1))
    assert mask.digest == run.alg_composer.block_quantizer.token_mask.digest
    assert 0 < mask.selected < mask.total
    assert hook_count(model) == 0


def test_a_refused_run_leaves_no_hook(quantize):
    model = tiny.tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="chooses the highest logits"):
        quantize(model, config(rank_by="selection"))
    gc.collect()
    assert hook_count(model) == 0


def test_a_re_fit_without_selected_tokens_is_refused(quantize):
    masked = config(token_mask=constant(False), realign_routers=True)
    with pytest.raises(ValueError, match="0 samples have selected tokens"):
        quantize(tiny.tiny_model(FAMILY), masked)


def test_an_automatic_weight_is_found_where_tokens_are_selected(quantize, vsraq_log):
    """Not in the first micro-batch, which may have none."""
    masks = [torch.full((tiny.SEQLEN,), index > 3) for index in range(8)]
    masked = config(token_mask=mask_of(masks), router_weight="auto")
    quantize(tiny.tiny_model(FAMILY), masked)
    assert all(float(line["weight"]) > 0 for line in tiny.block_lines(vsraq_log))


def test_nothing_to_align_selects_nothing(quantize, vsraq_log):
    zero = VSRAQConfig(iters=1, objective="sra", **tiny.PLAIN)
    assert not zero.alignment.token_selection
    quantize(tiny.tiny_model(FAMILY), zero)
    assert not any("selected" in m for m in vsraq_log)


def test_any_objective_may_be_masked(quantize):
    masked = config("vsraq", token_selection=True, token_mask=some())
    assert not same(tuned(quantize, masked), tuned(quantize, config("vsraq")))


def test_a_mask_from_a_file(quantize, tmp_path):
    some().save(tmp_path / "mask.safetensors")
    from_file = config(token_mask=str(tmp_path / "mask.safetensors"))
    given = tuned(quantize, config(token_mask=some()))
    assert same(tuned(quantize, from_file), given)


def test_a_mask_of_other_tokens_is_refused(quantize, tmp_path):
    other = mask_of([torch.ones(tiny.SEQLEN).bool()] * 8, tiny.calibration(seed=1))
    message = "token mask: calibration sample 0 has 32"
    with pytest.raises(ValueError, match=f"^{message}"):
        quantize(tiny.tiny_model(FAMILY), config(token_mask=other))
    path = tmp_path / "mask.safetensors"
    other.save(path)
    with pytest.raises(ValueError, match=f"^token_mask='{path}': {message}"):
        quantize(tiny.tiny_model(FAMILY), config(token_mask=path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ra", "token_mask": "m"}, "token_mask='m': it has no effect"),
        (
            {"token_mask": "m", "token_selection": {"tau": 0.1}},
            "it has no effect with token_mask",
        ),
        ({"token_selection": False}, "token_selection=False: objective 'sra' is for"),
        (
            {"token_selection": {"tau": -1.0}},
            "token_selection.tau=-1.0: allowed is a finite number >= 0",
        ),
        (
            {"token_selection": {"shift_threshold": 1.5}},
            "token_selection.shift_threshold=1.5: allowed is a fraction",
        ),
        ({"token_mask": 123}, "token_mask=123: allowed is a TokenMask, the path"),
        (
            {"token_selection": {"tau": "x"}},
            "token_selection.tau='x': allowed is a finite number",
        ),
        ({"token_selection": "yes"}, "token_selection='yes': allowed is True, False"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
