# SPDX-License-Identifier: Apache-2.0
"""Which layers the bytes of public models belong to, from their configs alone.

    python benchmarks/byte_shares.py

Small models have larger attention than large ones; bytes spent there cost them more.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    NemotronHConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    SolarOpenConfig,
)

import routing
from vsraq.bits.shares import byte_shares

MAMBA, MOE, ATTENTION = "linear_attention", "moe", "full_attention"
KINDS = {"M": MAMBA, "E": MOE, "*": ATTENTION}
NEMOTRON = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
# values of the published config.json files
PUBLIC: dict[str, PretrainedConfig] = {
    "Solar-Open-100B": SolarOpenConfig(),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "GLM-4.5-Air": Glm4MoeConfig(
        vocab_size=151552,
        hidden_size=4096,
        num_hidden_layers=46,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
    ),
    "Nemotron-3-Nano-30B-A3B": NemotronHConfig(
        vocab_size=131072,
        hidden_size=2688,
        layers_block_type=[KINDS[letter] for letter in NEMOTRON],
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        n_shared_experts=1,
    ),
    "gpt-oss-20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "DeepSeek-V3": DeepseekV3Config(num_mtp_layers=0),
    "OLMoE-1B-7B": OlmoeConfig(intermediate_size=1024),
}


def print_row(name: str, model: torch.nn.Module) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    shares = byte_shares(model)
    cells = [f"{100 * s.stored:.1f} / {100 * s.active:.1f}" for s in shares.values()]
    print(f"| {name} | {parameters / 1e9:.3g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print(
        "| model | 10^9 weights | routed experts | shared experts | attention, Mamba | "
        "dense MLP | embedding, head |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, config in PUBLIC.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        print_row(name, model)
    print_row("the embedded model", routing.load_bench_model("solar_open"))
