# SPDX-License-Identifier: Apache-2.0
"""Tokens per expert: counted in the run, logged, and written beside the export."""

import json

import pytest
import torch
from auto_round import AutoRound

import tiny
from reference import logits_of
from test_autoround import padded
from vsraq import VSRAQConfig
from vsraq.capture import RouterCapture
from vsraq.expert_coverage import FILE_NAME, ExpertCoverage
from vsraq.routers import find_routers

FAMILY = "solar_open"
PARTS = [
    {"router_weight": 1.0},
    {"next_router_weight": 1.0},
    {"realign_routers": True},
    {"router_weight": 1.0, "objective": "input_mse"},
    {},
]


def expected(model, masks=None):
    """Tokens per expert of a full-precision model on the calibration tokens."""
    routers = find_routers(model)
    ids = torch.cat(tiny.calibration())
    valid = torch.ones_like(ids) if masks is None else torch.cat(masks)
    with torch.no_grad(), RouterCapture(model, routers) as capture:
        model(ids)
        kept = capture.take()
    counts = {}
    for router in routers:
        logits = torch.cat(kept[router.name])[valid.flatten().bool()]
        chosen = router.bind(model).select(logits)
        counts[router.name] = torch.bincount(chosen.flatten(), minlength=8).tolist()
    return counts


@pytest.fixture
def export(tmp_path):
    """Quantize and save; the JSON comes back."""

    def run(model, config, **kwargs):
        autoround = AutoRound(
            model,
            tokenizer=tiny.tiny_tokenizer(),
            scheme="W4A16",
            group_size=32,
            alg_configs=config,
            amp=False,
            **{"dataset": tiny.calibration()} | tiny.RUN | kwargs,
        )
        _, folder = autoround.quantize_and_save(str(tmp_path), format="auto_round")
        (file,) = tmp_path.rglob(FILE_NAME)
        assert str(file.parent) == folder
        return json.loads(file.read_text())

    return run


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: ",".join(p) or "default")
def test_counts_are_those_of_full_precision(parts, export):
    counts = export(tiny.tiny_model(FAMILY), VSRAQConfig(iters=1, **parts))
    counted = counts["routers"].items()
    routers = {name: router["full_precision_tokens"] for name, router in counted}
    masks = [torch.ones(1, tiny.SEQLEN) for _ in range(8)]
    for mask in masks:
        mask[0, -1] = 0  # AutoRound counts no loss there
    assert routers == expected(tiny.tiny_model(FAMILY), masks)


def test_counts_are_those_of_the_quantized_stream(export, quantize):
    """The second router reads what the first, quantized block sends it."""
    config = VSRAQConfig(iters=1, router_weight=1.0)
    first_only = {"to_quant_block_names": "model.layers.0", "group_size": 32}
    _, model = quantize(tiny.tiny_model(FAMILY), config, amp=False, **first_only)
    masks = [torch.ones(1, tiny.SEQLEN) for _ in range(8)]
    for mask in masks:
        mask[0, -1] = 0
    by_first_block = expected(model.float(), masks)
    counts = export(tiny.tiny_model(FAMILY), config)["routers"]
    first, second = counts
    assert counts[first]["tokens"] == counts[first]["full_precision_tokens"]
    assert counts[second]["tokens"] == by_first_block[second]
    assert counts[second]["tokens"] != counts[second]["full_precision_tokens"]


def test_padding_does_not_count(export):
    config = VSRAQConfig(iters=1, router_weight=1.0)
    counts = export(tiny.tiny_model(FAMILY), config, dataset=padded(0))
    valid = 8 * tiny.SEQLEN // 2
    for router in counts["routers"].values():
        assert sum(router["tokens"]) == valid * tiny.TOP_K
        assert sum(router["full_precision_tokens"]) == valid * tiny.TOP_K


def starving():
    """Expert 3 of the second MoE layer is never chosen."""
    model = tiny.tiny_model(FAMILY)
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -10
    return model


def test_unreached_experts_are_named(export, vsraq_log):
    counts = export(starving(), VSRAQConfig(iters=1))
    name = "model.layers.1.mlp.gate"
    assert counts["min_tokens_per_expert"] == 1
    assert counts["routers"][name]["below_minimum"] == [3]
    assert counts["routers"][name]["tokens"][3] == 0
    assert counts["routers"]["model.layers.0.mlp.gate"]["below_minimum"] == []
    (warning,) = [m for m in vsraq_log if "fewer than 1 calibration tokens" in m]
    assert f"{name} [3]" in warning
    (line,) = [
        m for m in vsraq_log if m.startswith(f"vsraq: {name} ") and "8d" not in m
    ]
    assert line.split()[-3:] == ["1", "of", "8"]


def test_unreached_experts_end_the_run_if_asked(quantize, vsraq_log):
    """Before the block that has one is tuned."""
    config = VSRAQConfig(iters=1, on_unreached="error")
    message = r"router model\.layers\.1\.mlp\.gate: experts \[3\] got fewer than"
    with pytest.raises(ValueError, match=message):
        quantize(starving(), config)
    assert [line["block"] for line in tiny.block_lines(vsraq_log)] == ["model.layers.0"]


def test_two_blocks_at_once_have_their_own_names(export):
    config = VSRAQConfig(iters=1, router_weight=1.0, nblocks=2)
    counts = export(tiny.tiny_model(FAMILY), config)
    assert list(counts["routers"]) == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]


def test_routers_that_were_not_counted_are_said(quantize, vsraq_log):
    config = VSRAQConfig(iters=1, router_weight=1.0)
    quantize(tiny.tiny_model(FAMILY), config, to_quant_block_names="model.layers.0")
    assert any("tokens of 1 of 2 routers were counted" in m for m in vsraq_log)


def test_options_that_count_nothing():
    for option in ({"min_tokens_per_expert": 5}, {"on_unreached": "error"}):
        with pytest.raises(ValueError, match="no effect without a part of the align"):
            VSRAQConfig(**tiny.PLAIN, **option)


def test_a_higher_minimum(quantize, vsraq_log):
    config = VSRAQConfig(iters=1, router_weight=1.0, min_tokens_per_expert=10_000)
    quantize(tiny.tiny_model(FAMILY), config)
    (warning,) = [m for m in vsraq_log if "fewer than 10000" in m]
    assert warning.count("[0, 1, 2, 3, 4, 5, 6, 7]") == 2


def test_without_an_export_nothing_is_written(
    quantize, tmp_path, monkeypatch, vsraq_log
):
    monkeypatch.chdir(tmp_path)
    quantize(tiny.tiny_model(FAMILY), VSRAQConfig(iters=1))
    assert not list(tmp_path.rglob(FILE_NAME))
    assert any("tokens per expert" in m for m in vsraq_log)


def test_plain_autoround_counts_nothing(quantize, vsraq_log):
    quantize(tiny.tiny_model(FAMILY), VSRAQConfig(iters=1, **tiny.PLAIN))
    assert not any("tokens per expert" in m for m in vsraq_log)


def test_reference_logits_are_not_those_of_forced_routing(
    quantize, terms, monkeypatch, vsraq_log
):
    """AutoRound can send tokens to all experts in turn; routers still say theirs."""

    def first_block():
        terms.clear()
        config = VSRAQConfig(iters=1, router_weight=1.0, objective="router_kl")
        quantize(tiny.tiny_model("qwen3_moe"), config, amp=False)
        (targets,) = terms[0][1]["router"].fp_targets.values()
        lines = [
            m for m in vsraq_log if m.startswith("vsraq: model.layers.0.mlp.gate ")
        ]
        return torch.cat([logits_of(t) for t in targets]), lines[-1]

    free, free_line = first_block()
    monkeypatch.setenv("AR_FORCE_MOE_ROUTING_ALL_EXPERTS", "1")
    forced, forced_line = first_block()
    assert torch.equal(free, forced)
    assert free_line == forced_line  # what routers choose, not where tokens were sent


def test_coverage_counts_and_saves(tmp_path):
    coverage = ExpertCoverage(min_tokens=2)
    assert not coverage
    selected = torch.tensor([[0, 1], [0, 2], [3, 0]], dtype=torch.int16)
    in_full_precision = torch.tensor([[4, 1], [4, 2], [3, 4]], dtype=torch.int16)
    coverage.add("gate", 5, selected, in_full_precision)
    coverage.add("gate", 5, selected, in_full_precision, torch.tensor([1, 0, 0]))
    assert coverage.tokens["gate"].tolist() == [4, 2, 1, 1, 0]
    assert coverage.fp_tokens["gate"].tolist() == [0, 2, 1, 1, 4]
    assert coverage.starved("gate") == [2, 3, 4]
    path = coverage.save(tmp_path / "new")
    assert json.loads(path.read_text()) == coverage.as_dict()
    assert [p.name for p in path.parent.iterdir()] == [FILE_NAME]
    assert list(coverage.table())[1].split() == ["gate", "0", "1", "4", "3", "of", "5"]
