# SPDX-License-Identifier: Apache-2.0
"""Refuse several processes that would not tune one model together.

All processes have to make a check together, and all of them raise; only `claim_folder`
is for one alone.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from auto_round import envs
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from vsraq.processes import gather, process_count
from vsraq.realignment_record import tensor_bytes

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

logger = logging.getLogger("autoround.vsraq")

_SAMPLED = 1024  # values of a tensor that tell it from others
_SHOWN = 60  # characters of a setting


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
            samples of each process alone, or a layer outside of the blocks is tuned.
        ValueError: Their settings, models or numbers of samples differ, their samples
            do not, or they write into the same folder.
    """
    if process_count() == 1:
        return
    # own samples have a mask of their own
    _check_settings({n: v for n, v in settings.items() if n != "token_mask"})
    before = [type(p).__name__ for p in composer.preprocessors] if composer else []
    if any(gather(before)):
        raise NotImplementedError(
            f"world_size={process_count()} with {', '.join(before)}: every process "
            "would find its own scales; allowed are rotations, or one process"
        )
    _check_samples(samples)
    _check_folders({"output_dir": folder, "AR_RESUME_DIR": envs.AR_RESUME_DIR or None})
    layers = list(outside)
    if any(gather(layers)):
        raise NotImplementedError(
            f"world_size={process_count()} with {', '.join(layers)}: AutoRound tunes "
            "layers outside of the blocks without the gradients of the other "
            "processes; allowed are blocks, so pass quant_lm_head=False, or one process"
        )


def _check_settings(own: Mapping[str, str]) -> None:
    everywhere = gather(dict(own))
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
    seen = [frozenset(own) for own in gather([_digest([sample]) for sample in samples])]
    shared = sum(map(len, seen)) - len(frozenset().union(*seen))
    if len(set(seen)) < len(seen):
        raise ValueError(
            "dataset: several processes have the same calibration samples, which "
            "would count as often; allowed are own ones for each, such as "
            "samples[rank::world_size]"
        )
    if shared:
        logger.warning(
            "vsraq: %d calibration samples are those of another process too, and count "
            "once more",
            shared,
        )


def _check_folders(folders: Mapping[str, str | None]) -> None:
    for name, mine in folders.items():
        paths = gather(None if mine is None else os.path.realpath(mine))
        if len(set(paths) - {None}) < len([path for path in paths if path]):
            raise ValueError(
                f"{name}={str(mine)!r}: several processes would write the same files; "
                "allowed is a folder for each, such as its name with the rank behind "
                "it; what they export is the same, so keep any of them"
            )


def check_progress(done: int) -> None:
    """Refuse to go on where the processes have tuned different numbers of blocks.

    Args:
        done: Blocks that this process has tuned before it was killed.

    Raises:
        ValueError: Others have tuned more, or fewer.
    """
    counts = gather(done)
    if len(set(counts)) > 1:
        raise ValueError(
            f"AR_RESUME_DIR: the processes have tuned {counts} blocks, by rank, before "
            "they ended; allowed are as many in each, because they tune every block "
            "together; start anew with an empty AR_RESUME_DIR and an empty output "
            "folder for each"
        )


def check_equal_weights(name: str, block: nn.Module) -> None:
    """Refuse to go on with a tuned block whose weights differ in the processes.

    Nothing that is known makes them differ. Other versions or devices might.

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
    own = {n: hashlib.sha256(tensor_bytes(t)).digest()[:8] for n, t in tensors.items()}
    everywhere = gather(own)
    names = dict.fromkeys(chain.from_iterable(everywhere))
    other = [n for n in names if len({one.get(n) for one in everywhere}) > 1]
    if other:
        raise RuntimeError(
            f"block {name}: the processes have tuned {len(other)} of {len(names)} "
            f"tensors to other values ({', '.join(other[:3])}, ...); allowed are equal "
            "ones; use the same versions and kind of device in all of them, or one "
            "process"
        )


def claim_folder(folder: str | Path) -> None:
    """Refuse that two processes export to one folder.

    No process waits here for another: one of them may export alone.

    Args:
        folder: Where this process is about to export to.

    Raises:
        ValueError: Another process has exported to it.
    """
    if process_count() == 1:
        return
    path, rank = os.path.realpath(folder), str(dist.get_rank())
    owner = _get_default_store().compare_set(f"vsraq/export/{path}", "", rank).decode()
    if owner != rank:
        raise ValueError(
            f"output_dir={str(folder)!r}: the process of rank {owner} exports to it; "
            "allowed is a folder for each; what they export is the same, so one export "
            "is enough: if dist.get_rank() == 0"
        )


def model_settings(model: nn.Module, seqlen: int | None) -> dict[str, str]:
    """What else has to be the same in all processes, as text."""
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
    """Of texts, and of some values of each tensor."""
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
