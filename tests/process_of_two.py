"""One of two processes that tune together; run by test_several_processes.py.

    python process_of_two.py FOLDER RANK

AutoRound gives DDP the device ids ["cpu"], which torch refuses: it takes None there. So
here DDP gets None, and nothing else is changed. AutoRound's other way, for several
devices in one process, runs on the CPU as it is.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["AR_WORK_SPACE"] = tempfile.mkdtemp(prefix="vsraq-tests-")

import torch
import torch.distributed as dist
import torch.nn.parallel as parallel
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

import tiny
from vsraq import VSRAQConfig
from vsraq.realignment import refit_router
from vsraq.routers import correction_bias, find_routers

# the second does not exist, and nothing is put there
SEVERAL_DEVICES = {"device_map": "cpu,other"}
ITERS = 8


class CpuDDP(parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)


def own_samples(rank, **kwargs):
    return tiny.calibration(samples=16, **kwargs)[rank::2]


def autoround(model, config, dataset, scheme="W4A16", **kwargs):
    arguments = tiny.RUN | {"tokenizer": tiny.tiny_tokenizer()} | kwargs
    return AutoRound(
        model, scheme=scheme, alg_configs=config, dataset=dataset, **arguments
    )


def tune(model, *args, **kwargs):
    """Tuned weights and activation scales, and what the log says."""
    with tiny.LogLines() as lines:
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
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def recipe(samples, seed=42):
    """The default recipe; the run, and how far held-out logits are from the model's."""
    model = tiny.in_bfloat16(tiny.tiny_model("solar_open"))
    held_out = torch.cat(tiny.calibration(samples=32, seed=1))
    with torch.no_grad():
        expected = model(input_ids=held_out).logits.float().log_softmax(-1)
    run = autoround(model, VSRAQConfig(iters=ITERS), samples, seed=seed)
    quantized, _ = run.quantize()
    with torch.no_grad():
        found = quantized(input_ids=held_out).logits.float().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    return run, divergence.item()


def export(rank, folder):
    """The default recipe, exported by each process into a folder of its own."""
    with tiny.LogLines() as lines:
        run, divergence = recipe(own_samples(rank))
    run.save_quantized(str(folder / f"rank{rank}"), format="auto_round")
    return {"log": lines, "divergence": divergence}


def uneven(rank):
    """Samples of one token, so that some experts get none in one process."""
    return tune(
        tiny.tiny_model("solar_open", n_routed_experts=32),
        VSRAQConfig(iters=3, not_use_best_mse=True),
        own_samples(rank, seqlen=2),
        seqlen=2,
        **SEVERAL_DEVICES,
    )


def refit(rank):
    """One router, re-fitted on half of the samples by each process."""
    model = tiny.tiny_model("solar_open")
    router = find_routers(model)[0]
    module = model.get_submodule(router.name)
    report = refit_router(
        router,
        module,
        tiny.refit_samples()[rank::2],
        bias=correction_bias(model, router),
    )
    return {"weight": module.weight.detach(), "report": report}


def refusals(rank, folder):
    model = tiny.tiny_model("solar_open")
    own = own_samples(rank)

    def run(config, samples, *args, **kwargs):
        config = config if config is not None else VSRAQConfig(iters=1)
        return message_of(
            lambda: autoround(model, config, samples, **kwargs).quantize()
        )

    def export_to_one_folder():
        same = autoround(model, VSRAQConfig(iters=1), own)
        same.quantize_and_save(str(folder / "same"), "auto_round")

    return {
        "settings": run(VSRAQConfig(iters=1 + rank), own),
        "samples": run(None, own[: 8 - rank]),
        "folder": message_of(export_to_one_folder),
        "awq": run(["awq", VSRAQConfig(iters=1)], own),
    }


def main(folder, rank):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    parallel.DistributedDataParallel = CpuDDP
    steps = {
        "plain": lambda: tune(
            tiny.tiny_model("solar_open"),
            SignRoundConfig(iters=ITERS),
            own_samples(rank),
        ),
        "export": lambda: export(rank, folder),
        "uneven": lambda: uneven(rank),
        "nvfp4": lambda: tune(
            tiny.tiny_model("solar_open"),
            VSRAQConfig(iters=2),
            own_samples(rank),
            scheme="NVFP4",
        ),
        "refit": lambda: refit(rank),
        "refusals": lambda: refusals(rank, folder),
    }
    for name, step in steps.items():
        torch.save(step(), folder / f"{name}{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
