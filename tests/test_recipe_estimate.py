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
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from vsraq.autoround.planning import scheme_fields
from vsraq.recipe import estimate, inspect, parse_recipe
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
            "runtime": {"device_map": "cpu", "enable_torch_compile": False},
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_the_estimate_is_near_the_measured_peak(family, shape, tmp_path):
    text = tiny.save_text(tmp_path / "text.jsonl")
    small = save("solar_open", tmp_path / "small", {})
    large = save(family, tmp_path / "large", shape)
    recipe = recipe_of(large, text, tmp_path / "large-out")
    found = inspect(recipe)
    estimated = sum(estimate(found).memory.host.values())
    peak = measured(recipe_of(small, text, tmp_path / "small-out"), recipe)
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
