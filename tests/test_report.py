# SPDX-License-Identifier: Apache-2.0
"""Figures and the report from files; the browser's part is test_report_browser.py."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import save_file

import browser
from report_data import MadeUp, run_record, write_export
from test_bit_plan_figure import made_up
from vsraq import report
from vsraq.cli import main
from vsraq.report import picture, write_figures, write_report
from vsraq.report.figures import draw_all, expert_load, jaccard_by_layer, ranks
from vsraq.report.findings import compared
from vsraq.report.folder import read_folder
from vsraq.report.picture import WIDTH
from vsraq.report.run_findings import exported
from vsraq.report.svg import VARIABLES
from vsraq.report.tables import headline, per_layer
from vsraq.report.wording import shortened

EVIL = "<script>alert(1)</script> & $x_1$"
COMPARED = {
    *("jaccard_by_layer", "routing_and_output", "dropped_ranks", "injected_ranks"),
    *("distributions", "replay", "jsd_and_sampled_jsd"),
}
EXPORTED = {"bits", "damages", "tuning_curves"}


class Page(HTMLParser):
    """The parts of a page that the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.figures = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "figure":
            self.figures.append(found["id"])


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    made = MadeUp({EVIL: 1.0, "VSRAQ": 0.5}, layers=4, experts=16, tokens=200)
    return made.write(tmp_path_factory.mktemp("report") / "compare")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("report") / "export")


@pytest.fixture(scope="module")
def page(compare, export):
    text = write_report([compare, export]).read_text()
    return text, Page(text)


@pytest.fixture(scope="module")
def figures(compare, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "of" / "compare"
    return write_figures(compare, out)


def test_every_figure_is_a_png_and_an_svg_of_one_column(figures):
    names = {path.stem for path in figures}
    assert names == COMPARED | {"expert_load_0", "expert_load_1"}
    assert len(figures) == 2 * len(names)
    for path in figures:
        if path.suffix == ".png":
            assert matplotlib.image.imread(path).shape[1] == round(300 * WIDTH)
        else:
            root = ElementTree.parse(path).getroot()
            assert root.get("width") == f"{72 * WIDTH:g}pt"


def test_axes_have_labels_and_names_are_not_formulas(figures):
    texts = {path.stem: path.read_text() for path in figures if path.suffix == ".svg"}
    for name, words in {
        "jaccard_by_layer": ["decoder block", "Jaccard with full precision", "VSRAQ"],
        "dropped_ranks": ["rank in full precision", "dropped experts, %"],
        "injected_ranks": ["injected experts, %", "2K", "3K"],
        "routing_and_output": ["Sampled-JSD, nats", "routing shift (mean of layers)"],
        "distributions": ["tokens, %", "Sampled-JSD, nats"],
        "replay": ["chosen tokens, %", "closer to full precision"],
        "expert_load_0": ["expert", "decoder block", "difference"],
    }.items():
        for word in words:
            assert f">{word}<" in texts[name], (name, word)
    assert "&lt;script&gt;alert(1" in texts["jaccard_by_layer"]
    assert "mathdefault" not in "".join(texts.values())


def test_scatters_are_pixels_inside_an_svg(figures):
    (path,) = [p for p in figures if p.name == "routing_and_output.svg"]
    text = path.read_text()
    assert text.count("<image ") == 2  # one per method
    assert text.count("<use ") < 200


def test_a_file_is_the_same_twice(compare, figures, tmp_path):
    folder = read_folder(compare)
    with picture.house_style():
        for found in (*jaccard_by_layer.draw(folder), *ranks.draw_injected(folder)):
            found.figure.draw_without_rendering()
            found.figure.set_layout_engine("none")
            _, svg = found.save(tmp_path)
            (other,) = [path for path in figures if path.name == svg.name]
            assert svg.read_bytes() == other.read_bytes()


def test_the_page_has_every_figure_and_is_small(page):
    text, parsed = page
    of_compare = COMPARED | {"expert_load_0", "expert_load_1"}
    wanted = {f"s0-{n}" for n in of_compare} | {f"s1-{n}" for n in EXPORTED}
    assert set(parsed.figures) == wanted
    assert len(text) < 5e6
    assert len(parsed.ids) == len(set(parsed.ids))


def test_the_page_loads_nothing(page):
    text, parsed = page
    for tag, attributes in parsed.tags:
        assert not (tag == "script" and "src" in attributes)
        for name in ("href", "src", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:")), (tag, target)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_names_are_escaped(page):
    text, parsed = page
    assert "<script>alert" not in text
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$" in text


def test_figures_follow_the_colours_of_the_page(page):
    text, _ = page
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    for colour in VARIABLES:
        loose = re.findall(rf"(?<!, ){colour}\b", svg)
        assert not loose, colour
    assert "var(--series-0, #0072b2)" in svg
    assert "DejaVu" not in svg
    assert "prefers-color-scheme: dark" in text
    assert svg.count("color-mix(in srgb, var(--series-1) 20.0%") >= 3


def test_every_figure_is_described(page):
    _, parsed = page
    drawn = [found for tag, found in parsed.tags if tag == "svg"]
    assert len(drawn) == len(parsed.figures)
    for found in drawn:
        assert found["role"] == "img"
        assert found["aria-labelledby"] in parsed.ids
        assert found["aria-describedby"] in parsed.ids


def test_the_best_is_bold_and_ties_are_marked(compare):
    results = read_folder(compare).results
    rows = {r.metric.key: r for rows in headline(results).values() for r in rows}
    for key in ("kl", "jaccard", "perplexity"):
        assert [cell.best for cell in rows[key].cells] == [False, True], key
    assert rows["jaccard"].fp == "1"
    assert not any(cell.best for cell in rows["inside_2k"].cells)
    close = MadeUp({"a": 1.0, "b": 1.0}).results
    metrics = [m["metrics"] for m in close["methods"].values()]
    metrics[0]["kl"] = {"value": 0.02, "low": 0.01, "high": 0.03}
    metrics[1]["kl"] = {"value": 0.021, "low": 0.011, "high": 0.031}
    row = next(
        r for r in headline(type(results)(**close))["Output"] if "kl" in r.metric
    )
    assert [(c.best, c.tied) for c in row.cells] == [(True, False), (False, True)]


def test_findings_say_what_the_numbers_say(compare):
    folder = read_folder(compare)
    results = folder.results
    text = "\n".join(" ".join(f) for f in compared(results, folder.replay))
    best = results.methods["VSRAQ"]
    values = [layer.metrics["jaccard"].value for layer in best.layers]
    worst = results.layers[values.index(min(values))].block
    assert "VSRAQ is nearest to full precision" in text
    assert f"Layer {worst} loses most" in text
    share = best.metrics["inside_3k"].value
    assert f"{100 * share:.0f} % of injected experts come from ranks 5 to 12" in text
    never = sum(layer.load.count(0) for layer in results.layers)
    if never:
        assert f"This text never reaches {never} of 64 experts" in text


def test_findings_of_a_run_and_its_plan(export):
    folder = read_folder(export)
    text = "\n".join(" ".join(f) for f in exported(folder.run, folder.plan))
    assert "3 experts saw no calibration token" in text
    assert "Expert 4 of model.layers.1.mlp.gate, " in text
    assert "1 block of 6 gained nothing from tuning" in text
    assert "model.layers.2 kept the first iteration" in text
    assert "The re-fit helped 6 of 6 routers" in text
    assert "The bit plan gives 13 units of 18 another scheme" in text


def test_a_model_that_equals_full_precision_is_shown(tmp_path):
    """No dropped, no injected expert, nothing beyond 0."""
    made = MadeUp({"itself": 0.0}, layers=2, experts=8, tokens=50)
    of = made.results["methods"]["itself"]
    nothing = {"value": None, "low": None, "high": None}
    for metrics in (of["metrics"], *(layer["metrics"] for layer in of["layers"])):
        for name in metrics:
            metrics[name] = {"value": 0.0, "low": 0.0, "high": 0.0}
        metrics |= {"inside_2k": nothing, "inside_3k": nothing}
        metrics["jaccard"] = {"value": 1.0, "low": 1.0, "high": 1.0}
    for layer in of["layers"]:
        layer["dropped_ranks"] = [0] * 4
        layer["injected_ranks"] = [0] * 4
    for found in of["histograms"].values():
        found["below"] += sum(found["counts"])
        found["counts"] = [0] * len(found["counts"])
    made.sampled = {name: 0 * values for name, values in made.sampled.items()}
    text = write_report(made.write(tmp_path, replay=False)).read_text()
    assert "itself keeps 100.0 % of the routing" in text
    assert "No expert was dropped." in text
    assert "nan" not in text.replace("finance", "")


def test_layers_of_different_size(tmp_path):
    made = MadeUp({"one": 1.0}, layers=2, experts=8, tokens=50)
    del made.results["layers"][1]["load"][6:]
    of = made.results["methods"]["one"]["layers"][1]
    made.results["layers"][1]["num_experts"] = 6
    del of["load"][6:], of["injected_ranks"][2:]
    folder = read_folder(made.write(tmp_path, replay=False))
    with picture.house_style():
        (load,) = expert_load.draw(folder)
        assert [found.name for found in ranks.draw_injected(folder)]
    assert [len(row) for row in load.grids["load-quantized"].values] == [8, 6]
    assert len(per_layer(folder.results).rows) == 2


def test_ranks_of_layers_with_other_k(tmp_path):
    """Shares inside 2K and 3K are those of each layer's own K."""
    made = MadeUp({"one": 1.0}, layers=2, experts=16, top_k=4, tokens=50)
    made.results["layers"][1]["top_k"] = 2
    first, second = made.results["methods"]["one"]["layers"]
    first["injected_ranks"] = [8, 4, 4, 2, 1, 1, 1, 1, 1, 1, 0, 0]
    second["injected_ranks"] = [10, 6, 4, 3, 1, 1, 1] + [0] * 7
    first["dropped_ranks"], second["dropped_ranks"] = [1, 2, 4, 17], [6, 20]
    total = 24 + 26
    expected = {2: (18 + 16) / total, 3: (18 + 16 + 4 + 7) / total}
    folder = read_folder(made.write(tmp_path, replay=False))
    with picture.house_style():
        (injected,), (dropped,) = (
            ranks.draw_injected(folder),
            ranks.draw_dropped(folder),
        )
    (line,) = [r for r in injected.figure.axes[0].lines if r.get_gid() == "injected-0"]
    shares = dict(zip(*line.get_data(), strict=True))
    for times, share in expected.items():
        found = sum(value for place, value in shares.items() if place <= times + 1e-9)
        assert found == pytest.approx(100 * share)
    assert "ranks K + 1 to 2K" in injected.description
    assert injected.tips["injected-0"][0].startswith(
        "one, rank over 1 K to 1.5 K: 44.0"
    )
    assert "74 % of the dropped experts had the last rank that is chosen, 2 or 4" in (
        dropped.description
    )
    assert "come from ranks K + 1 to 3K" in "\n".join(
        found.headline for found in compared(folder.results, None)
    )


def test_many_methods_differ_in_more_than_colour(tmp_path):
    made = MadeUp({f"m{i}": 1.0 for i in range(12)}, layers=2, experts=8, tokens=50)
    folder = read_folder(made.write(tmp_path, replay=False))
    with picture.house_style():
        for draw in (ranks.draw_dropped, ranks.draw_injected):
            (found,) = draw(folder)
            shown = found.figure.legends[0].legend_handles
            looks = {(h.get_marker(), h.get_linestyle()) for h in shown}
            colours = {h.get_color() for h in shown}
            both = {(h.get_color(), h.get_marker()) for h in shown}
            assert len(colours) < len(both) == len(shown) == 12
            assert len(looks) > 4


def test_a_quantile_is_the_bin_in_which_it_lies(tmp_path):
    made = MadeUp({"one": 1.0}, layers=2, experts=8, tokens=50)
    found = made.results["methods"]["one"]["histograms"]
    found["sampled_jsd"] = {
        "edges": [0.1, 0.2, 0.4, 0.8],
        "counts": [40, 30, 10],
        "below": 15,
        "above": 5,
    }
    folder = read_folder(made.write(tmp_path, replay=False))
    (drawn,) = [p for p in draw_all(folder) if p.name == "distributions"]
    assert drawn.table.rows[1][2:6] == [
        *("below 0.100", "0.100 to 0.200", "0.400 to 0.800", "above 0.800")
    ]
    assert "the bin in which it lies" in drawn.caption


def test_every_figure_stays_away_without_its_data(tmp_path):
    write_export(tmp_path, plan=False)
    folder = read_folder(tmp_path)
    assert [found.name for found in draw_all(folder)] == ["tuning_curves"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: r.update(format="vsraq-compare/9"), "format: Input should be "),
        (lambda r: r.pop("layers"), "layers: Field required"),
        (lambda r: r.update(methods={}), "methods: Dictionary should have at least 1"),
        (
            lambda r: r["methods"]["VSRAQ"]["metrics"].pop("kl"),
            "methods.VSRAQ.metrics: Value error, lacks kl",
        ),
        (
            lambda r: r["methods"]["VSRAQ"]["layers"].pop(),
            'the layers of "VSRAQ" are not those of full precision',
        ),
        (
            lambda r: r["methods"].update(other=r["methods"]["VSRAQ"]),
            "'other/sampled_jsd'; allowed is the file that `vsraq compare` wrote",
        ),
    ],
)
def test_files_that_are_something_else_are_refused(break_it, message, tmp_path, capsys):
    made = MadeUp({"VSRAQ": 1.0}, layers=2, experts=8, tokens=20)
    break_it(made.results)
    made.write(tmp_path)
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_folders_without_anything_are_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "nothing to show there; allowed is a folder with" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "no")]) == 1
    assert "no such folder; allowed is" in capsys.readouterr().err
    (tmp_path / "vsraq_run.json").write_text("[1")
    assert main(["report", str(tmp_path)]) == 1
    assert "Expecting ',' delimiter" in capsys.readouterr().err


def test_the_command_writes_the_page_and_the_figures(export, tmp_path, capsys):
    out, figures = tmp_path / "new" / "page.html", tmp_path / "figures"
    command = ["report", str(export), f"--out={out}", f"--figures={figures}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said == f"written to {out}\n6 figures written to {figures}\n"
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert {path.stem for path in figures.iterdir()} == EXPORTED


def test_without_matplotlib_the_remedy_is_named(export, monkeypatch, capsys):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    for figures in ([], [f"--figures={export}"]):
        assert main(["report", str(export), *figures]) == 1
        said = capsys.readouterr().err
        assert "run `pip install 'vsraq[report]'`" in said
        assert said.count("\n") == 1


def test_matplotlib_is_imported_late():
    for path in Path(report.__file__).parent.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not any(line.startswith(("import matp", "from matp")) for line in lines)


def test_bits_of_an_export_are_read_from_its_files(tmp_path):
    """q in 4 bits, one expert in 8, the router and lm_head in full precision."""
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "extra_config": {"model.layers.1.mlp.experts.1.up_proj": {"bits": 8}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors = {"lm_head.weight": np.zeros((8, 64), np.float32)}
    for block in range(2):
        name = f"model.layers.{block}"
        tensors[f"{name}.mlp.gate.weight"] = np.zeros((2, 64), np.float16)
        for layer in ("self_attn.q_proj", "mlp.experts.0.up_proj"):
            tensors[f"{name}.{layer}.qweight"] = np.zeros((8, 32), np.int32)
        bits = 4 * (1 + block)
        words = np.zeros((2 * bits, 32), np.int32)
        tensors[f"{name}.mlp.experts.1.up_proj.qweight"] = words
    save_file(tensors, tmp_path / "model.safetensors")
    folder = read_folder(tmp_path)
    assert folder.bits.outside == {"lm_head": 32.0}
    assert folder.bits.cells == {
        **{("q_proj", block): 4.0 for block in (0, 1)},
        **{("gate", block): 16.0 for block in (0, 1)},
        ("experts", 0): 4.0,
        ("experts", 1): 6.0,
    }
    (found,) = draw_all(folder)
    assert found.description == (
        "Most quantized layers have 4 bits, 1 other: experts in block 1 has 6. "
        "lm_head has 32 bits."
    )


def test_stacks_of_blocks_do_not_share_a_cell(tmp_path):
    """Images and the prediction of further tokens have blocks of their own."""
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    stacks = {
        "model.visual.blocks": np.float32,
        "model.language_model.layers": np.float16,
        "mtp.layers": np.float32,
    }
    tensors = {}
    for stack, dtype in stacks.items():
        size = 64 if dtype == np.float16 else 8
        for block in range(2):
            for layer in ("mlp.gate", "self_attn.q_proj"):
                name = f"{stack}.{block}.{layer}.weight"
                tensors[name] = np.zeros((size, 8), dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    cells = read_folder(tmp_path).bits.cells
    expected = {}
    for prefix, bits in (("", 16.0), ("visual: ", 32.0), ("mtp: ", 32.0)):
        for kind in ("gate", "q_proj"):
            expected |= {(prefix + kind, block): bits for block in range(2)}
    assert cells == expected


def test_units_of_several_stacks_do_not_share_a_cell(tmp_path):
    plan = made_up(blocks=2)
    other = [
        replace(u, name=f"mtp.{u.name.removeprefix('model.')}", chosen="W8A16")
        for u in plan.units
        if "experts" not in u.name
    ]
    replace(plan, units=(*plan.units, *other)).save(tmp_path / "vsraq_bit_plan.json")
    bits, damages = draw_all(read_folder(tmp_path))
    for found, gid in ((bits, "bits-map"), (damages, "damage-map")):
        names = found.grids[gid].row_names
        assert names.count("mtp: qkv_proj") == names.count("qkv_proj") == 1


UNREADABLE = {"quant_method": "made-up", "bits": 4}


@pytest.mark.parametrize(
    ("config", "tensors", "reason"),
    [
        ("{", {}, "config.json: cannot be read (Expecting property name"),
        (
            json.dumps({"quantization_config": {"bits": 4}}),
            None,
            "neither model.safetensors.index.json nor model.safetensors there",
        ),
        (
            json.dumps({"quantization_config": UNREADABLE}),
            {"model.layers.0.mlp.up_proj.qweight": np.zeros((8, 32), np.int32)},
            "made-up",
        ),
    ],
    ids=["config", "no tensors", "format"],
)
def test_an_export_in_an_unknown_format_shows_the_rest(
    config, tensors, reason, tmp_path, capsys
):
    (tmp_path / "config.json").write_text(config)
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    assert main(["report", str(tmp_path)]) != 0  # there is nothing else
    assert reason in capsys.readouterr().err
    write_export(tmp_path, plan=False)
    figures = tmp_path / "figures"
    assert main(["report", str(tmp_path), "--figures", str(figures)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "The bits of the layers could not be read: " in text
    assert html.escape(reason) in text
    assert "Tuning took 49 s" in text
    assert {path.stem for path in figures.iterdir()} == {"tuning_curves"}


def test_a_missing_browser_is_named(monkeypatch):
    """`make test` then skips the browser's tests, `make test-report` fails."""
    monkeypatch.setenv("PATH", "/nowhere")
    for required, outcome in (("", pytest.skip), ("1", pytest.fail)):
        monkeypatch.setenv(browser.REQUIRED, required)
        with (
            pytest.raises(outcome.Exception, match="run `apt-get install chromium`"),
            browser.chromium(),
        ):
            pass


def test_a_run_without_losses_is_shown(tmp_path):
    record = run_record(blocks=1)
    record["blocks"][0] |= {"losses": {}, "routers": [], "best_iteration": None}
    record["coverage"] = None
    (tmp_path / "vsraq_run.json").write_text(json.dumps(record))
    assert "Tuning took 49 s" in write_report(tmp_path).read_text()


def test_a_loss_that_was_not_finite_is_left_out(tmp_path):
    record = run_record(blocks=1)
    block = record["blocks"][0]
    losses = {name: [1.0, None, 0.5] for name in block["losses"]}
    block |= {"losses": losses, "best_iteration": 1}
    (tmp_path / "vsraq_run.json").write_text(json.dumps(record))
    assert "Tuning took 49 s" in write_report(tmp_path).read_text()


def test_a_threshold_of_zero_is_shown(tmp_path):
    made = MadeUp({"one": 1.0}, layers=2, experts=8, tokens=50)
    made.results["thresholds"] = {"sampled_jsd": 0.0, "routing_shift": 0.0}
    assert "Does it matter?" in write_report(made.write(tmp_path)).read_text()


def test_one_sequence_has_no_interval_to_judge_by(tmp_path):
    made = MadeUp({"one": 1.0}, layers=2, experts=8, tokens=50)
    metrics = made.results["methods"]["one"]["metrics"]
    metrics["excess_nll"] = {"value": 0.5, "low": None, "high": None}
    text = write_report(made.write(tmp_path, replay=False)).read_text()
    assert "Perplexity cannot tell" not in text


def test_a_replay_alone_is_shown(tmp_path):
    made = MadeUp({"one": 1.0}, layers=2, experts=8, tokens=50)
    replay = made.replay("one")
    (tmp_path / "replay.json").write_text(json.dumps(replay))
    text = write_report(tmp_path).read_text()
    assert "one: routing replay" in text
    assert "With the right experts" in text
    nothing = {"value": None, "low": None, "high": None}
    replay |= {"chosen": 0, "improved": nothing}
    (tmp_path / "replay.json").write_text(json.dumps(replay))
    assert "With the right experts" not in write_report(tmp_path).read_text()


def test_names_of_exports_stay_different_in_legends():
    names = [f"Qwen3-30B-A3B-Instruct-2507-W4A16-{n}" for n in ("AutoRound", "VSRAQ")]
    short = [shortened(name) for name in names]
    assert len(set(short)) == 2
    assert all(len(name) <= 22 for name in short)
