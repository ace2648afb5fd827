# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of real families, and what they need to go through AutoRound."""

import json
import logging
import random
import re
from contextlib import contextmanager

import torch
from auto_round.utils.device_manager import get_ar_device
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SolarOpenConfig,
)

# AutoRound tunes in bfloat16 on CPUs that have it. Tests compare with float32, on every
# CPU alike; `bfloat16()` below is for those that are about bfloat16.
get_ar_device("cpu")._bf16_supported = False

VOCAB = 256
SEQLEN = 32
EXPERTS = 8
TOP_K = 2

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,  # logits that differ, so that rounding matters
}

CONFIGS = {
    "solar_open": lambda: SolarOpenConfig(
        **_BASE, head_dim=32, moe_intermediate_size=32, n_routed_experts=EXPERTS
    ),
    "glm4_moe": lambda: Glm4MoeConfig(
        **_BASE | {"num_hidden_layers": 3},
        head_dim=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=EXPERTS,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_BASE | {"num_hidden_layers": 3},
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=EXPERTS,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        num_mtp_layers=0,
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **{k: v for k, v in _BASE.items() if k != "num_hidden_layers"},
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        head_dim=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_routed_experts=EXPERTS,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_BASE,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=EXPERTS,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_BASE,
        head_dim=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=EXPERTS,
    ),
    "mixtral": lambda: MixtralConfig(
        **_BASE, intermediate_size=32, num_local_experts=EXPERTS
    ),
    "olmoe": lambda: OlmoeConfig(**_BASE, intermediate_size=32, num_experts=EXPERTS),
    "granitemoe": lambda: GraniteMoeConfig(
        **_BASE, intermediate_size=32, num_local_experts=EXPERTS
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_BASE, head_dim=32, intermediate_size=32, num_local_experts=EXPERTS
    ),
    "llama": lambda: LlamaConfig(
        **{k: v for k, v in _BASE.items() if k != "num_experts_per_tok"},
        intermediate_size=64,
    ),
}
MOE_FAMILIES = [name for name in CONFIGS if name != "llama"]
MOE_LAYERS = {name: 2 for name in MOE_FAMILIES}
BLOCKS = MOE_LAYERS | {"glm4_moe": 3, "deepseek_v3": 3, "nemotron_h": 4}


def tiny_model(family, seed=0, **overrides):
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


@contextmanager
def bfloat16():
    """Let AutoRound tune in bfloat16 on every CPU, which torch can, slowly.

    On one without bfloat16 instructions it tunes in float32, and cannot stream a
    checkpoint that is stored in 16 bits.
    """
    device = get_ar_device("cpu")
    supported = device.supports_bf16()
    device._bf16_supported = True
    try:
        yield
    finally:
        device._bf16_supported = supported


def tiny_tokenizer():
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=alphabet[0], pad_token=alphabet[0]
    )


# Every part off: AutoRound's own algorithm.
PLAIN = {"router_weight": 0, "next_router_weight": 0, "realign_routers": False}

# How every tiny model goes through AutoRound; a test adds what it is about.
RUN = {
    "nsamples": 8,
    "seqlen": SEQLEN,
    "batch_size": 4,
    "device_map": "cpu",
    "enable_torch_compile": False,  # needs a C++ compiler on the CPU
}


def in_bfloat16(model):
    """As models are published: everything but the correction bias in bfloat16."""
    biases = {n: b for n, b in model.named_buffers() if "correction_bias" in n}
    model = model.bfloat16()
    for name, bias in biases.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, bias.float())
    return model


def save(family, folder, seed=0):
    """A checkpoint on disk, with its tokenizer, as a user has it."""
    in_bfloat16(tiny_model(family, seed)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def calibration(samples=8, seqlen=SEQLEN, seed=0):
    """Token ids as AutoRound takes them: a list of (1, seqlen) tensors."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (samples, seqlen), generator=generator)
    return list(ids.split(1))


def save_text(path, samples=16):
    """The same as a local file for AutoRound's own data loading."""
    generator = random.Random(0)
    with path.open("w") as file:
        for _ in range(samples):
            text = "".join(chr(generator.randrange(33, 127)) for _ in range(SEQLEN * 2))
            file.write(json.dumps({"text": text}) + "\n")
    return str(path)


_TERM = r"(?P<{0}0>\S+) -> (?P<{0}1>\S+)"
_REACH = (
    r"\(weight (?P<{0}>\S+), reaches (?P<{1}>\d+) of (?P<{2}>\d+) quantized layers\)"
)
BLOCK_LINE = re.compile(
    r"vsraq: (?P<block>\S+): iter 0 -> (?P<best>\d+): reconstruction "
    + _TERM.format("r")
    + r"(, router "
    + _TERM.format("z")
    + " "
    + _REACH.format("weight", "reached", "quantized")
    + r")?(, next router "
    + _TERM.format("n")
    + " "
    + _REACH.format("next_weight", "next_reached", "next_quantized")
    + ")?$"
)


def block_lines(messages):
    """What the log says of each block, by name."""
    return [match.groupdict() for m in messages if (match := BLOCK_LINE.match(m))]


class LogLines(logging.Handler):
    """The messages of our logger, whatever AutoRound's logger does with them."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("autoround.vsraq").addHandler(self)
        return self.messages

    def __exit__(self, *_):
        logging.getLogger("autoround.vsraq").removeHandler(self)


def refit_samples(count=16, tokens=48):
    """What `refit_router` takes: router inputs, other logits, no mask."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, tokens, 64, generator=generator)
    z = x @ torch.randn(64, EXPERTS, generator=generator)
    return [(inputs, logits, None) for inputs, logits in zip(x, z, strict=True)]
