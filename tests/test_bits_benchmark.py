# SPDX-License-Identifier: Apache-2.0
"""The benchmark of bit plans: its cells, its arithmetic, and what quotes it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import bits
import bits_grid
import bits_tables
import routing
from vsraq.bits.engines import ENGINES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the script inside this process; what it prints comes back."""

    def run(*arguments, results):
        argv = [bits.__file__, *arguments, "--results", str(results)]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(bits.__file__, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.usefixtures("small_bench_model")
def test_cells_spend_the_bytes_of_their_budget(command, tmp_path):
    results = tmp_path / "results.jsonl"
    run = ["run", "--models=solar_open", "--schemes=W4A16", "--seeds=0", "--iters=1"]
    run += ["--nsamples=4", "--windows=2", "--recipes=AutoRound"]
    run += ["--budgets", "uniform", "+3 % vllm", "0 %"]
    run += ["--ways", "uniform", "attention first", "random 0"]
    printed = command(*run, results=results)
    assert len(re.findall(r"^\[", printed, re.M)) == 4
    assert command(*run, results=results) == ""
    lines = {
        (line["budget"], line["way"]): line
        for line in map(json.loads, results.read_text().splitlines())
    }
    uniform = lines["uniform", "uniform"]["bytes"]
    unit = 7_000  # the largest unit that is left out takes more than what is left
    for way in ("attention first", "random 0"):
        more = lines["+3 % vllm", way]["bytes"] - uniform
        assert 0.03 * uniform - unit < more <= 0.03 * uniform
    random = lines["0 %", "random 0"]
    assert uniform - unit < random["bytes"] <= uniform
    assert len(random["jaccard"]) == 4
    table = command("table", results=results)
    assert "| solar_open | W4A16 | +3 % vllm | attention first | AutoRound |" in table


def result(seed, way, kl, jaccard, recipe="AutoRound"):
    cell = bits_grid.Cell(
        "solar_open", "x", "W4A16", "0 %", way, recipe, seed, 50, 32, 128
    )
    figures = {"bytes": 2**20, "active": 2**19, "kl": kl, "jaccard": {"a": jaccard}}
    figures |= {"seconds": 60.0}
    return vars(cell) | figures | {"excess_nll": 0.01, "excess_nll_error": 0.002}


def test_the_gap_is_that_of_autoround_with_the_same_seed():
    results = [
        result(0, "uniform", 0.10, 0.90),
        result(1, "uniform", 0.20, 0.80),
        result(0, "plan", 0.05, 0.95),
        result(1, "plan", 0.15, 0.90),
        result(2, "plan", 0.15, 0.90),  # nothing to compare it with
        {"error": "fails"} | result(0, "AutoScheme", 1.0, 0.5),
    ]
    table = bits_tables.rows(results)
    row = table["solar_open", "W4A16", "0 %", "plan", "AutoRound"]
    assert row.kl == [0.05, 0.15]
    assert row.kl_closed == pytest.approx([0.5, 0.25])
    assert row.jaccard_closed == pytest.approx([0.5, 0.5])
    assert set(key[3] for key in table) == {"uniform", "plan"}
    line = bits_tables.format_table(table).splitlines()[-1]
    assert line.split(" | ")[5:] == [
        "1.000",
        "0.500",
        "0.9250",
        "50.0 ± 0.0",
        "0.1000",
        "37.5 ± 12.5",
        "+0.0100 ± 0.0020",
        "2 |",
    ]


def test_other_weights_are_another_model():
    """Not another seed of the same one."""
    results = [
        result(0, "uniform", 0.10, 0.90),
        result(0, "uniform", 0.20, 0.80) | {"weights": "y"},
        result(1, "uniform", 0.10, 0.90),
    ]
    table = bits_tables.rows(results)
    seeds = {key[0]: len(row.kl) for key, row in table.items()}
    assert seeds == {"solar_open": 2, "solar_open, weights 2": 1}
    assert bits_tables._models(table) == list(seeds)


def test_a_recipe_is_compared_with_autoround_on_the_same_bytes():
    results = [
        result(0, "uniform", 0.10, 0.90),
        result(0, "plan", 0.04, 0.96),
        result(0, "plan", 0.03, 0.97, "default"),
        result(1, "uniform", 0.10, 0.90),
        result(1, "plan", 0.06, 0.94),
        result(1, "plan", 0.06, 0.95, "default"),
    ]
    table = bits_tables.format_recipes(bits_tables.rows(results))
    assert table.splitlines()[2:] == ["| plan | default | 1 | 20.0 | 10.0 | +0.0000 |"]
    longer = [line | {"iters": 200} for line in results]
    assert bits_tables.tables(results)["bits long"].count("\n") == 1
    assert bits_tables.tables(longer)["bits"].count("\n") == 1


def test_the_document_shows_what_the_command_prints(command, tmp_path):
    copy = tmp_path / "results.md"
    shown = routing.DOCUMENT.read_text()
    copy.write_text(shown.replace("| plan | default |", "| other | default |"))
    command("document", f"--path={copy}", results=bits.RESULTS)
    assert copy.read_text() == shown


def test_every_result_is_of_a_way_that_is_there():
    for line in routing.read_results(bits.RESULTS):
        assert line["way"] in bits_grid.WAYS[line["scheme"]][line["budget"]]
        assert line["recipe"] in bits_grid.RECIPES


def test_the_page_has_every_rule_and_its_source():
    page = (ROOT / "docs" / "bits.md").read_text()
    for engine in ENGINES.values():
        for source in engine.sources:
            row = (
                f"| {engine.name} {engine.version} | {source.says} | `{source.file}` | "
                f"{source.lines} |"
            )
            assert row in page
