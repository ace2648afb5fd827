"""A tiny random model of every MoE family of the installed transformers."""

from dataclasses import fields

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tiny import EXPERTS, TOP_K, VOCAB

HIDDEN = 64
LAYERS = 3

# What a configuration, and each one inside it, gets where its class has such a field,
# under the name it has there; of two names of one field, the later counts.
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "linear_head_dim": 32,
    "linear_num_heads": 2,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 32,
    "linear_num_value_heads": 2,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_top_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,  # logits that differ, so that rounding matters
    # of the vision and audio towers
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "adapter_in_dim": HIDDEN,
    "adapter_input_size": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "image_size": 64,
}

# What a configuration of this model type gets besides.
EXTRA = {
    "cohere2_moe": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "prefix_dense_intermediate_size": 64,
    },
    "axk2": {"gated_norm_rank": 32},
    # the model asks for what the default lacks
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 8,
        },
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 32,
    },
    "doge": {"is_moe": True, "num_experts": EXPERTS**2},  # product keys
    "dots1": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 64,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "global_head_dim": 64,
    },
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared"]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "inkling2_text": {"unpadded_vocab_size": VOCAB, "n_layers_per_attn_res_block": 2},
    "inkling_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "n_shared_experts": 2,  # rows of the router, too
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 32,
    },
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "moe_router_logit_softcapping": 2.0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"moe_layers": [1, 2], "intermediate_size_mlp": 64},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 4, "head_dim": 32},
    "mellum": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]
    },
    "mimo_v2_flash": {"num_key_value_heads": 1},  # twice as many in sliding layers
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "dense_intermediate_size": 64,
        "rotary_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "nemotron_h": {
        "layers_block_type": [
            "linear_attention",
            "moe",
            "full_attention",
            "mlp",
            "moe",
        ],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 32,
    },
    "zaya": {
        "num_experts_per_tok": 1,  # the only one supported
        "router_hidden_size": 32,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "sliding_window": 8,
    },
}


def _config(cls):
    known = {field.name for field in fields(cls)}
    values = {}
    for name, value in COMMON.items():
        own = cls.attribute_map.get(name, name)
        if name in known or own in known:
            values[own] = value
    for name, value in vars(cls()).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _config(type(value))
        elif name in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            turn = name == "layer_types"
            values[name] = [
                kinds[i % len(kinds) if turn else min(i, len(kinds) - 1)]
                for i in range(LAYERS)
            ]
    return cls(**values | EXTRA.get(cls.model_type, {}))


def tiny_family(model_type, seed=0, multimodal=None):
    if multimodal is None:
        multimodal = model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(_config(CONFIG_MAPPING[model_type])).eval()
    return model
