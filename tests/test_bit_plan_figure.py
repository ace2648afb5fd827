# SPDX-License-Identifier: Apache-2.0
"""A bit plan as a table and as a figure."""

import re
import sys
from dataclasses import replace

import pytest

from vsraq.bits import BitPlan
from vsraq.bits.plan import Cost, PlannedUnit
from vsraq.bits.tradeoffs import budget_curve, plan_damage, slopes
from vsraq.report.bits import places
from vsraq.report.figures import bits_by_layer
from vsraq.report.folder import Folder

KINDS = {
    "self_attn.qkv_proj": (1, 1.0, 4.0),
    "mlp.experts": (8, 0.25, 2.0),
    "mlp.shared_experts.down_proj": (1, 1.0, 1.0),
}
MIB = 2**20


def made_up(blocks=3, head=False, **changes):
    """A plan: experts of fewer bits in the last block, attention of more."""
    units = []
    for block in range(blocks):
        for kind, (size, share, damage) in KINDS.items():
            experts = kind == "mlp.experts"
            last = block == blocks - 1
            bits = {4: 1.0, 8: 0.1} | ({3: 3.0} if experts else {})
            kl = damage / (block + 1) / 100
            candidates = {
                f"W{b}A16": Cost(
                    b * size * MIB, b * size * MIB * share, kl * f, kl * f / 2
                )
                for b, f in bits.items()
            }
            chosen = ("W3A16" if last else "W4A16") if experts else "W8A16"
            name = f"model.layers.{block}.{kind}"
            units.append(PlannedUnit(name, (name,), chosen, candidates))
    if head:
        candidates = {"BF16": Cost(16 * MIB, 16 * MIB, 0.0, 0.0)}
        candidates["W8A16"] = Cost(8 * MIB, 8 * MIB, 0.001, 0.0)
        units.append(PlannedUnit("lm_head", ("lm_head",), "W8A16", candidates))
    plain = 100 * MIB

    def cost(kl, name):
        costs = [u.candidates[getattr(u, name)] for u in units]
        size = plain + sum(c.bytes for c in costs)
        return Cost(size, plain + sum(c.active_bytes for c in costs), kl, kl / 2)

    values = {
        "model": "made/up",
        "config_digest": "sha256:0",
        "scheme": "W4A16",
        "export_format": "auto_round",
        "engine": "vllm",
        "budget": "3%",
        "active_budget": None,
        "metric": "kl",
        "tokens": 4096,
        "units": tuple(units),
        "default": {"bits": 4, "group_size": 128, "sym": True},
        "layer_config": {},
        "uniform": cost(0.05, "base"),
        "planned": cost(0.03, "chosen"),
        "flip_kl": 0.3,
        "versions": {},
    }
    return BitPlan(**values | changes)


def test_the_table_has_a_row_per_unit_and_marks_what_was_chosen():
    plan = made_up(head=True)
    lines = str(plan).splitlines()
    assert "KL, 1e-3 nats" in lines[0]
    header = lines[1].split()
    schemes = ["W3A16", "W4A16", "W8A16", "BF16"]
    assert header == ["unit", "scheme", "MiB", "active", *schemes, *schemes]
    rows = [line.split() for line in lines[3 : 3 + len(plan.units)]]
    experts = "0.mlp.experts W4A16 32.00 8.00 60.00 20.00* 2.00 3.00 1.00* 0.10"
    assert experts.split() in rows
    assert rows[-1] == "lm_head W8A16 8.00 8.00 1.00* 0.00 0.00* 0.00".split()
    assert all(sum(cell.endswith("*") for cell in row) == 2 for row in rows)
    rest = "\n".join(lines[3 + len(plan.units) :])
    assert "names without model.layers." in rest
    assert "W4A16 in auto_round for vllm, budget 3%, metric kl, 4,096 tokens" in rest
    assert re.search(r"plan +\S+ MiB, \S+ MiB active, KL 0\.03000", rest)
    assert "-40.0 % KL" in rest
    width = lines[2]
    assert all(len(line) <= len(width) for line in lines[: 3 + len(plan.units)])


def test_slopes_are_damage_per_mib():
    more, fewer = slopes(made_up(head=True), "kl")
    assert list(more) == list(KINDS)
    assert list(fewer) == ["mlp.experts", "lm_head"]
    first = more["mlp.experts"][0]
    assert (first.block, first.chosen) == (0, False)
    assert first.per_mib == pytest.approx(0.02 * 0.9 / 32)
    last = fewer["mlp.experts"][-1]
    assert (last.block, last.chosen) == (2, True)
    assert last.per_mib == pytest.approx(0.02 / 3 * 2 / 8)
    assert fewer["lm_head"][0].block == 3


def test_the_curve_falls_and_is_below_the_plan():
    plan = made_up()
    sizes, damages = budget_curve(plan, "kl")
    assert sizes == sorted(sizes)
    assert damages == sorted(damages, reverse=True)
    assert sizes[-1] <= 1.1 * plan.uniform.bytes
    smaller = [d for s, d in zip(sizes, damages, strict=True) if s <= plan.bytes]
    assert plan_damage(plan, "kl") == plan.predicted_kl
    assert damages[-1] < plan.predicted_kl <= smaller[0]
    tight = replace(plan, active_budget="0%")
    assert budget_curve(tight, "kl")[1][-1] > damages[-1]
    routing = replace(plan, metric="routing")
    assert budget_curve(routing, "routing")[0] == sizes


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("blocks", [2, 48])
def test_the_figure_is_drawn(suffix, blocks, tmp_path):
    if (suffix, blocks) == ("svg", 48):
        pytest.skip("the size matters for neither format")
    path = tmp_path / f"plan.{suffix}"
    made_up(blocks, head=True, metric="kl" if blocks == 2 else "routing").plot(path)
    data = path.read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
        return
    text = data.decode()
    for words in ("decoder block", "1e-3 nats per MiB", "measured, all W4A16 (", "lm_"):
        assert words in text
    made_up(blocks, head=True).plot(path)
    assert path.read_bytes() == data


def test_what_a_figure_needs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"plan.pdf'.*ends with \.png or \.svg"):
        made_up().plot(tmp_path / "plan.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("vsraq.bits.figure.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"pip install matplotlib.*vsraq\[report\]"):
        made_up().plot(tmp_path / "plan.png")


def test_a_plan_with_one_scheme_and_no_damage_is_drawn(tmp_path):
    cost = Cost(MIB, MIB, 0.0, 0.0)
    unit = PlannedUnit("odd", ("odd",), "W4A16", {"W4A16": cost})
    made_up(units=(unit,), uniform=cost, planned=cost).plot(tmp_path / "plan.png")


def test_bits_that_could_not_be_read_are_not_those_of_the_plan(tmp_path):
    folder = Folder(path=tmp_path, plan=made_up())
    assert [picture.name for picture in bits_by_layer.draw(folder)] == [
        *("bits", "damages")
    ]
    unread = replace(folder, unread=("The bits of the layers could not be read: x",))
    assert [picture.name for picture in bits_by_layer.draw(unread)] == ["damages"]


def test_experts_that_are_directly_in_the_block_are_one_kind():
    sizes = {
        f"model.layers.{block}.{kind}": 1.0
        for block in range(2)
        for kind in ("experts.0.gate_proj", "experts.5.down_proj", "mlp.up_proj")
    }
    assert set(places(sizes).values()) == {
        (kind, block) for block in range(2) for kind in ("experts", "up_proj")
    }
