# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's `oneshot` with our configuration, and what it lacks upstream.

The last three tests describe llm-compressor 0.14.0.1. One that fails says that upstream
has gained what docs/llm_compressor.md asks for: then simplify the example.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.autoround import AutoRoundModifier
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from vsraq import VSRAQConfig

# not our warnings
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = Path(__file__).parents[2] / "examples" / "llm_compressor.py"
OWN = {"router_weight": "auto", "realign_routers": True}
WEIGHTS = {"num_bits": 4, "strategy": "group", "group_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """In float32: not every CPU can tune in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_model("qwen3_moe").save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aligned_modifier():
    return runpy.run_path(str(EXAMPLE))["RouterAlignedModifier"]


def compress(source, modifier, alignment=None, **kwargs):
    """The lines of our log, and the model."""
    ids = torch.cat(tiny.calibration())
    data = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    own = {} if alignment is None else {"alignment": alignment}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with tiny.LogLines() as messages:
        oneshot(
            model=model,
            tokenizer=tiny.tiny_tokenizer(),
            dataset=Dataset.from_dict(data),
            max_seq_length=tiny.SEQLEN,
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            recipe=modifier(
                config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
                ignore=["lm_head"],
                iters=3,
                batch_size=4,
                enable_torch_compile=False,
                **own,
            ),
            **kwargs,
        )
    return messages, model


def scales(model):
    """What tuning decides about the quantized layers."""
    return {n: p for n, p in model.named_parameters() if n.endswith("weight_scale")}


def test_the_example_aligns_and_exports(source, tmp_path, monkeypatch, capsys):
    output = tmp_path / "export"
    arguments = {
        "--model": str(source),
        "--dataset": tiny.save_text(tmp_path / "text.jsonl"),
        "--output": str(output),
        "--nsamples": "8",
        "--seqlen": str(tiny.SEQLEN),
        "--iters": "3",
        "--group-size": "32",
    }
    words = [word for pair in arguments.items() for word in pair]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words, "--no-torch-compile"])
    with tiny.LogLines() as messages:
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    lines = tiny.block_lines(messages)
    assert len(lines) == 2  # one per block
    for line in lines:
        assert float(line["z0"]) > 0
        assert float(line["weight"]) > 0
        assert line["reached"] == "4"  # q, k, v and o stand before the router

    before, after = (load_file(f / "model.safetensors") for f in (source, output))
    routers = [name for name in after if name.endswith("mlp.gate.weight")]
    changed = [n for n in routers if not after[n].equal(before[n])]
    assert len(routers) == 2
    assert len(changed) == sum("re-fitted: held-out" in m for m in messages)
    record = json.loads((output / "config.json").read_text()).get("vsraq", {})
    assert sorted(record.get("router_digests", {})) == sorted(changed)
    assert capsys.readouterr().out.strip()  # `verify` found nothing wrong


def test_the_router_loss_changes_what_is_tuned(source, aligned_modifier):
    off = {"router_weight": 0, "next_router_weight": 0, "realign_routers": False}
    off["not_use_best_mse"] = True
    tuned = {}
    for name, alignment in (
        ("plain", off),
        ("aligned", {"router_weight": 10.0, "not_use_best_mse": True}),
    ):
        _, model = compress(source, aligned_modifier, alignment, propagate_error=False)
        tuned[name] = {
            n: p.detach().clone()
            for n, p in model.named_parameters()
            if "layers.0.self_attn" in n and n.endswith("proj.weight")
        }
    assert tuned["plain"]
    assert any(not tuned["aligned"][n].equal(w) for n, w in tuned["plain"].items())


def test_the_default_recipe_is_refused(source, aligned_modifier):
    with pytest.raises(NotImplementedError, match="one block without the model"):
        compress(source, aligned_modifier, {}, propagate_error=False)


def test_upstream_has_no_option_for_a_configuration():
    """When this fails, AutoRoundModifier takes one: the subclass can go."""
    assert AutoRoundModifier(iters=3).iters == 3
    with pytest.raises(ValidationError, match=r"alg_configs\s+Extra inputs"):
        AutoRoundModifier(alg_configs=VSRAQConfig(**OWN))


def test_the_plain_modifier_does_not_align(source):
    """It builds AutoRound's default algorithm; importing vsraq does not change it."""
    messages, model = compress(source, AutoRoundModifier)
    assert messages == []
    assert scales(model)


def test_upstream_knows_its_modifier_by_name(source, aligned_modifier):
    """When this fails, subclasses count too: propagate_error=False can go."""
    alignment = {"router_weight": 1.0}
    right, _ = compress(source, aligned_modifier, alignment, propagate_error=False)
    wrong, _ = compress(source, aligned_modifier, alignment)
    right, wrong = tiny.block_lines(right), tiny.block_lines(wrong)
    assert right[0]["z0"] == wrong[0]["z0"]  # nothing is quantized before block 0
    assert right[1]["z0"] != wrong[1]["z0"]
