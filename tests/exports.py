# SPDX-License-Identifier: Apache-2.0
"""Tiny real exports in every format that can be verified, and ways to break them."""

import json
import shutil
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file

import tiny
from vsraq import VSRAQConfig

MIXED = {
    "model.layers.0.self_attn.q_proj": {"bits": 8},
    "model.layers.1.mlp.experts": {"bits": 3, "group_size": 16},
    "model.layers.0.mlp.shared_experts": {"bits": 16},
}
# name -> scheme, formats of one run, further arguments
RUNS = {
    "W4": ("W4A16", "auto_round,auto_gptq,auto_awq,llm_compressor", {}),
    "W4-asym": ("W4A16", "auto_gptq,auto_awq", {"sym": False}),
    "W4-asym-ct": ("W4A16", "llm_compressor", {"sym": False}),
    "W4-mixed": ("W4A16", "auto_round,llm_compressor", {"layer_config": MIXED}),
    "W2": ("W2A16", "auto_round", {}),
    "W3": ("W3A16", "auto_round", {}),
    "W3-asym": ("W3A16", "auto_round", {"sym": False}),
    "W8": ("W8A16", "auto_round", {}),
    "NVFP4": ("NVFP4", "auto_round,llm_compressor", {}),
    "MXFP4": ("MXFP4", "llm_compressor", {}),
    "MXFP8": ("MXFP8", "llm_compressor", {}),
    "FP8": ("FP8_STATIC", "llm_compressor", {}),
    "INT8": ("INT8_W8A8", "llm_compressor", {}),
}
NAMES = [f"{name}-{f}" for name, run in RUNS.items() for f in run[1].split(",")]


def make(root, names):
    """Name -> (folder, tuned model, folder of the original), for these runs."""
    source = tiny.save("solar_open", root / "source")
    found = {}
    for name in names:
        scheme, formats, options = RUNS[name]
        if scheme.startswith("W"):
            options = {"group_size": 32} | options
        autoround = AutoRound(
            tiny.in_bfloat16(tiny.tiny_model("solar_open")),
            tiny.tiny_tokenizer(),
            scheme=scheme,
            alg_configs=VSRAQConfig(iters=2, router_weight=1.0),
            dataset=tiny.calibration(),
            **tiny.RUN,
            **options,
        )
        tuned, _ = autoround.quantize()
        _, saved = autoround.save_quantized(
            str(root / name), format=formats, inplace=False, return_folders=True
        )
        saved = [saved] if isinstance(saved, str) else saved
        for form, folder in zip(formats.split(","), saved, strict=True):
            found[f"{name}-{form}"] = (Path(folder), tuned, source)
    return found


class Broken:
    """A copy of an export to break."""

    def __init__(self, folder, target):
        self.path = Path(shutil.copytree(folder, target))
        self.file = self.path / "model.safetensors"
        self.tensors = load_file(self.file)
        self.config = json.loads((self.path / "config.json").read_text())

    @property
    def quantization(self):
        return self.config["quantization_config"]

    def names(self, ending):
        return [name for name in self.tensors if name.endswith(ending)]

    def first(self, *endings):
        """The first tensor that ends like one of these."""
        return next(name for name in sorted(self.tensors) if name.endswith(endings))

    def save(self):
        tensors = {name: t.clone() for name, t in self.tensors.items()}
        save_file(tensors, self.file, metadata={"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self.path

    def set_index(self, owner):
        """Write an index: tensor -> file."""
        index = {"weight_map": owner}
        text = json.dumps(index)
        (self.path / "model.safetensors.index.json").write_text(text)


def random_like(tensor):
    """Other bits of the same dtype."""
    generator = torch.Generator().manual_seed(1)
    if tensor.dtype == torch.int8:
        return torch.randint(-127, 128, tensor.shape, generator=generator).to(
            torch.int8
        )
    if tensor.dtype.is_floating_point:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    octets = torch.empty(tensor.shape, dtype=tensor.dtype).view(torch.uint8)
    return (
        torch.randint(0, 256, octets.shape, generator=generator)
        .to(torch.uint8)
        .view(tensor.dtype)
    )
