# SPDX-License-Identifier: Apache-2.0
"""`vsraq.compare`: every figure against its slow twin, and what it refuses."""

import copy
import inspect
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

import compare_reference
import tiny
import vsraq
from families import causal_moe_types, tiny_family
from test_capture import hook_count
from vsraq.analysis import Comparison, Thresholds, compare_models, fp_pass, preparation
from vsraq.analysis.fp_pass import FullPrecisionPass
from vsraq.analysis.preparation import model_identity
from vsraq.analysis.results import LAYER_METRICS, METRICS
from vsraq.analysis.sources import ModelSource
from vsraq.checkpoint import load_model
from vsraq.tokens import Sampling

# which experts they choose does not follow from their logits
UNKNOWN_CHOICE = ["deepseek_v4", "doge", "zaya"]
DOCUMENT = Path(__file__).parent.parent / "docs" / "compare.md"
SEQUENCES = torch.cat(tiny.calibration(samples=5, seqlen=16))
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
THRESHOLDS = {"sampled_jsd": 0.02, "routing_shift": 0.15}


def changed(model, seed=1, scale=0.1):
    """A copy with noise where quantization puts some."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in result.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "gate.weight" not in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * scale * weight.std())
    return result


@pytest.fixture(scope="module")
def pair():
    model = tiny.tiny_model("solar_open")  # sigmoid, correction bias
    return model, changed(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint on disk, and another of the same architecture."""
    root = tmp_path_factory.mktemp("models")
    fp = tiny.save("solar_open", root / "fp")
    q = root / "q"
    changed(tiny.tiny_model("solar_open").bfloat16()).save_pretrained(q)
    tiny.tiny_tokenizer().save_pretrained(q)
    return fp, q


FAMILIES = ["qwen3_moe", "solar_open", "nemotron_h", "deepseek_v3", "granitemoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_is_that_of_its_slow_twin(family, full):
    """Softmax, sigmoid with bias, a hybrid; groups, and scaled logits."""
    if not full and family in FAMILIES[3:]:
        pytest.skip("--full")
    fp_model = tiny.tiny_model(family)
    q_model = changed(fp_model)
    result = vsraq.compare(
        fp_model, q_model, SEQUENCES, thresholds=Thresholds(**THRESHOLDS), batch_size=2
    )
    method = result.methods["quantized"]
    found = compare_reference.tokens(q_model, fp_model, SEQUENCES, SAMPLING, THRESHOLDS)
    assert tuple(method.metrics) == METRICS
    for name, value in compare_reference.metrics(found).items():
        assert method.metrics[name].value == pytest.approx(value, rel=1e-3, abs=2e-6), (
            name
        )
    assert 0 < method.metrics["drop_inject"].value < 1
    fp_nll = [t["fp_nll"] for t in found if "fp_nll" in t]
    expected = math.exp(sum(fp_nll) / len(fp_nll))
    assert result.full_precision.perplexity.value == pytest.approx(expected, rel=1e-4)
    for layer, own in zip(result.layers, method.layers, strict=True):
        changes = [t["layers"][layer.name] for t in found]
        expected = compare_reference.layer_metrics(changes)
        assert tuple(own.metrics) == LAYER_METRICS
        assert {n: i.value for n, i in own.metrics.items()} == pytest.approx(expected)
        k = layer.top_k
        dropped = [r for c in changes for r in c["dropped_ranks"]]
        assert own.dropped_ranks == [dropped.count(r) for r in range(k)]
        injected = [r for c in changes for r in c["injected_ranks"]]
        ranks = range(k, layer.num_experts)
        assert own.injected_ranks == [injected.count(r) for r in ranks]
        for load, side in ((own.load, 0), (layer.load, 1)):
            chosen = [e for t in found for e in t["load"][layer.name][side]]
            assert load == [chosen.count(e) for e in range(layer.num_experts)]
    for name, histogram in method.histograms.items():
        values = result.tokens[f"quantized/{name}"].tolist()
        torch.testing.assert_close(
            torch.tensor(values),
            torch.tensor([t[name] for t in found]),
            rtol=1e-3,
            atol=2e-6,
            check_dtype=False,
        )
        counts = compare_reference.histogram(values, histogram.edges)
        assert (histogram.counts, histogram.below, histogram.above) == counts


def test_intervals_are_those_of_a_bootstrap_over_sequences(pair):
    fp_model, q_model = pair
    method = vsraq.compare(fp_model, q_model, SEQUENCES).methods["quantized"]
    found = compare_reference.tokens(q_model, fp_model, SEQUENCES, SAMPLING, THRESHOLDS)
    by_sequence = [
        [t for t in found if t["sequence"] == i] for i in range(len(SEQUENCES))
    ]
    for name in ("perplexity", "inside_2k"):

        def statistic(drawn, name=name):
            return compare_reference.metrics([t for s in drawn for t in s])[name]

        low, high = compare_reference.percentile_interval(
            by_sequence, statistic, seed=0, resamples=200
        )
        interval = method.metrics[name]
        assert interval.low <= interval.value <= interval.high
        tolerance = 0.3 * (high - low)  # other draws, and fewer of them
        assert interval.low == pytest.approx(low, abs=tolerance)
        assert interval.high == pytest.approx(high, abs=tolerance)


@pytest.mark.parametrize("family", ["solar_open", "nemotron_h"])
@pytest.mark.parametrize("twice", ["one object", "a copy"])
def test_a_model_agrees_with_itself_exactly(family, twice):
    model = tiny.tiny_model(family)
    other = model if twice == "one object" else copy.deepcopy(model)
    method = vsraq.compare(model, {"itself": other}, SEQUENCES).methods["itself"]
    exact = {
        **dict.fromkeys(("excess_nll", "kl", "jsd", "sampled_jsd"), 0.0),
        **dict.fromkeys(("top1_agreement", "jaccard", "weights_only"), 1.0),
        **dict.fromkeys(("routing_shift", "order_shift", "drop_inject"), 0.0),
        **dict.fromkeys(("inside_2k", "inside_3k"), None),
        **dict.fromkeys(("region_a", "region_b", "region_d"), 0.0),
        "region_c": 1.0,
    }
    for name, value in exact.items():
        interval = method.metrics[name]
        assert (interval.value, interval.low, interval.high) == (value,) * 3, name
    for layer in method.layers:
        assert {n: i.value for n, i in layer.metrics.items()} == {
            n: exact[n] for n in LAYER_METRICS
        }
        assert sum(layer.dropped_ranks) == sum(layer.injected_ranks) == 0
    assert hook_count(model) == hook_count(other) == 0


def same_figures(a, b):
    def figures(result):
        found = result.as_dict()
        for side in (found["full_precision"], *found["methods"].values()):
            for name in ("seconds", "tokens_per_second"):
                side.pop(name)
        found.pop("created")
        return found

    return figures(a) == figures(b)


def test_batches_do_not_matter(pair, monkeypatch):
    """Streamed is what it is all at once, up to rounding of other matrix products."""
    fp_model, q_model = pair
    whole = vsraq.compare(fp_model, q_model, SEQUENCES, batch_size=5)
    monkeypatch.setattr("vsraq.analysis.passes.CHUNK_TOKENS", 7)
    monkeypatch.setattr("vsraq.analysis.passes.CHUNK_LOGITS", 1)
    streamed = vsraq.compare(fp_model, q_model, SEQUENCES, batch_size=1)
    for name, interval in whole.methods["quantized"].metrics.items():
        other = streamed.methods["quantized"].metrics[name]
        for end in ("value", "low", "high"):
            expected = getattr(interval, end)
            assert getattr(other, end) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    again = vsraq.compare(fp_model, q_model, SEQUENCES, batch_size=1)
    assert same_figures(again, streamed)


def test_sequences_of_other_lengths(pair):
    fp_model, q_model = pair
    rows = [SEQUENCES[0], SEQUENCES[1], SEQUENCES[2][:9], SEQUENCES[3]]
    result = vsraq.compare(fp_model, q_model, rows)
    found = compare_reference.tokens(q_model, fp_model, rows, SAMPLING, THRESHOLDS)
    expected = compare_reference.metrics(found)["perplexity"]
    assert result.methods["quantized"].metrics["perplexity"].value == pytest.approx(
        expected, rel=1e-4
    )
    assert (result.data.sequences, result.data.tokens) == (4, 3 * 16 + 9)
    places = [(s, p) for s, row in enumerate(rows) for p in range(len(row))]
    found = [result.tokens[n].tolist() for n in ("sequence", "position")]
    assert list(zip(*found, strict=True)) == places
    ids = torch.cat(rows).int()
    assert torch.equal(result.tokens["token"], ids)


def test_one_sequence_has_no_interval(pair):
    method = vsraq.compare(*pair, SEQUENCES[:1]).methods["quantized"]
    for interval in method.metrics.values():
        assert interval.value is not None
        assert interval.low is None
        assert interval.high is None


def test_the_same_tokens_are_sampled_for_every_method(pair, monkeypatch):
    monkeypatch.setattr("vsraq.analysis.tally.MAX_SAMPLED", 40)
    fp_model, q_model = pair
    result = vsraq.compare(fp_model, {"a": q_model, "b": fp_model}, SEQUENCES)
    assert all(values.shape == (40,) for values in result.tokens.values())
    assert result.tokens["a/kl"].gt(0).any()
    assert result.tokens["b/kl"].eq(0).all()
    whole = vsraq.compare(fp_model, {"a": q_model}, SEQUENCES, seed=1).tokens
    assert not torch.equal(whole["position"], result.tokens["position"])
    picked = result.tokens["sequence"].long(), result.tokens["position"].long()
    assert torch.equal(result.tokens["token"], SEQUENCES[picked].int())


# ── paths, files ──────────────────────────────────────────────────────────────


def test_folders_and_modules_give_the_same(folders, tmp_path, caplog):
    fp, q = folders
    caplog.set_level(logging.INFO, "vsraq.analysis")
    methods = {"noise": q, "none": fp}
    result = vsraq.compare(fp, methods, SEQUENCES, tmp_path / "out", dtype="float32")
    live_fp, live_q = (load_model(path, dtype=torch.float32) for path in folders)
    live = vsraq.compare(live_fp, {"noise": live_q}, SEQUENCES)
    assert result.methods["none"].metrics["kl"].value == 0
    mixed = vsraq.compare(fp, {"noise": live_q}, SEQUENCES, dtype="float32")
    for other in (live, mixed):
        assert other.methods["noise"].metrics == result.methods["noise"].metrics
    size = sum(f.stat().st_size for f in q.glob("*.safetensors")) / 2**20
    assert result.methods["noise"].mebibytes == size
    assert live.methods["noise"].mebibytes is None
    assert live.full_precision.source == "SolarOpenForCausalLM in memory"
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "results.json",
        "tokens.safetensors",
    ]
    loaded = Comparison.load(tmp_path / "out")
    assert loaded == result
    assert loaded.tokens.keys() == result.tokens.keys()
    # 2 layers x 8 experts x 1 byte + 64 x 4 bytes
    assert "80 tokens x 272 bytes = 0.0 MiB in " in caplog.text


def test_the_blocks_of_a_loaded_model_are_freed(folders, monkeypatch):
    fp, q = folders
    opened = []
    real = compare_models.run_quantized

    def spy(model, fp_model, *args, **kwargs):
        opened.append(fp_model.model.model)
        return real(model, fp_model, *args, **kwargs)

    monkeypatch.setattr(compare_models, "run_quantized", spy)
    vsraq.compare(fp, q, SEQUENCES)
    (model,) = opened
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert not model.lm_head.weight.is_meta


class WithoutEmbeddings(torch.nn.Module):
    """A model whose output head cannot be opened, so that logits are stored."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


def test_a_model_that_cannot_be_split(pair, caplog):
    caplog.set_level(logging.INFO, "vsraq.analysis")
    expected = vsraq.compare(*pair, SEQUENCES).methods["quantized"]
    wrapped = [WithoutEmbeddings(model) for model in pair]
    result = vsraq.compare(*wrapped, SEQUENCES).methods["quantized"]
    for name, interval in expected.metrics.items():
        value = pytest.approx(interval.value, rel=1e-4, abs=1e-6)
        assert result.metrics[name].value == value, name
    assert "80 tokens x 1040 bytes" in caplog.text  # 256 logits x 4 bytes


def test_the_schema(pair, tmp_path):
    """The keys of docs/compare.md, in every file."""
    vsraq.compare(pair[0], {"a": pair[1], "b": pair[0]}, SEQUENCES, tmp_path)
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # no NaN
    assert found["format"] == "vsraq-compare/1"
    assert set(found) == {
        *("format", "created", "versions", "data", "sampling", "thresholds"),
        *("full_precision", "layers", "methods"),
    }
    assert set(found["data"]) == {"source", "tokens", "sequences", "seqlen"}
    assert set(found["versions"]) == {"vsraq", "torch", "transformers"}
    assert set(found["sampling"]) == {"temperature", "top_k", "top_p", "source"}
    assert found["thresholds"] == {"sampled_jsd": 0.1, "routing_shift": 0.1}
    assert set(found["full_precision"]) == {
        *("source", "mebibytes", "perplexity", "seconds", "tokens_per_second")
    }
    for layer in found["layers"]:
        assert set(layer) == {"name", "block", "top_k", "num_experts", "load"}
        assert sum(layer["load"]) == SEQUENCES.numel() * layer["top_k"]
    assert [layer["block"] for layer in found["layers"]] == [0, 1]
    for method in found["methods"].values():
        assert set(method) == {
            *("source", "mebibytes", "seconds", "tokens_per_second"),
            *("metrics", "layers", "histograms"),
        }
        assert list(method["metrics"]) == list(METRICS)
        changes = ("weights_only", "order_shift", "drop_inject")
        regions = [f"region_{letter}" for letter in "abcd"]
        for names in (changes, regions):
            total = sum(method["metrics"][name]["value"] for name in names)
            assert total == pytest.approx(1)
        for interval in method["metrics"].values():
            assert set(interval) == {"value", "low", "high"}
        for layer in method["layers"]:
            assert set(layer) == {
                *("name", "metrics", "dropped_ranks", "injected_ranks", "load")
            }
            assert sum(layer["dropped_ranks"]) == sum(layer["injected_ranks"])
        for histogram in method["histograms"].values():
            assert set(histogram) == {"edges", "counts", "below", "above"}
            counted = sum(histogram["counts"]) + histogram["below"] + histogram["above"]
            assert counted == SEQUENCES.numel()
    documented = DOCUMENT.read_text()
    for name in (*METRICS, *found["methods"]["a"]["histograms"]):
        assert f"`{name}`" in documented, name


def test_sampling_is_the_models_own(pair):
    fp_model, q_model = copy.deepcopy(pair[0]), pair[1]
    assert vsraq.compare(*pair, SEQUENCES).sampling.source == "default"
    fp_model.generation_config = GenerationConfig(do_sample=True, temperature=1.5)
    result = vsraq.compare(fp_model, q_model, SEQUENCES)
    assert result.sampling.source == "generation_config"
    assert (result.sampling.temperature, result.sampling.top_k) == (1.5, 20)
    given = vsraq.compare(fp_model, q_model, SEQUENCES, sampling=Sampling(top_k=None))
    assert (given.sampling.source, given.sampling.top_k) == ("given", None)
    values = [r.methods["quantized"].metrics["sampled_jsd"] for r in (result, given)]
    assert values[0] != values[1]


# ── what is refused ───────────────────────────────────────────────────────────


def test_other_routers_are_refused(pair):
    with pytest.raises(ValueError, match=r"and other \[.*allowed are equal ones"):
        vsraq.compare(pair[0], {"other": tiny.tiny_model("olmoe")}, SEQUENCES)
    dense = tiny.tiny_model("llama")
    with pytest.raises(ValueError, match="no MoE router"):
        vsraq.compare(dense, dense, SEQUENCES)


def test_another_tokenizer_is_refused(folders, tmp_path):
    fp, q = folders
    other = tmp_path / "other"
    shutil.copytree(q, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    refused = "full-precision model and other differ: 2 of 256 tokens.*such as '[ab]'"
    with pytest.raises(ValueError, match=refused):
        vsraq.compare(fp, {"other": other}, SEQUENCES)


def test_another_vocabulary_is_refused(pair):
    small = tiny.tiny_model("solar_open", vocab_size=200)
    with pytest.raises(ValueError, match="gives 200 logits per token and the full"):
        vsraq.compare(pair[0], small, SEQUENCES.clamp(max=150))


def test_a_full_disk_is_refused_before_anything_is_written(pair, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10, 10, 100)
    monkeypatch.setattr(fp_pass.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"80 tokens x 272 bytes.*fewer sequences"):
        vsraq.compare(*pair, SEQUENCES, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_size_is_said_before_the_pass(pair, tmp_path, caplog, monkeypatch):
    """And nothing but 32 tokens has run when the disk is full."""
    caplog.set_level(logging.INFO, "vsraq.analysis")
    seen = []
    hook = (
        pair[0]
        .model.layers[0]
        .register_forward_hook(
            lambda _m, args, _o: seen.append((args[0].shape[1], len(caplog.messages)))
        )
    )
    long = torch.cat(tiny.calibration(samples=4, seqlen=64))
    with hook:
        vsraq.compare(*pair, long)
        assert max(tokens for tokens, said in seen if not said) == 32
        assert [said for tokens, said in seen if tokens > 32] == [1]
        usage = shutil._ntuple_diskusage(10, 10, 100)
        monkeypatch.setattr(fp_pass.shutil, "disk_usage", lambda _: usage)
        seen.clear()
        with pytest.raises(ValueError, match="256 tokens x 272 bytes"):
            vsraq.compare(*pair, long, tmp_path)
        assert max(tokens for tokens, _ in seen) == 32


def masking(model, token):
    """A copy whose logit of one token is -inf."""

    class Masking(type(model)):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            result.logits = result.logits.index_fill(
                -1, torch.tensor([token]), -math.inf
            )
            return result

    other = copy.deepcopy(model)
    Masking.forward.__signature__ = inspect.signature(type(model).forward)
    other.__class__ = Masking
    return other


def test_a_token_without_a_probability_is_named(pair, tmp_path):
    ids = SEQUENCES.clone()
    ids[ids == 77] = 78
    ids[3, 9] = 77
    masked = [masking(model, 77) for model in pair]
    place = "the token at position 9 of sequence 3, counted from 0, so its NLL"
    for batch_size in (1, 2, 5):
        with pytest.raises(ValueError, match=f"full-precision model gives.*{place}"):
            vsraq.compare(*masked, ids, tmp_path, batch_size=batch_size)
    with pytest.raises(ValueError, match=f"bad gives no probability.*{place}"):
        vsraq.compare(pair[0], {"bad": masked[1]}, ids)
    with pytest.raises(ValueError, match=r"bad gives .*precision, after posit"):
        vsraq.compare(pair[0], {"bad": masked[1]}, ids[:2])
    assert not (tmp_path / "results.json").exists()
    vsraq.compare(masked[0], masked[0], ids[:2])  # it is in no text


# ── an earlier full-precision pass ────────────────────────────────────────────


def forgetful(result):
    found = result.as_dict()
    for side in (found["full_precision"], *found["methods"].values()):
        side.pop("seconds"), side.pop("tokens_per_second")
    return {n: v for n, v in found.items() if n != "created"}


@pytest.fixture
def kept(folders, tmp_path, caplog):
    """Run a comparison with a kept pass; say whether the pass was used again."""
    caplog.set_level(logging.INFO, "vsraq.analysis")
    fp = tmp_path / "fp"
    shutil.copytree(folders[0], fp)

    def run(**options):
        caplog.clear()
        options = {
            "keep_fp_pass": True,
            "data": SEQUENCES,
            "dtype": "float32",
        } | options
        result = vsraq.compare(fp, folders[1], out=tmp_path / "out", **options)
        said = "\n".join(caplog.messages)
        return result, "is used again" in said, said

    return fp, run


def test_a_kept_pass_is_used_again(kept, tmp_path, folders):
    _fp, run = kept
    first, used, _ = run()
    assert not used
    again, used, said = run(keep_fp_pass=False)
    assert used
    assert "the same path, sizes and times of the model's files" in said
    assert forgetful(first) == forgetful(again)
    assert again.full_precision.seconds == first.full_precision.seconds
    assert (tmp_path / "out" / "fp_pass" / "pass.json").is_file()  # it was kept before
    assert not run(fresh=True)[1]
    assert run()[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": SEQUENCES.flip(0)}, "of another tokens"),
        ({"batch_size": 2}, "of another batch size"),
        ({"dtype": "bfloat16"}, "of another dtype"),
        ("weights", "of another model"),
        ("config", "of another model"),
        ("version", "of another version"),
        ("format", "of another format"),
        ("batch", "a file of it is gone, or has another size"),
        ({"trust_remote_code": True}, "of another trust_remote_code"),
        ({"device": torch.device("cpu")}, "of another device"),
        ({"device": {"": torch.device("cpu")}}, "of another device"),
        ("broken", "pass.json cannot be read (JSONDecodeError"),
        (b"[]", "pass.json cannot be read (TypeError"),
        (b"\xff", "pass.json cannot be read (UnicodeDecodeError"),
        ({"identity": None}, "pass.json cannot be read (TypeError"),
        ({"identity": []}, "pass.json cannot be read (AttributeError"),
        ({"finished": None}, "pass.json cannot be read (TypeError"),
    ],
    ids=str,
)
def test_another_pass_is_not(kept, tmp_path, change, reason):
    fp, run = kept
    first, _, _ = run()
    folder = tmp_path / "out" / "fp_pass"
    whole = folder / "pass.json"
    if change == "weights":
        os.utime(fp / "model.safetensors", ns=(1, 1))
    elif change == "config":
        (fp / "config.json").write_text((fp / "config.json").read_text() + "\n")
    elif change == "version":
        whole.write_text(whole.read_text().replace(f'"{torch.__version__}"', '"1.0"'))
    elif change == "format":
        whole.write_text(whole.read_text().replace("fp-pass/1", "fp-pass/0"))
    elif change == "batch":
        batch = folder / "batch-000000.safetensors"
        batch.write_bytes(batch.read_bytes()[:-1])
    elif change == "broken":
        whole.write_text("{")
    elif isinstance(change, bytes):
        whole.write_bytes(change)
    elif change.keys() <= {"identity", "finished"}:
        whole.write_text(json.dumps(json.loads(whole.read_text()) | change))
        change = str(change)
    options = change if isinstance(change, dict) else {}
    result, used, said = run(**options)
    assert not used
    assert reason in said
    if not options:
        assert forgetful(result) == forgetful(first)
    assert run(**options)[1]


@pytest.mark.parametrize("change", ["text", "fresh", "in memory", "broken"])
def test_a_kept_pass_stays_where_it_cannot_be_used(kept, tmp_path, change, folders):
    _fp, run = kept
    run()
    out = tmp_path / "out"
    whole = out / "fp_pass" / "pass.json"
    if change == "broken":
        whole.write_text("{")
    before = {path: path.read_bytes() for path in whole.parent.iterdir()}
    if change == "in memory":
        fp_model = load_model(folders[0], dtype=torch.float32)
        vsraq.compare(fp_model, folders[1], SEQUENCES, out, dtype="float32")
    else:
        options = {"text": {"sequences": 2}, "fresh": {"fresh": True}}.get(change, {})
        _, used, said = run(keep_fp_pass=False, **options)
        assert not used
        assert "fp_pass is not used, and stays as it is: " in said
    assert {path: path.read_bytes() for path in whole.parent.iterdir()} == before
    assert {path.name for path in out.iterdir()} == {
        *("fp_pass", "results.json", "tokens.safetensors")
    }
    assert run()[1] == (change != "broken")


@pytest.mark.parametrize("when", ["as it is loaded", "during the pass"])
def test_the_pass_of_a_model_that_changes_meanwhile(kept, tmp_path, when, monkeypatch):
    fp, run = kept
    real = (
        preparation.find_routers
        if when == "as it is loaded"
        else FullPrecisionPass.write
    )

    def touching(*args, **kwargs):
        os.utime(fp / "model.safetensors", ns=(1, 1))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        if when == "as it is loaded":
            patch.setattr(preparation, "find_routers", touching)
        else:
            patch.setattr(FullPrecisionPass, "write", touching)
        _, _, said = run()
    assert "changed while it ran, so its full-precision pass is not used again" in said
    assert not (tmp_path / "out" / "fp_pass" / "pass.json").exists()
    assert not run()[1]
    assert run()[1]


def test_an_identity_that_json_cannot_hold_is_refused_first(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        FullPrecisionPass(tmp_path, 80, {"device": torch.device("cpu")})


def test_versions_of_what_reads_quantized_weights_are_in_the_identity(
    folders, tmp_path
):
    readers = {"auto-round", "compressed-tensors"}
    assert not readers & model_identity(ModelSource("fp", folders[0]))["version"].keys()
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "auto-round"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = model_identity(ModelSource("fp", tmp_path))["version"]
    assert {name: found[name] for name in readers} == {n: version(n) for n in readers}


def test_text_that_is_not_there_is_refused_before_weights_are_read(folders, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders[0] / name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl': there is no such file"):
        vsraq.compare(tmp_path, folders[1], "none.jsonl:field")


KILLED = """
import os, signal, sys
import torch, vsraq
from vsraq.analysis.fp_pass import FullPrecisionPass
write = FullPrecisionPass.write
def write_and_die(self, index, batch):
    write(self, index, batch)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
FullPrecisionPass.write = write_and_die
fp, q, data, out = sys.argv[1:]
vsraq.compare(fp, q, data, out, batch_size=2, dtype="float32", keep_fp_pass=True)
"""


def test_a_killed_pass_is_not_used_again(kept, folders, tmp_path):
    fp, run = kept
    save_file({"input_ids": SEQUENCES}, tmp_path / "ids.safetensors")
    places = [fp, folders[1], tmp_path / "ids.safetensors", tmp_path / "out"]
    command = [sys.executable, "-c", KILLED, *map(str, places)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (tmp_path / "out" / "fp_pass").iterdir()}
    assert left == {"batch-000000.safetensors", "batch-000001.safetensors"}
    result, used, _ = run(batch_size=5)
    assert not used
    left = {path.name for path in (tmp_path / "out" / "fp_pass").iterdir()}
    assert left == {"batch-000000.safetensors", "pass.json"}
    assert forgetful(result) == forgetful(run(fresh=True, batch_size=5)[0])


def test_a_kept_pass_of_logits_is_used_again(folders, tmp_path, caplog, monkeypatch):
    """Where the model cannot be split after its last block."""
    caplog.set_level(logging.INFO, "vsraq.analysis")
    monkeypatch.setattr("vsraq.analysis.forward.takes_embeddings", lambda _model: False)
    options = {"keep_fp_pass": True, "dtype": "float32"}
    first = vsraq.compare(*folders, SEQUENCES, tmp_path, **options)
    assert "80 tokens x 1040 bytes" in caplog.text
    monkeypatch.undo()
    again = vsraq.compare(*folders, SEQUENCES, tmp_path, **options)
    assert "is used again" in caplog.text
    kl = [r.methods["quantized"].metrics["kl"].value for r in (first, again)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)


@pytest.mark.parametrize(
    ("files", "index", "counted"),
    [
        (["model.safetensors", "consolidated.safetensors", "tokens.safetensors"], 0, 1),
        (["a.safetensors", "b.safetensors", "consolidated.safetensors"], 2, 2),
        (["pytorch_model.bin", "training_args.bin"], 0, 1),
        (["a.bin", "b.bin", "c.bin"], 2, 2),
    ],
)
def test_the_size_is_that_of_the_weight_files(files, index, counted, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for place, name in enumerate(files):
        (tmp_path / name).write_bytes(bytes(2**18 * (place + 1)))
    if index:
        of = "model.safetensors" if "safetensors" in files[0] else "pytorch_model.bin"
        named = {f"w{i}": name for i, name in enumerate(files[:index])}
        text = json.dumps({"weight_map": named})
        (tmp_path / f"{of}.index.json").write_text(text)
    expected = sum(range(1, counted + 1)) / 4
    assert ModelSource("fp_model", tmp_path).mebibytes == expected


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_of_weights_comes_before_an_index(name, tmp_path):
    """As in transformers."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(bytes(2**20))
    (tmp_path / "other").write_bytes(bytes(2**21))
    (tmp_path / f"{name}.index.json").write_text('{"weight_map": {"w": "other"}}')
    assert ModelSource("fp_model", tmp_path).mebibytes == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_models": {}}, "at least one quantized model"),
        ({"q_models": {"a/b": None}}, "names without a slash"),
        ({"q_models": {"a": 3}}, "a=int: allowed is a model, or the path"),
        ({"q_models": {"a": "there/is/none"}}, "a='there/is/none': neither a folder"),
        ({"batch_size": 0}, "batch_size=0: allowed is an int >= 1"),
        ({"batch_size": 2.5}, r"batch_size=2\.5: allowed is an int >= 1"),
        ({"seed": -1}, "seed=-1: allowed is an int >= 0"),
        ({"seed": True}, "seed=True: allowed is an int >= 0"),
        ({"seqlen": 1}, "seqlen=1: allowed is an int >= 2; or leave it out"),
        ({"sequences": 0}, "sequences=0: allowed is an int >= 1; or leave it out"),
        ({"keep_fp_pass": True}, "keep_fp_pass=True: the full-precision pass is kept"),
        ({"fresh": True}, "fresh=True: the full-precision pass is kept"),
        ({"seqlen": 129}, "seqlen=129: allowed is 2 to 128"),
        ({"sequences": 9}, "sequences=9: allowed is 1 to 5"),
    ],
    ids=str,
)
def test_arguments_are_refused(pair, arguments, message):
    given = {"q_models": pair[1], "data": SEQUENCES} | arguments
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        vsraq.compare(pair[0], **given)


def test_thresholds_are_checked():
    with pytest.raises(
        ValueError, match=r"sampled_jsd=0\.7: allowed is .* below 0\.69"
    ):
        Thresholds(sampled_jsd=0.7)


def test_files_of_another_version_are_refused(pair, tmp_path):
    vsraq.compare(*pair, SEQUENCES, tmp_path)
    path = tmp_path / "results.json"
    right = path.read_text()
    for wrong in ("{", "[]", right.replace("compare/1", "compare/9"), "{}"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="no results of this version"):
            Comparison.load(tmp_path)


def test_every_mode_and_hook_is_put_back(pair):
    fp_model, q_model = pair
    q_model.train()
    try:
        with pytest.raises(IndexError):
            vsraq.compare(fp_model, q_model, [torch.tensor([1, 10_000])])
        assert q_model.training
        assert not fp_model.training
    finally:
        q_model.eval()
    assert hook_count(fp_model) == hook_count(q_model) == 0
    assert "forward" not in vars(fp_model.model.layers[-1])


# ── what it costs ─────────────────────────────────────────────────────────────


def test_logits_of_a_chunk_exist_at_once(pair, monkeypatch):
    monkeypatch.setattr("vsraq.analysis.passes.CHUNK_TOKENS", 50)
    monkeypatch.setattr("vsraq.analysis.passes.CHUNK_LOGITS", 70 * tiny.VOCAB)
    rows = []
    handles = [
        model.lm_head.register_forward_hook(
            lambda _m, _i, output: rows.append(output.numel() // output.shape[-1])
        )
        for model in pair
    ]
    batch = torch.cat(tiny.calibration(samples=6))
    vsraq.compare(*pair, batch, batch_size=len(batch))
    for handle in handles:
        handle.remove()
    checks, rows = rows[:4], rows[4:]
    assert checks == [32] * 4
    assert rows == [50, 50, 70, 70, 70, 70, 2, 2]


def test_every_family_compares_with_itself(full):
    # the first three cannot be split after their last block
    names = ["glm_moe_dsa", "hy_v4", "inkling2_text", "gpt_oss", "lfm2_moe"]
    if full:
        names = [name for name in causal_moe_types() if name not in UNKNOWN_CHOICE]
    for name in names:
        model = tiny_family(name)
        with torch.no_grad():
            log_p = model(SEQUENCES[:2]).logits.float().log_softmax(-1)
        nll = -log_p[:, :-1].gather(-1, SEQUENCES[:2, 1:, None]).mean().item()
        result = vsraq.compare(model, model, SEQUENCES[:2])
        perplexity = result.full_precision.perplexity.value
        assert perplexity == pytest.approx(math.exp(nll), rel=1e-3), name
        method = result.methods["quantized"]
        assert method.metrics["kl"].value == 0, name
        assert method.metrics["jaccard"].value == 1, name
