# SPDX-License-Identifier: Apache-2.0
"""Quantize a MoE model with llm-compressor, its routers aligned.

    python examples/llm_compressor.py --model Qwen/Qwen3-30B-A3B --dataset text.jsonl

Needs an environment of its own; docs/llm_compressor.md says which, and what works.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.autoround import AutoRoundModifier
from pydantic import PrivateAttr
from transformers import AutoModelForCausalLM, AutoTokenizer

from vsraq import VSRAQConfig, find_routers
from vsraq.checkpoint import verify
from vsraq.realignment.record import record_realignment, router_weight, write_record


class RouterAlignedModifier(AutoRoundModifier):
    """llm-compressor's AutoRoundModifier, with a VSRAQConfig for its AutoRound.

    It has no option for an AutoRound configuration. `_update_device_map_for_dp` is
    where a subclass sees the arguments of AutoRound before it is built.
    """

    alignment: dict[str, Any]  # arguments of VSRAQConfig, as the recipe keeps them
    _before: dict[str, Any] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state, **kwargs):
        weights = dict(self._router_weights(state.model))
        self._before = {name: weight.clone() for name, weight in weights.items()}
        return super().on_initialize(state, **kwargs)

    def _update_device_map_for_dp(self, ar_kwargs):
        super()._update_device_map_for_dp(ar_kwargs)
        ar_kwargs["alg_configs"] = VSRAQConfig(**self.alignment)

    def on_calibration_end(self, state, event, **kwargs):
        super().on_calibration_end(state, event, **kwargs)
        refitted = {
            name: weight
            for name, weight in self._router_weights(state.model)
            if not weight.equal(self._before[name])
        }
        if refitted:
            record_realignment(state.model, refitted)

    def _router_weights(self, model):
        for router in find_routers(model):
            yield router_weight(router.name, model.get_submodule(router.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or local path")
    parser.add_argument("--dataset", required=True, help=".jsonl with a text per line")
    parser.add_argument("--output", default="quantized-llm-compressor")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--no-torch-compile", action="store_true")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = load_dataset("json", data_files=arguments.dataset, split="train")
    data = data.select(range(arguments.nsamples)).map(
        lambda row: tokenizer(
            row["text"], truncation=True, max_length=arguments.seqlen
        ),
        remove_columns=data.column_names,
    )
    weights = {"num_bits": 4, "strategy": "group", "group_size": arguments.group_size}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        max_seq_length=arguments.seqlen,
        num_calibration_samples=arguments.nsamples,
        recipe=RouterAlignedModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["lm_head"],
            iters=arguments.iters,
            enable_torch_compile=not arguments.no_torch_compile,
            # the next router is not there: llm-compressor hands over single blocks
            alignment={"router_weight": "auto", "realign_routers": True},
        ),
        # llm-compressor sets this for a class that is called AutoRoundModifier;
        # without it the full-precision routers would read the quantized stream
        propagate_error=False,
        output_dir=arguments.output,
    )
    # llm-compressor does not save what it does not know of a config, and `verify` must
    # know which routers are meant to differ
    record = getattr(model.config, "vsraq", {})
    write_record(Path(arguments.output), record.get("router_digests", {}))
    print(verify(arguments.output, arguments.model))


if __name__ == "__main__":
    main()
