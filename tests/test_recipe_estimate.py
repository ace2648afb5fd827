# SPDX-License-Identifier: Apache-2.0
"""What a run needs, estimated from a config and measured."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from auto_round.wrapper import WrapperLinear
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import exports
import tiny
from public_models import save_public
from vsraq.autoround.planning import scheme_fields
from vsraq.recipe import describe_run, estimate, inspect, parse_recipe, run
from vsraq.recipe.memory import graph_bytes

# Blocks so large that they are most of what a process takes; three shapes.
SMALLER = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
}
SHAPES = {
    "solar_open": {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "head_dim": 64,
        "moe_intermediate_size": 384,
        "n_routed_experts": 16,
    },
    "qwen3_moe": {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "head_dim": 64,
        "moe_intermediate_size": 192,
        "num_experts": 48,
    },
    "nemotron_h": {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "head_dim": 64,
        "moe_intermediate_size": 512,
        "n_routed_experts": 16,
        "moe_shared_expert_intermediate_size": 1024,
        "mamba_num_heads": 16,
        "mamba_head_dim": 48,
        "ssm_state_size": 32,
    },
}


def save(family, folder, shape):
    """A checkpoint in float32, which streams and tunes fast on any CPU."""
    torch.manual_seed(0)
    config = tiny.CONFIGS[family]()
    for name, value in shape.items():
        setattr(config, name, value)
    config.initializer_range = 0.02
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(model, text, output, **changes):
    return parse_recipe(
        {
            "model": str(model),
            "scheme": "W4A16",
            "output": str(output),
            "algorithm": {"iters": 2, "group_size": 32},
            "calibration": {
                "dataset": text,
                "nsamples": 4,
                "seqlen": tiny.SEQLEN,
                "batch_size": 4,
            },
            # in float32 on every CPU: bfloat16 kernels take 91 MB for themselves
            "runtime": {
                "device_map": "cpu",
                "enable_torch_compile": False,
                "amp": False,
            },
        }
        | changes
    )


CHILD = """
import json, sys
import tiny
from vsraq.recipe import parse_recipe, run

def peak():
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

run(parse_recipe(json.loads(sys.argv[1])))  # loads every library
before = peak()
run(parse_recipe(json.loads(sys.argv[2])))
print("measured", peak() - before)
"""


def measured(small, large):
    """The bytes by which the second run raises the peak of a process.

    `ru_maxrss` would not do: a child starts with that of its parent, the whole suite.
    """
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            *(json.dumps(r.resolved()) for r in (small, large)),
        ],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(folders),
            "AR_WORK_SPACE": tempfile.mkdtemp(),
            "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split("measured ")[1])


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        shapes = SHAPES.items() if every else [("solar_open", SMALLER)]
        metafunc.parametrize(("family", "shape"), shapes)
        metafunc.parametrize("iters", [2, 0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_the_estimate_is_near_the_measured_peak(family, shape, iters, tmp_path):
    """Of tuning, and of rounding to nearest."""
    text = tiny.save_text(tmp_path / "text.jsonl")
    small = save("solar_open", tmp_path / "small", {})
    large = save(family, tmp_path / "large", shape)
    algorithm = {"iters": iters, "group_size": 32}
    changes = {"algorithm": algorithm, "method": "vsraq" if iters else "auto_round"}
    recipe = recipe_of(large, text, tmp_path / "large-out", **changes)
    found = inspect(recipe)
    estimated = sum(estimate(found).memory.host.values())
    first = recipe_of(small, text, tmp_path / "small-out", **changes)
    peak = measured(first, recipe)
    assert estimated == pytest.approx(peak, rel=0.25)
    # and the sizes on disk, of which nothing is rounded
    (folder,) = (tmp_path / "large-out").glob("large-*")
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert found.export_bytes == pytest.approx(files, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "scheme", ["W4A16", "W3A16", "W8A16", "MXFP4", "MXFP8", "NVFP4", "FP8_STATIC"]
)
def test_what_rounding_keeps(scheme, dtype):
    """Of AutoRound's own layers, for the backward pass of one step."""
    layer = nn.Linear(256, 512, bias=False, dtype=dtype).requires_grad_(False)
    fields = {"scale_dtype": torch.float16, "act_bits": 16, "act_dynamic": True}
    fields |= dict(scheme_fields(scheme))
    for name, value in fields.items():
        setattr(layer, name, value)
    layer.act_max = torch.tensor(3.0)
    wrapped = WrapperLinear(layer, enable_torch_compile=False)
    own = {layer.weight, *wrapped.params.values()}
    own = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        wrapped(torch.randn(1, 256, dtype=dtype))
    per_weight = sum(s.nbytes() for s in kept.values()) / layer.weight.numel()
    assert graph_bytes(fields, dtype.itemsize) == pytest.approx(per_weight, rel=0.05)


def test_what_makes_a_run_larger(tmp_path):
    """Each setting moves the part that it is about."""
    model = tiny.save("solar_open", tmp_path / "model")
    text = tiny.save_text(tmp_path / "text.jsonl")

    def needs(**changes):
        recipe = recipe_of(model, text, tmp_path / "out", **changes)
        return estimate(inspect(recipe))

    cpu = needs()
    assert not cpu.memory.device
    gpu = needs(runtime={})
    waiting = needs(runtime={"low_gpu_mem_usage": True})
    for part in ("hidden states", "best rounding values", "router logits"):
        assert gpu.memory.device[part] == waiting.memory.host[part]
        assert part not in waiting.memory.device
    plain = needs(method="auto_round", algorithm={"iters": 2, "group_size": 32})
    assert "router logits" not in {n for n, size in plain.memory.host.items() if size}
    assert "next block, up to its router" not in plain.memory.host
    assert plain.operations < cpu.operations
    planned = needs(bits={"budget": "3%", "tokens": 1024})
    assert planned.memory.host["hidden states"] > cpu.memory.host["hidden states"]
    assert planned.operations > cpu.operations
    ignored = needs(runtime={"ignore_layers": "mlp.experts", "device_map": "cpu"})
    assert ignored.export_bytes > cpu.export_bytes
    text = str(waiting)
    assert "device memory: " in text
    assert "host memory: " in text
    assert "which are assumptions" in text


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        # 13.8 GB of safetensors in the repository's root
        ("gpt-oss-20b", 13.7e9, 13.9e9),
        # 671 G weights of 8 bits; layers that predict several tokens are 2.5 % more
        ("DeepSeek-V3", 671e9, 689e9),
        ("Qwen3-30B-A3B", 61.0e9, 61.2e9),  # bfloat16
    ],
)
def test_the_files_of_models_that_are_published_quantized(name, least, most, tmp_path):
    model = save_public(name, tmp_path / "model")
    recipe = {"model": str(model), "scheme": "W4A16", "output": "out"}
    found = inspect(parse_recipe(recipe))
    needs = estimate(found)
    assert least < needs.download_bytes < most
    # what is exported and tuned is what AutoRound dequantizes
    assert needs.export_bytes > 0.25 * found.parameters


def tensor_bytes(folder):
    """Without headers, shapes and global scales, much of the files of tiny models."""
    tensors = [t for f in folder.glob("*.safetensors") for t in load_file(f).values()]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 2)


def test_the_files_of_an_export(tmp_path):
    """In compressed-tensors, which AutoRound takes as a model, too."""
    made = exports.make(tmp_path, ["W4", "NVFP4"])
    for name in ("W4-llm_compressor", "NVFP4-llm_compressor"):
        folder = made[name][0]
        recipe = {"model": str(folder), "scheme": "W4A16", "output": "out"}
        needs = estimate(inspect(parse_recipe(recipe)))
        files = tensor_bytes(folder)
        assert needs.download_bytes == pytest.approx(files, rel=0.02)


# of transformers, when AutoRound saves a model that it holds whole
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_only_some_blocks_are_quantized(tmp_path, monkeypatch):
    """And the output projection, as AutoRound exports both."""
    # AutoRound 0.16.1 cannot stream a model whose output projection it tunes
    monkeypatch.setenv("AR_DISABLE_META_LOAD", "1")
    model = save("solar_open", tmp_path / "model", {})
    text = tiny.save_text(tmp_path / "text.jsonl")
    runtime = {"device_map": "cpu", "enable_torch_compile": False}

    def recipe(name, **more):
        return recipe_of(model, text, tmp_path / name, runtime=runtime | more)

    every = inspect(recipe("every"))
    some = recipe("some", to_quant_block_names="layers.1", quant_lm_head=True)
    found = inspect(some)
    assert found.tuned_blocks == ("model.layers.1",)
    assert found.head.name == "lm_head"
    assert not any(
        layer.is_quantized for layer in found.layers if "layers.0" in layer.name
    )
    (folder,) = run(some)
    files = tensor_bytes(folder)
    assert found.export_bytes == pytest.approx(files, rel=0.02)
    assert found.export_bytes > every.export_bytes
    monkeypatch.delenv("AR_DISABLE_META_LOAD")
    # a model is loaded whole whose output projection is tuned
    needs = estimate(found)
    assert needs.traffic < estimate(every).traffic
    whole = needs.memory.host["whole model"]
    assert whole == found.stored_width * found.parameters
    assert "2 blocks of which 1 are quantized" in describe_run(found)
    nothing = recipe("none", to_quant_block_names="layers.7")
    with pytest.raises(ValueError, match=r"to_quant_block_names='layers\.7'.*no block"):
        inspect(nothing)


def test_rounding_to_nearest_tunes_nothing(tmp_path):
    model = tiny.save("solar_open", tmp_path / "model")
    text = tiny.save_text(tmp_path / "text.jsonl")

    def needs(scheme, iters):
        algorithm = {"iters": iters} | ({"group_size": 32} if scheme == "W4A16" else {})
        recipe = recipe_of(
            *(model, text, tmp_path / "out"),
            **{"method": "auto_round", "scheme": scheme, "algorithm": algorithm},
        )
        found = inspect(recipe)
        return estimate(found), describe_run(found)

    tuned, _ = needs("W4A16", 2)
    nearest, plan = needs("W4A16", 0)
    assert "AutoRound, rounded to nearest, without samples" in plan
    assert nearest.operations == nearest.traffic == 0
    host = nearest.memory.host
    assert host["whole model"]
    assert not {"rounding values", "activations of a step"} & host.keys()
    assert not host["hidden states"]
    assert sum(host.values()) < sum(tuned.memory.host.values())
    # the ranges of inputs are measured
    static, plan = needs("FP8_STATIC", 0)
    assert "AutoRound, rounded to nearest\n" in plan
    assert static.memory.host["hidden states"]
    assert static.operations
