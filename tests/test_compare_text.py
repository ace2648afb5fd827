# SPDX-License-Identifier: Apache-2.0
"""The text of a comparison, and its command."""

import json

import pytest
import torch
from safetensors.torch import save_file

import tiny
from vsraq.analysis.text import read_text
from vsraq.cli import main

TEXT = "Experts are chosen by a router. " * 9
DOCUMENTS = ["first document, ", "second one, ", "and a third"]
TOKENIZER = tiny.tiny_tokenizer()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_text_file_is_cut_into_windows(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(TEXT)
    text = read_text(path, TOKENIZER, 32)
    ids = ids_of(TEXT)
    assert text.source == str(path)
    assert (text.sequences, text.seqlen, text.tokens) == (9, 32, 288)
    assert torch.cat(text.rows).flatten().tolist() == ids[: 9 * 32]
    some = read_text(str(path), TOKENIZER, 32, sequences=3)
    assert torch.equal(some.rows[0], text.rows[0][[0, 4, 8]])
    assert [len(b) for b in text.batches(4)] == [4, 4, 1]


@pytest.mark.parametrize("field", ["text", "answer"])
def test_documents_are_joined_by_an_end_token(tmp_path, field):
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({field: document}) for document in DOCUMENTS]
    path.write_text("\n".join(lines) + "\n\n")
    data = path if field == "text" else f"{path}:{field}"
    end = TOKENIZER.eos_token_id
    expected = [
        *ids_of(DOCUMENTS[0]),
        end,
        *ids_of(DOCUMENTS[1]),
        end,
        *ids_of(DOCUMENTS[2]),
    ]
    text = read_text(data, TOKENIZER, len(expected))
    assert text.rows[0][0].tolist() == expected


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("shape", [(70,), (7, 10)], ids=str)
def test_files_of_token_ids(tmp_path, suffix, shape):
    ids = torch.arange(70, dtype=torch.int32).view(shape)
    path = tmp_path / f"ids.{suffix}"
    if suffix == "pt":
        torch.save(ids, path)
    else:
        save_file({"input_ids": ids}, path)
    text = read_text(path, None, 16)
    assert torch.cat([rows.flatten() for rows in text.rows]).tolist() == list(
        range(64 if len(shape) == 1 else 70)
    )
    assert text.seqlen == (16 if len(shape) == 1 else 10)


def test_a_data_set_in_a_folder(tmp_path):
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"body": document}) for document in DOCUMENTS]
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(lines))
    text = read_text(f"{tmp_path}/set:field=body", TOKENIZER, 16)
    assert text.sequences == sum(map(len, DOCUMENTS)) // 16


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("none.txt", FileNotFoundError, r"none\.txt': there is no such file; allowed"),
        ("none.jsonl:text", FileNotFoundError, r"none\.jsonl': there is no such"),
        ("none.safetensors", FileNotFoundError, "there is no such file"),
        ("some/where", FileNotFoundError, "as a data set it cannot be loaded"),
        ("some/where:test", ValueError, r"'test'; allowed are a text file"),
        ("fields.jsonl:body", ValueError, r"line 1: no text in the field 'body'; th"),
        ("short.txt", ValueError, r"it has 5 tokens and a window 32; allowed"),
        ("empty.safetensors", ValueError, "no tensor input_ids in it"),
        ([], ValueError, "it has no sequence"),
        (
            [torch.full((4,), 0.5)],
            ValueError,
            "a sequence of 4 values in torch.float32",
        ),
        (torch.zeros(1, 1, 1), ValueError, r"shape \(1, 1, 1\)"),
        ([torch.zeros(1).long()], ValueError, "at least 2 token ids"),
    ],
    ids=str,
)
def test_other_text_is_refused(tmp_path, monkeypatch, data, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fields.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "short.txt").write_text("short")
    save_file({"other": torch.zeros(2)}, tmp_path / "empty.safetensors")
    with pytest.raises(error, match=message):
        read_text(data, TOKENIZER, 32)


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        read_text(tmp_path / "text.txt", None, 32)


# ── the command ───────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    tiny.save("qwen3_moe", root / "fp")
    tiny.save("qwen3_moe", root / "other", seed=1)
    (root / "text.txt").write_text(TEXT)
    return root


def test_the_command_writes_both_files_and_a_table(folder, tmp_path, capsys):
    command = ["compare", str(folder / "fp"), str(folder / "other")]
    command += ["--method", f"same={folder / 'fp'}", "--data", f"{folder}/text.txt"]
    command += ["--out", str(tmp_path), "--seqlen", "32", "--dtype", "float32"]
    command += ["--jsd-threshold", "0.2", "--sequences", "4", "--keep-fp-pass"]
    assert main(command) == 0
    output, error = capsys.readouterr()
    log, size, *lines = output.splitlines()
    assert log == f"log: {tmp_path / 'vsraq_compare.log'}"
    assert size.startswith("the full-precision pass writes 128 tokens x 272 bytes")
    assert error == "comparing\n"
    assert lines[0].split()[:3] == ["MiB", "perplexity", "excess_nll"]
    assert [line.split()[0] for line in lines[1:4]] == ["full", "other", "same"]
    assert lines[4:] == [
        f"written to {tmp_path}/results.json",
        f"written to {tmp_path}/tokens.safetensors",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["thresholds"] == {"sampled_jsd": 0.2, "routing_shift": 0.1}
    assert results["methods"]["same"]["metrics"]["kl"]["value"] == 0
    assert results["data"]["sequences"] == 4
    kept = {p.name for p in (tmp_path / "fp_pass").iterdir()}
    assert kept == {"batch-000000.safetensors", "pass.json"}
    assert main([*command[:-1], "--sequences", "4"]) == 0
    assert "is used again (the same path, sizes" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "fp_pass").iterdir()} == kept


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["FP", "--data", "TEXT"], 1, "no quantized model: allowed is QUANTIZED"),
        (["FP", "FP", "--data", "none.txt"], 1, "there is no such file"),
        (["FP", "nowhere", "--data", "TEXT"], 1, "nowhere='nowhere': neither a folder"),
        (["FP", "FP", "--data", "TEXT"], 1, "and a window 128"),
        (["FP", "FP", "--method", f"fp={1}", "--data", "TEXT"], 1, "each name once"),
        *(
            (
                [*words, "--data", "TEXT", option, value],
                1,
                f"={value}: allowed is an int",
            )
            for words in (["FP", "FP"], ["REPLAY", "FP", "FP"])
            for option, value in (
                ("--batch-size", "0"),
                ("--seqlen", "1"),
                ("--sequences", "0"),
                ("--seed", "-1"),
            )
        ),
        (["FP", "--method", "fp", "--data", "TEXT"], 2, "'fp': allowed is NAME=PATH"),
        (["FP", "FP"], 2, "--data"),
    ],
    ids=str,
)
def test_errors_of_the_command(folder, tmp_path, capsys, words, status, message):
    places = {"FP": str(folder / "fp"), "TEXT": str(folder / "text.txt")}
    name = "replay" if words[0] == "REPLAY" else "compare"
    words = [word for word in words if word != "REPLAY"]
    command = [name, *(places.get(word, word) for word in words)]
    if message == "and a window 128":
        (tmp_path / "short.txt").write_text("short")
        command[-1] = str(tmp_path / "short.txt")
    command += ["--out", str(tmp_path / "out")]
    if status == 2:
        with pytest.raises(SystemExit):
            main(command)
    else:
        assert main(command) == status
    assert message in capsys.readouterr().err
