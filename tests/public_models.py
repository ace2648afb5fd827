# SPDX-License-Identifier: Apache-2.0
"""Public models of which only the config is here: config.json files to look at."""

from pathlib import Path

from byte_shares import PUBLIC

# what the published files say of their own quantization
OWN_QUANTIZATION = {
    "gpt-oss-20b": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    "DeepSeek-V3": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}
# of a recipe's file, up to its scheme -> the name above
MODEL_OF = {
    "solar_open_100b": "Solar-Open-100B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
    "glm_4_5_air": "GLM-4.5-Air",
    "nemotron_3_nano_30b": "Nemotron-3-Nano-30B-A3B",
    "gpt_oss_20b": "gpt-oss-20b",
    "deepseek_v3": "DeepSeek-V3",
    "olmoe_1b_7b": "OLMoE-1B-7B",
}


def public_name(stem: str) -> str:
    return next(name for start, name in MODEL_OF.items() if stem.startswith(start))


def save_public(name: str, folder: Path) -> Path:
    """Write a public model's config.json, and nothing else."""
    config = type(PUBLIC[name])(**PUBLIC[name].to_dict())
    config.dtype = "bfloat16"
    if name in OWN_QUANTIZATION:
        config.quantization_config = OWN_QUANTIZATION[name]
    config.save_pretrained(folder)
    return folder
