# SPDX-License-Identifier: Apache-2.0
"""Train the small MoE models of the demo and of the benchmarks on real text.

Run it from the repository: `python examples/train_demo_moe.py`. It writes the model
(bfloat16 safetensors, config, tokenizer) and prints the figures that the demo's
README quotes; `--report` prints them again for the model that is there.

`--architecture` chooses what is trained: `solar_open` (sigmoid router with a correction
bias, the embedded model, with a tokenizer of its own), or for the benchmarks
`qwen3_moe` (softmax router) and `nemotron_h` (Mamba, attention and MoE layers), which
take the embedded model's tokenizer.

Balancing is loss-free (arXiv 2408.15664): the correction bias of an expert rises while
it gets fewer tokens than the mean, so that the experts which are really selected differ
from a plain sort of the logits. A router without that bias is balanced by the auxiliary
loss of its architecture.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from auto_round import AutoRound
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronHConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    SolarOpenConfig,
)

from vsraq.analysis import closeness
from vsraq.demo.run import (
    HELDOUT_WINDOWS,
    SEQLEN,
    load_demo_model,
    load_tokenizer,
    token_stream,
    token_windows,
)
from vsraq.demo.text import documents
from vsraq.routers import (
    BoundRouter,
    find_routers,
)

BATCH = 16
EOS = "<|endoftext|>"
NO_AUXILIARY = {"output_router_logits": False}


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents("train"), vocab_size, special_tokens=[EOS], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def build_config(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> PretrainedConfig:
    """Six MoE layers of 32 experts, 4 per token, in every architecture."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if architecture == "solar_open":
        return SolarOpenConfig(
            **common,
            num_hidden_layers=6,
            n_routed_experts=32,
            n_shared_experts=1,
            rope_parameters=rope,
        )
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(
            **common,
            num_hidden_layers=6,
            num_experts=32,
            intermediate_size=128,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            rope_parameters=rope,
        )
    mamba, moe, attention = "linear_attention", "moe", "full_attention"
    return NemotronHConfig(
        **common,
        layers_block_type=[mamba, moe, mamba, moe, attention, moe] * 2,
        intermediate_size=128,
        n_routed_experts=32,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=28,  # in_proj then has 576 rows; AutoRound asks for 32 n
        n_groups=1,
        chunk_size=32,
    )


class LoadBalancer:
    """Counts tokens per expert and moves each correction bias against the load."""

    def __init__(self, model: nn.Module) -> None:
        routers = find_routers(model)
        self.gates = [model.get_submodule(router.name) for router in routers]
        device = next(model.parameters()).device
        self.counts = [torch.zeros(r.num_experts, device=device) for r in routers]
        for gate, router, count in zip(self.gates, routers, self.counts, strict=True):
            bound = router.bind(model)
            gate.register_forward_pre_hook(partial(self._count, bound, count))

    @staticmethod
    @torch.no_grad()
    def _count(
        router: BoundRouter,
        count: torch.Tensor,
        _gate: nn.Module,
        inputs,
    ) -> None:
        chosen = router.select(router.logits(inputs[0]))
        count += torch.bincount(chosen.flatten(), minlength=len(count))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for gate, count in zip(self.gates, self.counts, strict=True):
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias += rate * (count.mean() - count).sign()
            count.zero_()


def nll(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean next-token negative log-likelihood (nats) over (N, SEQLEN) windows."""
    model.eval()
    with torch.no_grad():
        losses = [
            model(ids, labels=ids, **NO_AUXILIARY).loss.item()
            for ids in windows.split(BATCH)
        ]
    model.train()
    weights = [len(ids) for ids in windows.split(BATCH)]
    return sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)


def train(
    architecture: str,
    output: Path,
    steps: int,
    peak_lr: float,
    vocab_size: int,
    seed: int,
    device: str,
) -> None:
    torch.manual_seed(seed)
    if architecture == "solar_open":
        tokenizer = train_tokenizer(vocab_size)
    else:
        tokenizer = load_tokenizer()
    stream = token_stream(tokenizer, "train").to(device)
    monitor = token_stream(tokenizer, "calibration").to(device)
    monitor = monitor[: 32 * SEQLEN].view(-1, SEQLEN)
    config = build_config(architecture, tokenizer)
    model = AutoModelForCausalLM.from_config(config).to(device)
    balancer = LoadBalancer(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": gains}],
        lr=peak_lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(stream):,} train tokens")
    started = time.monotonic()
    for step in range(steps):
        warmup = min(1.0, (step + 1) / 100)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warmup * (0.02 + 0.98 * decay)
        starts = torch.randint(len(stream) - SEQLEN, (BATCH,))
        ids = torch.stack([stream[s : s + SEQLEN] for s in starts])
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balancer.step(rate=2e-3 * (0.05 + 0.95 * decay))
        if (step + 1) % 100 == 0 or step == 0:
            monitored = nll(model, monitor) if (step + 1) % 100 == 0 else math.nan
            print(
                f"step {step + 1:5d}  train {loss.item():.3f}  "
                f"calibration {monitored:.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.to(torch.bfloat16)
    for gate in balancer.gates:  # the one tensor that the architectures keep in float32
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    model.config.output_router_logits = False
    model.cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"trained in {time.monotonic() - started:.0f} s, saved to {output}")


def unigram_perplexity(train_ids: torch.Tensor, windows: torch.Tensor) -> float:
    """Perplexity of the unigram model (add-one smoothing) on the same next tokens."""
    size = int(train_ids.max()) + 1
    counts = torch.bincount(train_ids, minlength=size).double() + 1
    log_p = (counts / counts.sum()).log()
    return math.exp(-log_p[windows[:, 1:].flatten()].mean().item())


@torch.no_grad()
def least_load(model: nn.Module, windows: torch.Tensor) -> float:
    """Load of the least used expert of any layer, as a fraction of the mean load."""
    balancer = LoadBalancer(model)
    for ids in windows.split(BATCH):
        model(ids)
    return min((count.min() / count.mean()).item() for count in balancer.counts)


def report(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    heldout = token_windows(tokenizer, "heldout", HELDOUT_WINDOWS)
    model = load_demo_model(path)
    own = closeness(model, model, heldout.split(BATCH))
    unigram = unigram_perplexity(token_stream(tokenizer, "train"), heldout)
    rounded = AutoRound(
        load_demo_model(path),
        tokenizer=tokenizer,
        scheme="W3A16",
        alg_configs="rtn",
        disable_opt_rtn=True,
        device_map="cpu",
    )
    rounded, _ = rounded.quantize()
    shifted = closeness(rounded, model, heldout.split(BATCH))
    size = sum(file.stat().st_size for file in path.iterdir())
    bias = [
        getattr(module, "e_score_correction_bias", torch.zeros(1))
        for module in map(model.get_submodule, [r.name for r in find_routers(model)])
    ]
    spread = max(b.max().item() - b.min().item() for b in bias)
    print(f"held-out perplexity              {own.perplexity:.2f}")
    print(f"unigram perplexity               {unigram:.1f}")
    print(f"ratio                            1/{unigram / own.perplexity:.1f}")
    print(f"least used expert / mean load    {least_load(model, heldout):.2f}")
    print(f"largest spread of the bias       {spread:.3f}")
    print(f"RTN W3A16 mean Jaccard           {shifted.mean_jaccard:.4f}")
    print(f"RTN W3A16 perplexity             {shifted.perplexity:.2f}")
    print(f"size of all files                {size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("src/vsraq/demo/model"))
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="figures only")
    parser.add_argument(
        "--architecture",
        default="solar_open",
        choices=["solar_open", "qwen3_moe", "nemotron_h"],
    )
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if not arguments.report:
        train(
            arguments.architecture,
            arguments.output,
            arguments.steps,
            arguments.lr,
            arguments.vocab_size,
            arguments.seed,
            arguments.device,
        )
    report(arguments.output)
