# SPDX-License-Identifier: Apache-2.0
"""What `verify` costs at size: time and memory against reading the files once.

    python benchmarks/verify.py                           # 60 layers x 256 experts
    python benchmarks/verify.py --layers 1 --experts 8 --hidden 2048 --width 1024

The original is a random Solar-Open in bfloat16, written file by file; the export is its
rounding to nearest in 4 bits, as AutoRound's `auto_round` format stores it, with one
entry of `extra_config` per expert.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import SolarOpenConfig

from vsraq.checkpoint import verify

BITS, GROUP = 4, 32


def pack(values):
    """(N, ...) levels along the first dimension -> int32 words."""
    per_word = 32 // BITS
    words = values.long().unflatten(0, (-1, per_word))
    shifts = (torch.arange(per_word) * BITS).view(1, -1, *[1] * (values.ndim - 1))
    packed = (words << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def quantize(weight):
    """The tensors of a layer in GPTQ's packing, symmetric."""
    w = weight.float().t().unflatten(0, (-1, GROUP))  # (G, group, O)
    middle = 1 << (BITS - 1)
    scales = (w.abs().amax(1) / (middle - 1)).half()
    levels = (w / scales.float()[:, None]).round().clamp(-middle, middle - 1) + middle
    zeros = torch.full_like(scales, middle - 1, dtype=torch.int32)
    return {
        "qweight": pack(levels.flatten(0, 1)),
        "qzeros": pack(zeros.t()).t().contiguous(),
        "scales": scales,
    }


def layer_tensors(index, arguments):
    """(name, shape) of a block; experts apart, as on disk."""
    hidden, width = arguments.hidden, arguments.width
    block = f"model.layers.{index}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{block}.self_attn.{name}.weight", (hidden, hidden)
    experts = [f"experts.{e}" for e in range(arguments.experts)]
    for expert in [*experts, "shared_experts"]:
        yield f"{block}.mlp.{expert}.gate_proj.weight", (width, hidden)
        yield f"{block}.mlp.{expert}.up_proj.weight", (width, hidden)
        yield f"{block}.mlp.{expert}.down_proj.weight", (hidden, width)
    yield f"{block}.mlp.gate.weight", (arguments.experts, hidden)
    yield f"{block}.mlp.gate.e_score_correction_bias", (arguments.experts,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{block}.{name}.weight", (hidden,)


def build(arguments, root):
    """Write both folders."""
    source, export = root / "source", root / "export"
    owners = {source: {}, export: {}}
    outer = [(f"{n}.weight", (256, arguments.hidden)) for n in ("lm_head",)]
    outer += [("model.embed_tokens.weight", (256, arguments.hidden))]
    outer += [("model.norm.weight", (arguments.hidden,))]
    parts = [outer, *(layer_tensors(i, arguments) for i in range(arguments.layers))]
    extra = {}
    for folder in owners:
        folder.mkdir()
    for number, part in enumerate(parts):
        original, exported = {}, {}
        for name, shape in part:
            original[name] = (torch.randn(shape) * 0.05).bfloat16()
            if "_proj" in name:
                layer = name.removesuffix(".weight")
                for suffix, tensor in quantize(original[name]).items():
                    exported[f"{layer}.{suffix}"] = tensor
                if ".experts." in name:
                    extra[layer] = {"bits": BITS}
            else:
                exported[name] = original[name]
        file = f"model-{number:05}.safetensors"
        for folder, tensors in ((source, original), (export, exported)):
            save_file(tensors, folder / file, metadata={"format": "pt"})
            owners[folder].update(dict.fromkeys(tensors, file))
        for index in range(arguments.layers if number == 0 else 0):
            extra[f".*model\\.layers\\.{index}\\.mlp\\.gate.*"] = {"bits": 16}
    config = model_config(arguments).to_dict()
    for folder, owner in owners.items():
        index = {"metadata": {}, "weight_map": owner}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if folder is export:
            config["quantization_config"] = {
                "quant_method": "auto-round",
                "packing_format": "auto_round:auto_gptq",
                "bits": BITS,
                "group_size": GROUP,
                "sym": True,
                "data_type": "int",
                "extra_config": extra,
            }
        (folder / "config.json").write_text(json.dumps(config))
    return source, export


def model_config(arguments):
    return SolarOpenConfig(
        vocab_size=256,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=arguments.hidden // 2,
        moe_intermediate_size=arguments.width,
        n_routed_experts=arguments.experts,
        num_experts_per_tok=2,
        architectures=["SolarOpenForCausalLM"],
        dtype="bfloat16",
    )


class PeakMemory:
    """Resident memory above the start, without pages of mapped files, in MiB."""

    def __enter__(self):
        process = psutil.Process()

        def private():
            memory = process.memory_info()
            return memory.rss - memory.shared

        start = private()
        self.peak = 0
        self._stop = threading.Event()

        def watch():
            while not self._stop.wait(0.01):
                self.peak = max(self.peak, (private() - start) / 2**20)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def read_all(*folders):
    """Every tensor once; the copy makes sure that it was read."""
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():
                    handle.get_tensor(name).clone()


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        built: list[Path] = []
        results: list[object] = []
        building = timed(lambda: built.extend(build(arguments, Path(root))))
        source, export = built
        size = sum(f.stat().st_size for d in built for f in d.iterdir()) / 2**20
        print(f"built in {building:.0f} s: {size:.0f} MiB in both folders")
        read_all(source, export)  # from the disk into the cache, for both alike
        reading = timed(lambda: read_all(source, export))
        with PeakMemory() as memory:
            verifying = timed(lambda: results.append(verify(export, source)))
        print(results[0])
        print(
            f"reading {reading:.1f} s, verify {verifying:.1f} s: "
            f"{verifying / reading:.2f} x; peak memory + {memory.peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
