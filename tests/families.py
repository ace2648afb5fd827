# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every MoE family of the installed transformers."""

from dataclasses import fields
from itertools import chain

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tiny import EXPERTS, TOP_K, VOCAB

HIDDEN = 64
LAYERS = 3
FULL_AND_SLIDING = ["full_attention", "sliding_attention", "full_attention"]
SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "full_attention"]
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]

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
}
# The same for the towers of images and sounds, and what joins them to the text.
TOWERS = {
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "vision_output_dim": HIDDEN,
    "projector_input_dim": HIDDEN,
    "projector_output_dim": HIDDEN,
    "projector_hidden_size": HIDDEN,
    "projection_hidden_size": HIDDEN,
    "projection_hidden_dim": HIDDEN,
    "projection_intermediate_size": HIDDEN,
    "vision_hidden_size": HIDDEN,
    "output_dim": HIDDEN,
    "downsample_hidden_size": 32,
    "mlp_ratio": 2.0,
    "adapter_in_dim": HIDDEN,
    "adapter_input_size": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "image_size": 64,
}

# What a configuration of this model type gets besides.
EXTRA = {
    "axk2": {"gated_norm_rank": 32},
    "cohere2_moe": {
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "prefix_dense_intermediate_size": 64,
    },
    # the model asks for what the default lacks
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_sam_vision_model": {
        "output_channels": 32,
        "downsample_channels": [32, 64],
    },
    "deepseek_ocr2_text": {
        "topk_method": "group_limited_greedy",
        "mlp_layer_types": DENSE_THEN_SPARSE,
    },
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
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": {
        "layer_types": SLIDING_THEN_FULL,
        "global_head_dim": 64,
    },
    "doge": {"is_moe": True, "num_experts": EXPERTS**2},  # product keys
    "dots1": {"layer_types": FULL_AND_SLIDING},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 64,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],  # of text, of images
        "rope_parameters": {"rope_theta": 500000.0, "mrope_section": [4, 4, 8]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": SLIDING_THEN_FULL,
        "global_head_dim": 64,
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
        }
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 4},  # no other is allowed
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
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "n_shared_experts": 2,  # rows of the router, too
    },
    "inkling_vision": {"patch_size": 2},  # the steps to a larger one need scipy
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 32,
    },
    "laguna": {
        "layer_types": FULL_AND_SLIDING,
        "moe_router_logit_softcapping": 2.0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"moe_layers": [1, 2], "intermediate_size_mlp": 64},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 4},
    "mellum": {"layer_types": FULL_AND_SLIDING},
    "mimo_v2_flash": {"num_key_value_heads": 1},  # twice as many in sliding layers
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "dense_intermediate_size": 64,
        "rotary_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mistral_large4_text": {"indexer_types": ["full", "full", "shared"]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": (32,) * 4},
    "muse_spark_text": {"moe_hidden_size": 32},
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
    "radio": {"video_temporal_patch_size": 2},  # as the model around it has it
    "step3p5": {
        "layer_types": FULL_AND_SLIDING,
        "sliding_window": 8,
        "share_expert_dim": 32,
    },
    "unlimited_ocr_sam_vision_model": {
        "output_channels": 32,
        "downsample_channels": [32, 64],
    },
    "unlimited_ocr_text": {"topk_method": "group_limited_greedy"},
    "zaya": {
        "num_experts_per_tok": 1,  # the only one supported
        "router_hidden_size": 32,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "sliding_window": 8,
    },
}

# What every model starts at a value of no effect on the choice of experts.
RANDOM = {
    "e_score_correction_bias": 0.1,
    "expert_bias": 0.1,
    "balancing_biases": 0.1,
    "router.gate.weight": COMMON["initializer_range"],  # zero in afmoe
}


def _config(cls):
    known = {field.name for field in fields(cls)}
    values = {}
    for name, value in (COMMON | TOWERS).items():
        own = cls.attribute_map.get(name, name)
        if name in known or own in known:
            values[own] = value
    for name, value in vars(cls()).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _config(type(value))
        elif name == "layer_types" and value:  # its kinds in turn
            kinds = list(dict.fromkeys(value))
            values[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif name == "mlp_layer_types" and value:  # dense or hashed first, once
            kinds = list(dict.fromkeys(value))
            values[name] = [kinds[min(i, len(kinds) - 1)] for i in range(LAYERS)]
    return cls(**values | EXTRA.get(cls.model_type, {}))


def _has_experts(config):
    return any(
        _has_experts(value)
        if isinstance(value, PreTrainedConfig)
        else "expert" in name and not name.startswith("_")
        for name, value in vars(config).items()
    )


def _moe_types(names):
    # its default is no valid configuration, and a valid one has no experts
    names = [name for name in names if name != "gemma4_assistant"]
    return sorted(name for name in names if _has_experts(CONFIG_MAPPING[name]()))


def causal_moe_types():
    return _moe_types(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_moe_types():
    return _moe_types(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@torch.no_grad()
def tiny_family(model_type, seed=0, multimodal=None):
    """The causal model where there is one, if `multimodal` does not say otherwise."""
    if multimodal is None:
        multimodal = model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(_config(CONFIG_MAPPING[model_type])).eval()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        for ending, scale in RANDOM.items():
            if name.endswith(ending):
                tensor.copy_(torch.randn_like(tensor) * scale)
        if name.endswith("tid2eid"):  # the experts of each token id
            tensor.copy_(torch.rand(VOCAB, EXPERTS).argsort()[:, :TOP_K])
    return model
