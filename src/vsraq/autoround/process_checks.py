# SPDX-License-Identifier: Apache-2.0
"""Checks that several processes can tune one model together.

All processes have to call a check together, and all of them raise; only
`check_exporter` is for one process alone.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from auto_round import envs
from torch import Tensor, nn

from vsraq.processes import gather, is_first_process, process_count
from vsraq.realignment.record import tensor_bytes

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

logger = logging.getLogger("autoround.vsraq")

_SAMPLED = 1024  # values of a tensor that its digest reads
_SHOWN = 60  # characters of a setting in a message
_ONLY_THE_FIRST_EXPORTS = (
    "this process would export too, and transformers writes weights in the first one "
    "only; what they tune is the same; allowed is quantize() in all of them, and an "
    "export (save_quantized or quantize_and_save) where dist.get_rank() == 0"
)


def check_processes(
    settings: Mapping[str, str],
    samples: Sequence[Tensor],
    folder: str | None,
    composer: "AlgorithmComposer | None",
    outside: Iterable[str] = (),
) -> None:
    """Refuse several processes that cannot tune one model together.

    Args:
        settings: What decides the tuned weights, as text.
        samples: The first block's inputs, one for each calibration sample of this
            process.
        folder: Where this process exports to, or None.
        composer: AutoRound's, None for single blocks.
        outside: Layers outside of the blocks that are tuned.

    Raises:
        NotImplementedError: An algorithm before this one finds its parameters on the
            samples of each process alone, a layer outside of the blocks is tuned, or
            `AR_RESUME_DIR` is set.
        ValueError: Their settings, models or numbers of tokens differ, they have
            the same samples, or a process other than the first exports.
    """
    if process_count() == 1:
        return
    # each process has its own samples, and so its own mask
    _check_settings({n: v for n, v in settings.items() if n != "token_mask"})
    before = [type(p).__name__ for p in composer.preprocessors] if composer else []
    if any(gather(before)):
        raise NotImplementedError(
            f"world_size={process_count()} with {', '.join(before)}: every process "
            "would find its own scales; allowed are rotations, or one process"
        )
    _check_samples(samples)
    _check_exports(folder)
    layers = list(outside)
    if any(gather(layers)):
        raise NotImplementedError(
            f"world_size={process_count()} with {', '.join(layers)}: AutoRound tunes "
            "layers outside of the blocks without the gradients of the other "
            "processes; allowed are blocks, so pass quant_lm_head=False, or one process"
        )


def _check_settings(settings: Mapping[str, str]) -> None:
    everywhere = gather(dict(settings))
    for name in dict.fromkeys(chain.from_iterable(everywhere)):
        values = [str(other.get(name)) for other in everywhere]
        if len(set(values)) > 1:
            shown = [v if len(v) <= _SHOWN else f"{v[:_SHOWN]}..." for v in values]
            raise ValueError(
                f"{name}: the processes have {', '.join(shown)}, by rank; "
                "allowed is the same in all of them"
            )


def _check_samples(samples: Sequence[Tensor]) -> None:
    counts = gather(len(samples))
    if len(set(counts)) > 1:
        raise ValueError(
            f"nsamples: the processes have {counts} calibration samples, by rank; "
            "allowed are as many in each, because they take every step together; drop "
            "the last ones"
        )
    tokens = gather(sum(sample.shape[1] for sample in samples))
    if len(set(tokens)) > 1:
        raise ValueError(
            f"seqlen: the processes have {tokens} calibration tokens, by rank; allowed "
            "are as many in each, because each has an equal share in every step"
        )
    everywhere = gather([_digest([sample]) for sample in samples])
    seen = [frozenset(hashes) for hashes in everywhere]
    shared = sum(map(len, seen)) - len(frozenset().union(*seen))
    if len(set(seen)) < len(seen):
        raise ValueError(
            "dataset: several processes have the same calibration samples, which "
            "would count several times; allowed are different ones in each, such as "
            "samples[rank::world_size]"
        )
    if shared:
        logger.warning(
            "vsraq: %d calibration samples are also in another process, and count "
            "again",
            shared,
        )


def _check_exports(folder: str | None) -> None:
    if any(gather(bool(envs.AR_RESUME_DIR))):
        raise NotImplementedError(
            f"AR_RESUME_DIR with world_size={process_count()}: only the first process "
            "exports, so the others could not be resumed; unset it"
        )
    ranks = [rank for rank, path in enumerate(gather(folder)) if path and rank > 0]
    if ranks:
        raise ValueError(f"rank={ranks[0]}: {_ONLY_THE_FIRST_EXPORTS}")


def check_exporter() -> None:
    """Refuse an export by a process other than the first.

    `save_pretrained` of transformers 5 writes weights in the first only, so the folder
    would be left without them.

    Raises:
        ValueError: This is not the first process.
    """
    if not is_first_process():
        raise ValueError(f"rank={dist.get_rank()}: {_ONLY_THE_FIRST_EXPORTS}")


def check_equal_weights(name: str, block: nn.Module) -> None:
    """Refuse to go on with a tuned block whose weights differ in the processes.

    No known cause makes them differ; other versions or devices might.

    Args:
        name: The block's name in the model.
        block: The tuned block.

    Raises:
        RuntimeError: They differ.
    """
    if process_count() == 1:
        return
    tensors = {
        tensor_name: tensor
        for tensor_name, tensor in _tensors_of(block)
        if not tensor.is_meta
    }
    hashes = {
        n: hashlib.sha256(tensor_bytes(t)).digest()[:8] for n, t in tensors.items()
    }
    everywhere = gather(hashes)
    names = dict.fromkeys(chain.from_iterable(everywhere))
    other = [n for n in names if len({one.get(n) for one in everywhere}) > 1]
    if other:
        raise RuntimeError(
            f"block {name}: the processes have tuned {len(other)} of {len(names)} "
            f"tensors to different values ({', '.join(other[:3])}, ...); allowed are "
            "equal ones; use the same versions and kind of device in all of them, or "
            "one process"
        )


def model_settings(model: nn.Module, seqlen: int | None) -> dict[str, str]:
    """Collect what else has to be the same in all processes, as text."""
    schemes = sorted(
        f"{name} {[getattr(m, key, None) for key in _SCHEME]}"
        for name, m in model.named_modules()
        if hasattr(m, "bits")
    )
    return {
        "seqlen": str(seqlen),
        "model": _digest(chain.from_iterable(_tensors_of(model))),
        "bits of its layers": _digest(schemes),
    }


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


_SCHEME = ("bits", "group_size", "sym", "data_type", "act_bits", "act_data_type")


def _digest(values: Iterable[Any]) -> str:
    """Hash texts, and some values of each tensor."""
    digest = hashlib.sha256()
    for value in values:
        if not isinstance(value, Tensor):
            digest.update(str(value).encode())
            continue
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            flat = value.detach().flatten()
            every = max(1, flat.numel() // _SAMPLED)
            digest.update(tensor_bytes(flat[::every].to(torch.float32)))
    return digest.hexdigest()[:16]
