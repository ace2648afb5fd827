# SPDX-License-Identifier: Apache-2.0
"""One of two processes that tune together; run by test_several_processes.py.

    python process_of_two.py FOLDER RANK

AutoRound gives DDP the device ids ["cpu"], which torch refuses: it takes None there. So
here DDP gets None, and nothing else is changed. AutoRound's other way, for several
devices in one process, runs on the CPU as it is.
"""

import gc
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ["AR_WORK_SPACE"] = tempfile.mkdtemp(prefix="vsraq-tests-")

import torch
import torch.distributed as dist
import torch.nn.parallel as parallel
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

import tiny
from vsraq import VSRAQConfig
from vsraq.autoround.process_checks import check_equal_weights
from vsraq.realignment import refit_router
from vsraq.routers import find_routers
from vsraq.tokens import Sampling, TokenMask

# the second does not exist, and nothing is put there
SEVERAL_DEVICES = {"device_map": "cpu,other"}
ITERS = 8
# Experts that get tokens in one process only: few tokens for many experts.
FEW_TOKENS = {"n_routed_experts": 32}
FEW = 2


class CpuDDP(parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)


class Lines(tiny.LogLines):
    """The messages of AutoRound's logger too."""

    def __enter__(self):
        logging.getLogger("autoround").addHandler(self)
        return super().__enter__()

    def __exit__(self, *error):
        logging.getLogger("autoround").removeHandler(self)
        super().__exit__(*error)


def own_samples(rank, **kwargs):
    return tiny.calibration(samples=16, **kwargs)[rank::2]


def autoround(model, config, dataset, scheme="W4A16", **kwargs):
    arguments = tiny.RUN | {"tokenizer": tiny.tiny_tokenizer()} | kwargs
    return AutoRound(
        model, scheme=scheme, alg_configs=config, dataset=dataset, **arguments
    )


def tune(model, *args, **kwargs):
    """Tuned weights and activation scales, and what the log says."""
    with Lines() as lines:
        quantized, _ = autoround(model, *args, **kwargs).quantize()
    tensors = dict(quantized.state_dict())
    for name, module in quantized.named_modules():
        layer = getattr(module, "orig_layer", module)
        if isinstance(getattr(layer, "act_max", None), torch.Tensor):
            tensors[f"{name}.act_max"] = layer.act_max
    return {"tensors": tensors, "log": lines}


def message_of(run):
    try:
        run()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


# that of W4A16, 128, does not divide the tiny layers' inputs
EXPORTED = {"group_size": 32}


def recipe(samples, seed=42, **kwargs):
    """The default recipe; the run, and how far held-out logits are from the model's."""
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    held_out = torch.cat(tiny.calibration(samples=32, seed=1))
    with torch.no_grad():
        expected = model(input_ids=held_out).logits.float().log_softmax(-1)
    arguments = {"seed": seed, **EXPORTED, **kwargs}
    run = autoround(model, VSRAQConfig(iters=ITERS), samples, **arguments)
    quantized, _ = run.quantize()
    with torch.no_grad():
        found = quantized(input_ids=held_out).logits.float().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    return run, divergence.item()


def export(rank, folder):
    """The default recipe, and an export by each process."""
    with tiny.LogLines() as lines:
        run, divergence = recipe(own_samples(rank))

    tensors = dict(run.model.state_dict())  # before they are packed
    again = message_of(
        lambda: run.save_quantized(str(folder / f"rank{rank}"), format="auto_round")
    )
    return {"log": lines, "divergence": divergence, "again": again, "tensors": tensors}


def export_at_once(rank, folder):
    """One process packs and writes block by block, the other tunes."""
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    config = VSRAQConfig(iters=2)
    with tiny.bfloat16():
        run = autoround(model, config, own_samples(rank), **EXPORTED)
        if rank == 0:
            run.quantize_and_save(str(folder / "at_once"), "auto_round")
        else:
            run.quantize()
    return {n: m.weight for n, m in run.model.named_modules() if n.endswith("gate")}


def few_tokens(samples, scheme="W4A16", **kwargs):
    """Samples of two tokens, so that some experts get none in one process."""
    return tune(
        tiny.tiny_model("solar_open", **FEW_TOKENS),
        VSRAQConfig(iters=4, not_use_best_mse=True),
        samples,
        scheme=scheme,
        seqlen=FEW,
        **kwargs,
    )


def token_mask(samples, shares):
    """A mask that selects the first share of each sample's tokens."""
    tokens = torch.arange(tiny.SEQLEN)
    return TokenMask.of(
        [tokens < share * tiny.SEQLEN for share in shares],
        samples,
        model="solar_open",
        scheme="W4A16",
        tau=1e-4,
        shift_threshold=None,
        sampling=Sampling(),
    )


# of two processes, or of one with all samples
SHARES = [0.9, 0.1] * 4


def first_loss(samples, shares, **kwargs):
    """The losses of the first step, on the tokens that a mask selects."""
    config = VSRAQConfig(
        iters=1,
        objective="sra",
        router_weight=1000.0,
        next_router_weight=0,
        realign_routers=False,
        token_mask=token_mask(samples, shares),
    )
    count = len(samples)
    model = tiny.tiny_model("solar_open")
    lines = tune(model, config, samples, nsamples=count, **kwargs)["log"]
    # AutoRound's line: "... loss iter 0: 1.234e-05 -> iter 0: ..."
    found = (re.search(r"loss iter 0: (\S+) ->", line) for line in lines)
    return [float(match[1]) for match in found if match]


def refit(rank):
    """One router, re-fitted on half of the samples by each process."""
    results = {}
    for weighting in ("uniform", "boundary"):
        model = tiny.tiny_model("solar_open")
        router = find_routers(model)[0]
        module = model.get_submodule(router.name)
        report = refit_router(
            router.bind(model),
            tiny.refit_samples()[rank::2],
            weighting=weighting,
        )
        results[weighting] = {"weight": module.weight.detach(), "report": report}
    return results


def refusals(rank, folder):
    own = own_samples(rank)
    model = tiny.tiny_model("solar_open")

    def run(samples=own, model=model, config=None, **kwargs):
        config = config if config is not None else VSRAQConfig(iters=1)
        return message_of(
            lambda: autoround(model, config, samples, **kwargs).quantize()
        )

    def export_from_both():
        run = autoround(model, VSRAQConfig(iters=1), own)
        run.quantize_and_save(str(folder / f"both{rank}"), "auto_round")

    messages = {
        "settings": run(config=VSRAQConfig(iters=1 + rank)),
        "seed": run(seed=rank),
        "seqlen": run(seqlen=tiny.SEQLEN - 8 * rank),
        "samples": run(own[: 8 - rank]),
        "text": run(tiny.calibration(samples=8)),
        "model": run(model=tiny.tiny_model("solar_open", seed=rank)),
        "bits": run(layer_config={"self_attn": {"bits": 4 + 4 * rank}}),
        "head": run(layer_config={"lm_head": {"bits": 4}}),
        "folder": message_of(export_from_both),
        "awq": run(config=["awq", VSRAQConfig(iters=1)]),
        "weights": message_of(
            lambda: check_equal_weights("layers.0", torch.nn.Linear(2, 2 + rank))
        ),
        "mask": run(
            config=VSRAQConfig(
                iters=1, objective="sra", token_mask=token_mask(own, [0.5] + [0] * 7)
            )
        ),
    }
    os.environ["AR_RESUME_DIR"] = str(folder / f"resume{rank}")
    messages["resume"] = run()
    del os.environ["AR_RESUME_DIR"]
    return messages


def main(folder, rank):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    parallel.DistributedDataParallel = CpuDDP
    few = own_samples(rank, seqlen=FEW)
    # AutoRound collects garbage a dozen times a run; skip what the imports have left.
    gc.collect()
    gc.freeze()
    steps = {
        "plain": lambda: tune(
            tiny.tiny_model("solar_open"),
            SignRoundConfig(iters=ITERS),
            own_samples(rank),
        ),
        "export": lambda: export(rank, folder),
        "at_once": lambda: export_at_once(rank, folder),
        "uneven": lambda: few_tokens(few, **SEVERAL_DEVICES),
        "nvfp4": lambda: few_tokens(few, "NVFP4"),
        "extension": lambda: tune(
            tiny.tiny_model("solar_open", n_routed_experts=16, num_hidden_layers=1),
            VSRAQConfig(iters=2, enable_alg_ext=True),
            few,
            seqlen=FEW,
        ),
        "masked": lambda: first_loss(
            tiny.calibration()[rank::2], SHARES[rank::2], batch_size=4
        ),
        "refit": lambda: refit(rank),
        "refusals": lambda: refusals(rank, folder),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        torch.save(step(), folder / f"{name}{rank}.pt")
        print(name, time.perf_counter() - started, flush=True)
        gc.collect()
        gc.freeze()  # DDP imports torch._dynamo when it is first used
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
