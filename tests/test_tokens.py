# SPDX-License-Identifier: Apache-2.0
"""Masks as files, and masks from hidden states."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

import reference
import tiny
from test_output_head import blocks_of, last_hidden
from vsraq.metrics import sampled_jsd
from vsraq.tokens import Sampling, TokenMask, hash_tokens
from vsraq.tokens.output_head import output_head
from vsraq.tokens.shift import output_shift

IDS = [torch.arange(6).view(1, 6), torch.arange(4).view(1, 4)]
ORIGIN = {
    "model": "tiny",
    "scheme": "W4A16",
    "tau": 1e-4,
    "shift_threshold": None,
    "sampling": Sampling(),
}


def some_mask(**origin):
    masks = [torch.tensor([1, 0, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1]).bool()]
    return TokenMask.of(masks, IDS, **ORIGIN | origin)


# ── sampling ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.8, "top_k": 5}, Sampling()),  # it does not sample
        ({"do_sample": True}, Sampling()),
        (
            {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
            Sampling(temperature=0.8, top_p=0.9),
        ),
        (
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            Sampling(temperature=1.0, top_k=0, top_p=1.0),
        ),
    ],
)
def test_sampling_is_the_models_own_where_it_has_one(generation, expected, tmp_path):
    model = tiny.tiny_model("llama")
    model.generation_config = GenerationConfig(**generation)
    assert Sampling.of(model) == expected
    if generation.get("do_sample"):  # as published, and read again
        model.generation_config.save_pretrained(tmp_path)
        model.generation_config = GenerationConfig.from_pretrained(tmp_path)
        assert Sampling.of(model) == expected


def test_sampling_without_a_generation_config():
    assert Sampling.of(torch.nn.Linear(2, 2)) == Sampling(0.6, 20, 0.95)
    with pytest.raises(ValueError, match="top_p=2: allowed is"):
        Sampling(top_p=2)


# ── mask ──────────────────────────────────────────────────────────────────────


def test_a_mask_survives_its_file(tmp_path):
    origin = {"tau": 0.1, "shift_threshold": 0.1, "sampling": Sampling(1.0, None, 0.9)}
    mask = some_mask(**origin)
    mask.save(tmp_path / "mask.safetensors")
    mask.save(tmp_path / "mask.safetensors")  # replaces it
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]
    loaded = TokenMask.load(tmp_path / "mask.safetensors")
    for name in ("hashes", "model", "scheme", "vsraq", *origin):
        assert getattr(loaded, name) == getattr(mask, name)
    for a, b in zip(loaded.masks, mask.masks, strict=True):
        assert torch.equal(a, b)
    with safe_open(tmp_path / "mask.safetensors", "pt") as file:
        sampling = json.loads(file.metadata()["sampling"])
    assert sampling == {"temperature": 1.0, "top_k": None, "top_p": 0.9}


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    mask = some_mask()
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("vsraq.whole_file.os.replace", None)
    with pytest.raises(TypeError):
        some_mask(tau=0.5).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"selected": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"other.safetensors': not a mask .* new one"):
        TokenMask.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a mask of this version"):
        TokenMask.load(path)
    with pytest.raises(FileNotFoundError):
        TokenMask.load(tmp_path / "missing.safetensors")


def test_counts():
    mask = some_mask()
    assert (mask.selected, mask.total, mask.share) == (3, 10, 0.3)
    expected = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 0, 0]).bool()
    assert torch.equal(mask.of_samples([1, 0]), expected)
    assert mask.warning() is None
    none, all_of_them = (
        TokenMask.of([torch.full((6,), value), torch.full((4,), value)], IDS, **ORIGIN)
        for value in (False, True)
    )
    assert (none.share, all_of_them.share) == (0.0, 1.0)
    assert "0 of 10 tokens (0.00%)" in none.warning()
    assert "lower the thresholds" in none.warning()
    assert "raise tau" in all_of_them.warning()


def test_the_first_sample_that_differs_is_named():
    mask = some_mask()
    mask.check(IDS)
    mask.check([ids.flatten().int() for ids in IDS])
    other = IDS[1].clone()
    other[0, 2] = 9
    actual, made_for = hash_tokens(other)[:12], mask.hashes[1][:12]
    shown = f"sample 1 has 4 tokens with hash {actual}.*{made_for}"
    with pytest.raises(ValueError, match=shown):
        mask.check([IDS[0], other])
    with pytest.raises(ValueError, match=r"sample 0 has 4 tokens .* made for 6"):
        mask.check(IDS[::-1])
    for samples in (IDS[:1], [*IDS, IDS[0]]):
        with pytest.raises(ValueError, match=f"this run has {len(samples)}"):
            mask.check(samples)


def test_masks_that_do_not_fit_are_refused():
    masks = some_mask().masks
    with pytest.raises(ValueError, match="first difference at sample 1"):
        TokenMask.of([masks[0], masks[0]], IDS, **ORIGIN)
    with pytest.raises(ValueError, match="first difference at sample 1"):
        TokenMask.of(masks[:1], IDS, **ORIGIN)
    with pytest.raises(ValueError, match=r"masks\[0\] is torch.float32"):
        TokenMask.of([masks[0].float(), masks[1]], IDS, **ORIGIN)
    with pytest.raises(ValueError, match="at least one sample"):
        TokenMask.of([], [], **ORIGIN)


# ── from hidden states to the shift ───────────────────────────────────────────


def test_output_shift_in_chunks_is_that_of_whole_logits():
    model = tiny.tiny_model("solar_open")
    hidden, _ = last_hidden(model, torch.cat(tiny.calibration(samples=2)))
    q = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    q[0, 5:9] = hidden[0, 5:9]
    fp_hidden = [hidden[:1], hidden[1:, :20]]
    q_hidden = [q[:1], q[1:, :20]]
    sampling = Sampling(temperature=0.9, top_k=7, top_p=0.8)
    sizes = []
    with output_head(model, blocks_of(model)) as head:

        def counted(states):
            sizes.append(len(states))
            return head(states)

        shifts = output_shift(
            q_hidden, fp_hidden, counted, sampling=sampling, chunk_tokens=6
        )
        logits = [(head(a), head(b)) for a, b in zip(q_hidden, fp_hidden, strict=True)]
    assert max(sizes) == 6
    assert [len(s) for s in shifts] == [32, 20]
    for shift, (a, b) in zip(shifts, logits, strict=True):
        whole = sampled_jsd(a, b, temperature=0.9, top_k=7, top_p=0.8).flatten()
        torch.testing.assert_close(shift, whole, rtol=1e-4, atol=1e-6)
        twin = [
            reference.sampled_jsd(x, y, temperature=0.9, top_k=7, top_p=0.8)
            for x, y in zip(
                a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), strict=True
            )
        ]
        torch.testing.assert_close(
            shift, torch.tensor(twin).float(), rtol=1e-3, atol=1e-5
        )
    assert torch.equal(shifts[0][5:9], torch.zeros(4))
    assert shifts[0].max() <= math.log(2) + 1e-7


def test_a_head_of_the_quantized_model():
    hidden = [torch.randn(1, 3, 5)]
    zero = output_shift(hidden, hidden, lambda h: h)
    assert torch.equal(zero[0], torch.zeros(3))
    assert output_shift(hidden, hidden, lambda h: h, q_head=lambda h: -h)[0].min() > 0


def test_bad_arguments_are_refused():
    hidden = [torch.randn(1, 3, 5)]
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        output_shift(hidden, hidden, lambda h: h, chunk_tokens=0)
    with pytest.raises(ValueError, match="shapes differ"):
        output_shift(hidden, [hidden[0][:, :2]], lambda h: h)
