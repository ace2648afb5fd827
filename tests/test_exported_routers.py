# SPDX-License-Identifier: Apache-2.0
"""Re-fitted routers on disk: the tuned ones, whatever dtype the source has."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from auto_round import AutoRound
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from vsraq import VSRAQConfig
from vsraq.autoround import VSRAQQuantizer
from vsraq.checkpoint import load_model
from vsraq.realignment import realign_routers
from vsraq.realignment.exported_routers import restore_refitted_routers
from vsraq.routers import find_routers


@pytest.fixture(scope="module", autouse=True)
def streamed_in_bfloat16():
    with tiny.bfloat16():
        yield


# enough tokens for the fit to hold on samples that it has not seen
RUN = tiny.RUN | {"nsamples": 32, "dataset": tiny.calibration(samples=32)}


def source_of(folder, family="solar_open", *, float32="all"):
    """A checkpoint that is F32, or F32 in its routers alone, as some publish it."""
    model = tiny.tiny_model(family)
    if float32 == "routers":
        model = tiny.in_bfloat16(model)
        for router in find_routers(model):
            model.get_submodule(router.name).float()
    model.config.dtype = torch.bfloat16 if float32 == "routers" else torch.float32
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def run_on(model, *arguments, **options):
    config = VSRAQConfig(iters=1, router_weight=0, realign_routers=True)
    return AutoRound(
        model, *arguments, alg_configs=config, group_size=32, **RUN | options
    )


def stored(folder):
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def check(folder, refitted, source, names=lambda name: name):
    """The export holds the tuned routers, and so does what is loaded from it."""
    assert refitted
    on_disk, original = stored(folder), stored(source)
    record = json.loads((Path(folder) / "config.json").read_text())["vsraq"]
    assert record["realign_routers"] is True
    assert set(record["router_digests"]) == set(map(names, refitted))
    for own_name, tuned in refitted.items():
        name = names(own_name)
        assert torch.equal(on_disk[name], tuned.to(on_disk[name].dtype))
        assert not torch.equal(on_disk[name], original[name].to(on_disk[name].dtype))
        values = on_disk[name].flatten().view(torch.uint8).numpy().tobytes()
        digest = f"sha256:{hashlib.sha256(values).hexdigest()}"
        assert record["router_digests"][name] == digest
    loaded = load_model(folder).state_dict()
    for name, tuned in refitted.items():
        assert torch.equal(loaded[name], tuned.to(loaded[name].dtype))
    return {on_disk[names(n)].dtype for n in refitted}


def refitted_of(autoround):
    quantizer: VSRAQQuantizer = autoround.alg_composer.block_quantizer
    return quantizer.run.refitted


@pytest.mark.parametrize(
    ("float32", "loads_whole"),
    [("all", False), ("routers", False), ("routers", True)],
    ids=["float32", "float32 routers", "float32 routers, not streamed"],
)
def test_by_path(float32, loads_whole, tmp_path, monkeypatch):
    if loads_whole:
        monkeypatch.setenv("AR_DISABLE_META_LOAD", "1")
    source = source_of(tmp_path / "model", float32=float32)
    autoround = run_on(str(source))
    _, folder = autoround.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    dtypes = check(folder, refitted_of(autoround), source)
    assert dtypes == {torch.float32}


def test_a_model_in_bfloat16_of_a_float32_folder_in_two_formats(tmp_path):
    source = source_of(tmp_path / "model")
    model = load_model(source, dtype=torch.bfloat16)
    autoround = run_on(model, tiny.tiny_tokenizer())
    autoround.quantize()
    _, folders = autoround.save_quantized(
        str(tmp_path / "out"),
        format="auto_round,auto_round:gptqmodel",
        inplace=False,
        return_folders=True,
    )
    assert len(folders) == 2
    for folder in folders:
        assert check(folder, refitted_of(autoround), source) == {torch.float32}
    assert not isinstance(  # the way it returns is AutoRound's
        autoround.save_quantized(tmp_path / "again", inplace=False), tuple
    )


def test_a_family_that_is_renamed_on_disk(tmp_path):
    source = source_of(tmp_path / "model", "mixtral")
    model = load_model(source, dtype=torch.bfloat16)
    autoround = run_on(model, tiny.tiny_tokenizer())
    _, folder = autoround.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    check(
        folder,
        refitted_of(autoround),
        source,
        lambda name: name.replace("mlp.gate", "block_sparse_moe.gate"),
    )


def test_no_record_where_no_router_was_re_fitted(quantize):
    model = tiny.tiny_model("solar_open")
    model.config.vsraq = {"realign_routers": True}  # of an earlier run
    config = VSRAQConfig(iters=1, router_weight=0, realign_routers={"ridge": 1e12})
    autoround, model = quantize(model, config)
    assert not refitted_of(autoround)
    assert not hasattr(model.config, "vsraq")


def test_routers_re_fitted_after_the_run_are_recorded_with_their_stored_names(tmp_path):
    model, source = tiny.tiny_model("mixtral"), tiny.tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.7)
    reports = realign_routers(model, source, tiny.calibration(samples=32))
    applied = [report.router for report in reports if report.applied]
    assert applied
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["vsraq"]
    assert len(record["router_digests"]) == len(applied)
    on_disk = stored(tmp_path)
    for name, digest in record["router_digests"].items():
        values = on_disk[name].flatten().view(torch.uint8).numpy().tobytes()
        assert digest == f"sha256:{hashlib.sha256(values).hexdigest()}"


# ── what cannot be put right ──────────────────────────────────────────────────

NAME = "model.layers.0.mlp.gate.weight"


def export_of(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "solar_open"}')
    return folder


def test_the_other_tensors_of_the_file_stay(tmp_path):
    others = {"a": torch.randn(3, 5), "z": torch.randn(7).half()}
    folder = export_of(tmp_path, others | {NAME: torch.zeros(8, 4)})
    weight = torch.randn(8, 4).bfloat16()
    restore_refitted_routers(folder, torch.nn.Module(), {NAME: weight})
    after = load_file(folder / "model.safetensors")
    assert torch.equal(after.pop(NAME), weight.float())
    assert all(torch.equal(after[name], tensor) for name, tensor in others.items())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2)}, f"holds no tensor {NAME}"),
        ({NAME: torch.zeros(8, 3)}, r"stored as F32 \(8, 3\); allowed is .* \(8, 4\)"),
        ({NAME: torch.zeros(8, 4).int()}, r"stored as I32 \(8, 4\)"),
    ],
)
def test_an_export_without_that_router_is_refused(tensors, message, tmp_path):
    folder = export_of(tmp_path, tensors)
    with pytest.raises(RuntimeError, match=message):
        restore_refitted_routers(
            folder, torch.nn.Module(), {NAME: torch.zeros(8, 4).bfloat16()}
        )
