# SPDX-License-Identifier: Apache-2.0
"""The routing benchmark: its cells, its arithmetic, and the documents that quote it."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import routing
import routing_ceiling
from vsraq import VSRAQConfig
from vsraq.analysis import closeness

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the script inside this process; what it prints comes back."""

    def run(name, *arguments, results):
        argv = [routing.__file__, name, *arguments, "--results", str(results)]
        monkeypatch.setattr(sys, "argv", argv)
        if name == "run":  # with this module's `bench_model_path`
            parsed = routing.parse()
            parsed.worker = 0
            routing.run_cells(parsed)
        else:
            runpy.run_path(routing.__file__, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.usefixtures("small_bench_model")
def test_a_finished_cell_is_not_run_again(command, tmp_path):
    results = tmp_path / "results.jsonl"
    run = ["run", "--models=solar_open", "--schemes=W4A16", "--seeds=0"]
    run += ["--iters=1", "--nsamples=4", "--windows=2", "--methods"]
    methods = ["RTN", "AutoRound", "RTN + re-fit"]
    first = command(*run, *methods[:2], results=results)
    assert len(re.findall(r"^\[", first, re.M)) == 2
    second = command(*run, *methods, results=results)
    assert [m[1] for m in re.finditer(r"^\[(\d)/3\]", second, re.M)] == ["3"]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["method"] for line in lines] == methods
    for line in lines:
        assert len(line["heldout"]["jaccard"]) == 4
        assert line["peak_mib"] > 100
    table = command("table", "--iters=1", "--nsamples=4", results=results)
    assert "| solar_open | W4A16 | AutoRound |" in table


def cell_of(method, seed=0, iters=1, nsamples=2):
    options = routing.options_of(method)
    place = ("solar_open", "x", "W4A16")
    return routing.Cell(*place, method, options, seed, iters, nsamples, 64, "cpu")


def test_the_methods_are_configurations():
    for name in routing.METHODS:
        config = routing.config_of(name, 1)
        assert config == "rtn" or config.iters == 1
    config = routing.config_of(routing.DEFAULT, 1)
    assert config.alignment == VSRAQConfig().alignment
    assert config.alignment.own_objective == VSRAQConfig().alignment.own_objective


def test_a_cell_says_what_its_method_meant():
    """So that a cell is run again when a default that it used has changed."""
    options = json.loads(routing.options_of(routing.DEFAULT))
    alignment = options["alignment"]
    assert alignment["auto_ratio"] == 1
    assert alignment["realign_routers"]["ridge"] == 1e-3
    assert not alignment["token_selection"]  # selects no tokens
    assert options["objective"] == "top3k_mse(multiplier=3)"
    assert json.loads(routing.options_of("AutoRound")) == {"arguments": {}}


def test_results_of_several_trainings_are_not_mixed():
    own = result("AutoRound", 0, 0.8, 0.10, 10)
    with pytest.raises(ValueError, match="several trainings of a model"):
        routing.rows([own, own | {"weights": "y", "seed": 1}], "heldout", 50, 32)
    assert routing.rows([own, own | {"weights": "y", "iters": 9}], "heldout", 50, 32)


def test_full_precision_routing_leaves_the_damage_of_the_layers():
    fp_model = routing.load_bench_model("solar_open")
    q_model = routing.load_bench_model("solar_open")
    batches = routing.heldout_texts(4)["heldout"]
    assert routing_ceiling.kl_with_routing(q_model, fp_model, batches) < 1e-9
    with torch.no_grad():
        q_model.model.layers[0].self_attn.o_proj.weight.mul_(0.9)
    routed = routing_ceiling.kl_with_routing(q_model, fp_model, batches)
    assert 0 < routed < closeness(q_model, fp_model, batches).kl


def test_the_cost_of_selecting_tokens_is_measured():
    script = Path(routing.__file__).with_name("token_selection.py")
    small = ["--layers=1", "--hidden=64", "--vocab=4096", "--samples=8", "--seqlen=16"]
    printed = subprocess.run(
        [sys.executable, script, *small, "--repeats=1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"W4A16: median ratio \d+\.\d\d, peak \d+ MiB", printed)


def result(method, seed, jaccard, kl, seconds):
    return asdict(cell_of(method, seed, 50, 32)) | {
        "seconds": seconds,
        "peak_mib": 100.0,
        "heldout": {"jaccard": {"a": jaccard, "b": 1.0}, "kl": kl, "perplexity": 9.0},
    }


def test_the_likelihood_is_compared_within_a_seed():
    results = []
    for scheme, more in (("W4A16", 1.02), ("W3A16", 1.04)):
        for seed, perplexity in ((0, 9.0), (1, 12.0)):
            for method, factor in (("AutoRound", 1.0), ("VSRAQ", more)):
                line = result(method, seed, 0.9, 0.1, 1) | {"scheme": scheme}
                own = line["heldout"] | {"perplexity": perplexity * factor}
                results.append(line | {"heldout": own, "wikitext": own})
    few, many = results, [line | {"nsamples": 128} for line in results]
    lines = routing.format_likelihood([*few, *many]).splitlines()[2:]
    shown = "+0.0295 ± 0.0097"  # of ln 1.02 and ln 1.04
    assert lines == [
        f"| VSRAQ | {windows} | {shown} | {shown} | 2 |" for windows in (32, 128)
    ]


def test_the_share_of_the_gap_is_taken_within_a_seed():
    results = [
        result("AutoRound", 0, 0.8, 0.10, 10),
        result("VSRAQ", 0, 0.9, 0.08, 12),
        result("AutoRound", 1, 0.6, 0.20, 10),
        result("VSRAQ", 1, 0.7, 0.21, 11),
        result("VSRAQ", 2, 0.9, 0.01, 11),  # no AutoRound to compare with
    ]
    table = routing.rows(results, "heldout", 50, 32)
    row = table["solar_open", "W4A16", "VSRAQ"]
    assert row.jaccard_closed == pytest.approx([0.5, 0.25])
    assert row.kl_closed == pytest.approx([0.2, -0.05])
    assert row.time_ratio == pytest.approx([1.2, 1.1])
    assert row.jaccard == pytest.approx([0.95, 0.85])
    changed = [r | {"options": "{}"} for r in results if r["method"] == "VSRAQ"]
    assert not routing.rows(changed + results[:1], "heldout", 50, 32).keys() - {
        ("solar_open", "W4A16", "AutoRound")
    }
    plain = table["solar_open", "W4A16", "AutoRound"]
    assert plain.jaccard_closed == [0.0, 0.0]
    everywhere = routing.run_everywhere(table, ["W4A16"])
    assert everywhere == table
    partial = result("AutoRound", 0, 0.8, 0.1, 10) | {"scheme": "W3A16"}
    table = routing.rows([*results, partial], "heldout", 50, 32)
    schemes = ["W4A16", "W3A16"]
    methods = {m for _, _, m in routing.run_everywhere(table, schemes)}
    assert methods == {"AutoRound"}  # VSRAQ is not in every cell
    summary = routing.format_summary(table, ["W4A16"])
    assert "| VSRAQ | 37.5 | 7.5 | 37.5 | 7.5 | 0 | 1.15 | 1 |" in summary


def test_the_document_shows_what_the_command_prints(command, tmp_path):
    copy = tmp_path / "results.md"
    shown = routing.DOCUMENT.read_text()
    # the table of benchmarks/bits.py has MiB behind the name
    copy.write_text(shown.replace("| AutoRound | 0.", "| other | 0."))
    command("document", f"--path={copy}", results=routing.RESULTS)
    assert copy.read_text() == shown
