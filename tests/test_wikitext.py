# SPDX-License-Identifier: Apache-2.0
"""The perplexity of WikiText-2, and the files that its text is read from."""

import json
import math

import pytest
import torch

import tiny
from vsraq.calibration.hub import FOLDER
from vsraq.evaluation.wikitext import nll_of, perplexity, read_wikitext

RAW = (
    " \n = Router = \n \n A router chooses experts . \n It has logits . \n \n"
    " = = Choice = = \n \n The largest ones win . \n"
)
ROWS = [
    *("", " = Router = \n", "", " A router chooses experts . \n"),
    *(
        " It has logits . \n",
        "",
        " = = Choice = = \n",
        "",
        " The largest ones win . \n",
    ),
]
TOKENIZER = tiny.tiny_tokenizer()


def slow_perplexity(model, ids, seqlen):
    """GPTQ's loop, a token at a time: means times seqlen, by windows times seqlen."""
    total, windows = 0.0, len(ids) // seqlen
    for start in range(0, windows * seqlen, seqlen):
        window, losses = ids[start : start + seqlen], []
        for place in range(1, seqlen):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window[:place]])).logits[0, -1]
            logits = logits.double()
            losses.append(float(logits.logsumexp(0) - logits[window[place]]))
        total += sum(losses) / len(losses) * seqlen
    return math.exp(total / (windows * seqlen))


@pytest.mark.parametrize("family", ["solar_open", "llama"])
def test_the_perplexity_is_that_of_a_slow_loop(family, tmp_path):
    (tmp_path / "wiki.test.raw").write_text(RAW)
    text = read_wikitext(tmp_path / "wiki.test.raw")
    model = tiny.tiny_model(family)
    windows = text.windows(TOKENIZER, 24)
    ids = TOKENIZER("\n\n".join(ROWS))["input_ids"]
    assert windows.shape == (len(ids) // 24, 24)
    assert len(ids) % 24  # a last partial window
    with torch.no_grad():
        found = [perplexity(nll_of(model), windows, size) for size in (1, 4)]
    expected = slow_perplexity(model, ids, 24)
    for one in found:
        assert one.value == pytest.approx(expected, rel=1e-5)
        assert one.windows == len(windows)
    means = nll_of(model)(windows).double()
    error = means.var(correction=1).div(len(means)).sqrt()
    assert found[0].stderr == pytest.approx(expected * float(error), rel=1e-4)


def test_one_window_has_no_standard_error():
    compute = nll_of(tiny.tiny_model("llama"))
    with torch.no_grad():
        assert perplexity(compute, torch.arange(8).view(1, 8), 1).stderr is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_what_is_not_finite_is_no_figure(loss):
    found = perplexity(lambda w: torch.full((len(w),), loss), torch.ones(3, 4), 2)
    assert (found.value, found.stderr, found.windows) == (None, None, 3)


def as_rows(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": ROWS}).to_parquet(path)
    else:
        path.write_text(RAW)
    return path


@pytest.mark.parametrize(
    "name", ["wiki.test.raw", "other.txt", "rows.jsonl", "rows.parquet"]
)
def test_a_file_is_the_rows_of_the_data_set(tmp_path, name):
    path = as_rows(tmp_path / name)
    text = read_wikitext(path)
    assert (text.source, text.text) == (str(path), "\n\n".join(ROWS))


def test_a_folder_is_a_copy_of_the_data_set(tmp_path, monkeypatch):
    root = tmp_path / "Salesforce" / "wikitext"
    as_rows(root / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    assert read_wikitext(root).text == "\n\n".join(ROWS)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert read_wikitext().source == str(root)
    (root / "test.txt").write_text(RAW)
    with pytest.raises(FileNotFoundError, match=r"test\.txt, test-00000.*allowed are"):
        read_wikitext(root)


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(FileNotFoundError, match="no such file or folder; allowed"):
        read_wikitext(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="of the test split there: none"):
        read_wikitext(tmp_path)
    (tmp_path / "test.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="no text in it"):
        read_wikitext(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(ValueError, match="no column text"):
        read_wikitext(tmp_path / "rows.jsonl")
    (tmp_path / "test.txt").write_text("short")
    with pytest.raises(ValueError, match="5 tokens, and a window has 64; allowed"):
        read_wikitext(tmp_path / "test.txt").windows(TOKENIZER, 64)


def test_the_tokenized_variant_is_named(tmp_path, caplog):
    path = tmp_path / "test.txt"
    path.write_text(RAW)
    read_wikitext(path)
    assert not caplog.messages
    path.write_text(RAW.replace("router", "<unk>"))
    read_wikitext(path)
    assert "words are <unk>: it is the tokenized variant" in caplog.text
