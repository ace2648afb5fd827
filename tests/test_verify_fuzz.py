# SPDX-License-Identifier: Apache-2.0
"""Corrupted exports: a fault or a documented error, or nothing was changed in meaning.

Against the tuned model every bit of a quantized layer counts, so files are changed byte
by byte there; against the original, whose weights the export only approximates,
their structure is.
"""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import exports
from vsraq.checkpoint import Checkpoint, CheckpointError, verify

# its fixtures are made once per process
pytestmark = pytest.mark.xdist_group("test_verify_fuzz")

RUNS = ("W4", "W3-asym", "NVFP4")
DOCUMENTED = (CheckpointError, FileNotFoundError, ValueError)
fuzz = settings(phases=[Phase.generate])  # of four tests, each with 150 examples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exports.make(tmp_path_factory.mktemp("fuzz"), RUNS)


def survives(path, reference):
    """Whether an export passes; any error but the documented ones goes through."""
    try:
        verify(path, reference)
    except DOCUMENTED:
        return False
    return True


def meaning(path):
    """All that an export says: its numbers by name, and the layers' schemes."""
    with Checkpoint(path) as export:
        assert not export.faults
        numbers = {}
        for name in export:
            layer, _, suffix = name.rpartition(".")
            if suffix in ("qweight", "weight_packed"):
                numbers[layer] = export.dequantize(layer)
            elif suffix == "weight" or suffix.endswith("bias"):
                numbers[name] = export[name]
        return {name: (str(t.dtype), t) for name, t in numbers.items()}


def same_meaning(a, b):
    return a.keys() == b.keys() and all(
        a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a
    )


def copy(made, name, tmp_path):
    folder, tuned, source = made[name]
    target = tmp_path / "broken"
    if target.exists():
        shutil.rmtree(target)
    return shutil.copytree(folder, target), folder, tuned, source


names = st.sampled_from(
    [f"{run}-{form}" for run in RUNS for form in exports.RUNS[run][1].split(",")]
)


@fuzz
@given(data=st.data(), name=names)
def test_bytes_of_the_tensors_against_the_tuned_model(data, name, made, tmp_path):
    path, folder, tuned, _ = copy(made, name, tmp_path)
    file = path / "model.safetensors"
    octets = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", octets[:8])
    first = 8 + header
    for _ in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(first, len(octets) - 1))] ^= data.draw(
            st.integers(1, 255)
        )
    file.write_bytes(octets)
    if survives(path, tuned):
        # `weight_shape` and scales of inputs are not numbers of the weights
        assert same_meaning(meaning(path), meaning(folder))


@fuzz
@given(data=st.data(), name=names)
def test_bytes_of_the_header_and_truncations(data, name, made, tmp_path):
    path, folder, _, source = copy(made, name, tmp_path)
    file = path / "model.safetensors"
    octets = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", octets[:8])
    if data.draw(st.booleans()):
        del octets[data.draw(st.integers(0, len(octets) - 1)) :]
    else:
        at = data.draw(st.integers(0, 8 + header - 1))
        octets[at] = data.draw(st.integers(0, 255))
    file.write_bytes(octets)
    if survives(path, source):
        assert same_meaning(meaning(path), meaning(folder))


def _edit_tensors(data, path):
    """Drop, rename, copy, swap, cut, cast or zero one or two tensors."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    other = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = data.draw(
        st.sampled_from(["drop", "rename", "copy", "swap", "cut", "cast", "zero"])
    )
    if kind in ("drop", "rename"):
        del tensors[name]
    if kind in ("rename", "copy"):
        tensors[name.replace("proj", "porj") + ".x"] = tensor.clone()
    if kind == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    if kind == "cut":
        tensors[name] = tensor.reshape(-1)[: tensor.numel() // 2].clone()
    if kind == "cast":
        dtypes = [torch.float64, torch.int8, torch.float8_e5m2, torch.bool]
        tensors[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
    if kind == "zero":
        tensors[name] = torch.zeros_like(tensor)
    save_file(tensors, file, metadata={"format": "pt"})


JUNK = st.sampled_from([None, True, -1, 0, 3, 10**9, 2.5, "x", [], {}, [1], {"a": 1}])


def _edit_json(data, node):
    """Replace or drop something anywhere in a JSON value."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and data.draw(st.booleans()):
            node = node[key]
            continue
        if data.draw(st.booleans()):
            node[key] = data.draw(JUNK)
        else:
            del node[key]
        return


def _edit_config(data, path):
    file = path / "config.json"
    config = json.loads(file.read_text())
    _edit_json(data, config["quantization_config"])
    file.write_text(json.dumps(config))


def _edit_index(data, path):
    owner = dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors")
    index = {"metadata": {}, "weight_map": owner}
    _edit_json(data, index)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@fuzz
@given(data=st.data(), name=names)
def test_tensors_against_the_original(data, name, made, tmp_path):
    path, folder, _, source = copy(made, name, tmp_path)
    _edit_tensors(data, path)
    if survives(path, source):
        assert same_meaning(meaning(path), meaning(folder))


@fuzz
@given(data=st.data(), name=names)
def test_config_and_index_against_the_original(data, name, made, tmp_path):
    path, folder, _, source = copy(made, name, tmp_path)
    edit = data.draw(st.sampled_from([_edit_config, _edit_index]))
    edit(data, path)
    if survives(path, source):
        assert same_meaning(meaning(path), meaning(folder))
