# SPDX-License-Identifier: Apache-2.0
"""The tokens that a plan is measured with."""

import json
import string

import pytest
import torch

import tiny
from vsraq.autoround.planning_tokens import token_batches

IDS = tiny.calibration(samples=6)


def batches(dataset, tokens=10**6, seqlen=32, seed=42, nsamples=None):
    tokenizer = tiny.tiny_tokenizer()
    return token_batches(dataset, tokenizer, tokens, seqlen, seed, nsamples)


def rows(found):
    return [row.tolist() for batch in found for row in batch]


EXPECTED = torch.cat(IDS).tolist()


@pytest.mark.parametrize(
    "dataset",
    [
        IDS,
        torch.cat(IDS),
        [ids[0] for ids in IDS],
        EXPECTED,
        [torch.cat(IDS[:4]), torch.cat(IDS[4:])],
        [{"input_ids": ids} for ids in IDS],
        [None, *({"input_ids": ids, "attention_mask": ids * 0 + 1} for ids in IDS)],
        [{"input_ids": ids[0].tolist()} for ids in IDS],
        (ids.int() for ids in IDS),
    ],
    ids=[
        "tensors",
        "one tensor",
        "rows",
        "lists",
        "several in a tensor",
        "mappings",
        "with masks",
        "mappings of lists",
        "generator",
    ],
)
def test_samples(dataset):
    (found,) = batches(dataset)
    assert found.dtype == torch.int64
    assert found.tolist() == EXPECTED


def test_texts():
    found = batches(["abc", "", "de", "fgh"])
    tokenizer = tiny.tiny_tokenizer()
    assert [batch.shape for batch in found] == [(2, 3), (1, 2)]
    assert rows(found) == [
        tokenizer(text)["input_ids"] for text in ("abc", "fgh", "de")
    ]


def test_texts_of_a_file():
    assert rows(batches([{"text": "abc"}])) == rows(batches(["abc"]))


def test_padding_is_left_out():
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.cat(IDS[:2])[:, :8]
    found = batches([{"input_ids": ids, "attention_mask": mask}])
    assert rows(found) == [ids[0].tolist(), ids[1, :5].tolist()]


def test_as_many_tokens_as_asked_for():
    assert rows(batches(IDS, tokens=64)) == EXPECTED[:2]
    assert rows(batches(IDS, tokens=95)) == EXPECTED[:2]
    assert rows(batches(IDS, tokens=96)) == EXPECTED[:3]
    assert rows(batches(IDS, tokens=1)) == EXPECTED[:1]  # one sample at least


def test_batches_are_not_large():
    found = batches(
        [torch.ones(200, 100, dtype=torch.long), torch.ones(1, 9000).long()]
    )
    assert [tuple(b.shape) for b in found] == [(40, 100)] * 5 + [(1, 9000)]


def test_a_file(tmp_path):
    text_file = tiny.save_text(tmp_path / "text.jsonl")
    found = batches(text_file, tokens=100, seqlen=32)
    assert [tuple(b.shape) for b in found] == [(3, 32)]
    again = batches(text_file, tokens=100, seqlen=32)
    assert torch.equal(found[0], again[0])
    other = batches(text_file, tokens=100, seqlen=32, seed=1)
    assert not torch.equal(found[0], other[0])


def test_samples_are_the_first_of_a_runs(tmp_path):
    text_file = tiny.save_text(tmp_path / "text.jsonl", samples=12)
    every = rows(batches(text_file, nsamples=12))
    assert len(every) == 12
    assert rows(batches(text_file, tokens=100, nsamples=12)) == every[:3]
    assert rows(batches(text_file, tokens=1, nsamples=12)) == every[:1]
    # fewer than asked for
    assert len(rows(batches(text_file, tokens=10**6, nsamples=12))) == 12


def test_several_texts_of_a_mixture_are_measured_with(tmp_path):
    """Samples are cut; `num` counts the samples of the run."""
    parts = []
    for letter in "abc":
        path = tmp_path / f"{letter}.jsonl"
        text = letter + string.printable[:90] * 7
        path.write_text((json.dumps({"text": text}) + "\n") * 10)
        parts.append(f"{path}:num=10")
    found = batches(",".join(parts), tokens=4096, seqlen=600, nsamples=30)
    assert [tuple(batch.shape) for batch in found] == [(8, 512)]
    tokenizer = tiny.tiny_tokenizer()
    first = {row[0] for row in rows(found)}
    assert len(first) > 1
    assert first <= set(tokenizer("abc")["input_ids"])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "dataset: it has no sample; allowed is one or more"),
        ([None], {}, "it has no sample"),
        (["", []], {}, "it has no sample"),
        (IDS, {"tokens": 0}, "tokens=0, seqlen=32: allowed are tokens >= 1"),
        (IDS, {"seqlen": 1}, "seqlen=1: allowed are tokens >= 1, seqlen >= 2"),
        ([{"txt": "a"}], {}, r"the keys \['txt'\]; allowed are input_ids, or text"),
        (IDS[0][0], {}, r"a sample has the shape \(\) .* allowed are token ids"),
        ([torch.rand(2, 8)], {}, r"shape \(2, 8\) and the type torch.float32"),
        ([torch.ones(1, 2, 3).long()], {}, r"a sample has the shape \(1, 2, 3\)"),
    ],
)
def test_what_is_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        batches(dataset, **options)
