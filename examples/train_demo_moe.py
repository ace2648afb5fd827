# SPDX-License-Identifier: Apache-2.0
"""Train the small MoE that `vsraq demo` quantizes: Solar-Open architecture, real text.

Run it from the repository: `python examples/train_demo_moe.py`. It writes the model
(bfloat16 safetensors, config, tokenizer) and prints the figures that the demo's
README quotes; `--report` prints them again for the model that is there.

Balancing is loss-free (arXiv 2408.15664): the correction bias of an expert rises while
it gets fewer tokens than the mean, so that the experts which are really selected differ
from a plain sort of the logits.
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
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SolarOpenConfig,
    SolarOpenForCausalLM,
)

from vsraq.analysis import compare
from vsraq.demo.run import (
    HELDOUT_WINDOWS,
    SEQLEN,
    load_demo_model,
    token_stream,
    token_windows,
)
from vsraq.demo.text import documents

BATCH = 16
EOS = "<|endoftext|>"


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


def build(tokenizer: PreTrainedTokenizerFast) -> SolarOpenForCausalLM:
    config = SolarOpenConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=32,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return SolarOpenForCausalLM(config)


class LoadBalancer:
    """Counts tokens per expert and moves each correction bias against the load."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = [layer.mlp.gate for layer in model.model.layers]
        self.counts = [torch.zeros(gate.num_experts) for gate in self.gates]
        for gate, count in zip(self.gates, self.counts, strict=True):
            gate.register_forward_hook(partial(self._count, count))

    @staticmethod
    def _count(count: torch.Tensor, _gate, _inputs, output) -> None:
        count += torch.bincount(output[2].flatten(), minlength=len(count))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for gate, count in zip(self.gates, self.counts, strict=True):
            gate.e_score_correction_bias += rate * (count.mean() - count).sign()
            count.zero_()


def nll(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean next-token negative log-likelihood (nats) over (N, SEQLEN) windows."""
    model.eval()
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for ids in windows.split(BATCH)]
    model.train()
    weights = [len(ids) for ids in windows.split(BATCH)]
    return sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)


def train(output: Path, steps: int, peak_lr: float, vocab_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(vocab_size)
    stream = token_stream(tokenizer, "train")
    monitor = token_stream(tokenizer, "calibration")
    monitor = monitor[: 32 * SEQLEN].view(-1, SEQLEN)
    model = build(tokenizer)
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
    for gate in balancer.gates:  # the one tensor that the architecture keeps in float32
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    model.save_pretrained(output)
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
    own = compare(model, model, heldout.split(BATCH))
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
    shifted = compare(rounded, model, heldout.split(BATCH))
    size = sum(file.stat().st_size for file in path.iterdir())
    bias = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]
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
    arguments = parser.parse_args()
    if not arguments.report:
        train(
            arguments.output,
            arguments.steps,
            arguments.lr,
            arguments.vocab_size,
            arguments.seed,
        )
    report(arguments.output)
