# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time per iteration of one block of Solar-Open-100B's shape.

    python benchmarks/at_size.py                          # 2 cores, 8 GiB, minutes
    python benchmarks/at_size.py --scale 1                # real width, 16 experts
    python benchmarks/at_size.py --device cuda --scale 1 --experts 128 \\
        --nsamples 128 --seqlen 2048 --batch-size 8 --iters 20

A model of two blocks with random weights: the first is tuned, the second is the next
router's. The width is that of the public configuration, divided by `--scale`. Every
case is a process of its own. On a CPU the peak is that of the process (its largest
resident set), on an accelerator what was allocated there at most; a CPU without
bfloat16 arithmetic tunes in float32, as AutoRound does.

"kept" is what the router terms and the re-fit keep while a block is tuned, computed for
512 x 2048 calibration tokens and all 128 experts: 6 bytes per rank that a loss reads,
and the logits that the re-fit reads, which have a limit.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from typing import Any

import torch
from torch import nn

AT_SIZE_TOKENS = 512 * 2048
VOCABULARY = 1024
PART_OFF = {"router_weight": 0.0, "next_router_weight": 0.0, "realign_routers": False}
# name -> options of VSRAQConfig besides those parts; None is plain AutoRound
CASES: dict[str, dict[str, Any] | None] = {
    "AutoRound": None,
    "own term": {"router_weight": 0.1},
    "next router": {"next_router_weight": 0.1},
    "both, automatic weights": {"router_weight": "auto", "next_router_weight": "auto"},
    "re-fit, uniform": {"realign_routers": True},
    "re-fit, weighted": {"realign_routers": {"weighting": "boundary"}},
    "own term, token selection": {"router_weight": 0.1, "token_selection": True},
    "default": {},
}


def block_model(experts: int, scale: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Two blocks of Solar-Open, each value random, on the CPU."""
    from transformers import AutoModelForCausalLM, SolarOpenConfig

    public = SolarOpenConfig()
    config = SolarOpenConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        hidden_size=public.hidden_size // scale,
        num_attention_heads=public.num_attention_heads // scale,
        num_key_value_heads=max(public.num_key_value_heads // scale, 1),
        head_dim=public.head_dim,
        moe_intermediate_size=public.moe_intermediate_size // scale,
        n_routed_experts=experts,
        num_experts_per_tok=min(public.num_experts_per_tok, experts // 2),
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    on_cpu = AutoModelForCausalLM.from_config  # buffers that no checkpoint holds
    rotary = on_cpu(_smaller(config)).model.rotary_emb
    model = model.to_empty(device="cpu")
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        values.normal_(std=0.02, generator=generator)
        parameter.data.copy_(
            values.add_(1.0) if name.endswith("norm.weight") else values
        )
    for buffer in model.buffers():
        buffer.zero_()
    model.model.rotary_emb = rotary
    return model.eval()


def _smaller(config: Any) -> Any:
    """The same positions in a model that costs nothing to make."""
    small = config.__class__(**config.to_dict())
    small.num_hidden_layers, small.n_routed_experts = 0, 2
    return small


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from vsraq import VSRAQConfig
    from vsraq.demo.run import load_tokenizer

    options = CASES[case]
    config = SignRoundConfig(iters=arguments.iters)
    if options is not None:
        parts = PART_OFF | options if options else {}
        config = VSRAQConfig(iters=arguments.iters, **parts)
    device = arguments.device
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.nsamples, arguments.seqlen)
    samples = torch.randint(1, VOCABULARY, shape, generator=generator).split(1)
    run = AutoRound(
        block_model(arguments.experts, arguments.scale, torch.bfloat16, device),
        tokenizer=load_tokenizer(),
        scheme="W4A16",
        alg_configs=config,
        dataset=list(samples),
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
        device_map=device,
        low_gpu_mem_usage=device != "cpu",
        enable_torch_compile=False,
        to_quant_block_names=[["model.layers.0"]],
    )
    steps: list[float] = []

    def note(*_: Any) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        steps.append(time.perf_counter())

    handle = register_optimizer_step_post_hook(note)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run.quantize()
    seconds = time.perf_counter() - started
    handle.remove()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if sys.platform == "darwin":
        peak //= 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    return {
        "peak": peak,
        "iteration": statistics.median(gaps),
        "seconds": seconds,
        "kept": kept_bytes(config),
    }


def kept_bytes(config: Any) -> int:
    """What is kept of a whole block at 512 x 2048 tokens, by arithmetic."""
    alignment = getattr(config, "alignment", None)
    if alignment is None:
        return 0
    from transformers import SolarOpenConfig

    public = SolarOpenConfig()
    from vsraq.realignment.logits import REFIT_BYTES

    top_k, experts = public.num_experts_per_tok, public.n_routed_experts
    bytes_per_token = 0
    if alignment.router_weight != 0:
        bytes_per_token += 6 * config.alignment.own_objective.ranks(top_k, experts)
    if alignment.next_router_weight != 0:
        bytes_per_token += 6 * config.alignment.next_objective.ranks(top_k, experts)
    kept = bytes_per_token * AT_SIZE_TOKENS
    if alignment.realign_routers:
        kept += min(2 * experts * AT_SIZE_TOKENS, REFIT_BYTES)
    return kept


def _child(case: str, arguments: argparse.Namespace, answer: Any) -> None:
    try:
        result = run_case(case, arguments)
    except ValueError as error:  # a refusal is an answer
        result = {"refused": str(error)}
    except BaseException:
        result = {"refused": traceback.format_exc(limit=3)}
    answer.send(json.dumps(result))


def in_a_process(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, arguments, send))
    process.start()
    send.close()
    try:
        result: dict[str, Any] = json.loads(receive.recv())
    except EOFError:
        result = {"refused": "the process was killed, by the system's memory limit?"}
    process.join()
    return result


def format_row(case: str, own: dict[str, Any], plain: dict[str, Any]) -> str:
    if "refused" in own:
        return f"{case:27}  refused: {own['refused']}"
    peak, iteration = own["peak"] / 2**20, own["iteration"] * 1e3
    ratios = (own[n] / plain[n] if n in plain else 1.0 for n in ("peak", "iteration"))
    peak_ratio, time_ratio = ratios
    return (
        f"{case:27}{peak:10.0f}{peak_ratio:8.3f}{iteration:12.1f}{time_ratio:8.3f}"
        f"{own['seconds']:10.1f}{own['kept'] / 1e6:10.0f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=int, default=16, help="of 128")
    parser.add_argument("--scale", type=int, default=2, help="divides the widths")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--iters", type=int, default=6)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="vsraq-size-"))
    print(
        f"Solar-Open-100B block, width / {arguments.scale}, {arguments.experts} of 128 "
        f"experts, {arguments.nsamples} x {arguments.seqlen} tokens, batch "
        f"{arguments.batch_size}, {arguments.iters} iterations, {arguments.device}"
    )
    print(
        f"{'':27}{'peak MiB':>10}{'ratio':>8}{'ms / iter':>12}{'ratio':>8}"
        f"{'seconds':>10}{'kept MB':>10}"
    )
    plain: dict[str, Any] = {}
    for case in arguments.cases:
        own = in_a_process(case, arguments)
        if case == "AutoRound" and "refused" not in own:
            plain = own
        print(format_row(case, own, plain), flush=True)
