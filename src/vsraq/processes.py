# SPDX-License-Identifier: Apache-2.0
"""Sums over the processes that tune one model together, each on its own samples.

They are those of torch.distributed's default group. Without one, or with one process,
nothing is sent and values come back as they are. Every process of the group has to
make the same calls in the same order.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def process_count() -> int:
    """Return how many processes tune together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process is the one that reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum every process's tensor, with the same bits in all of them.

    Args:
        tensor: Of one shape and dtype in all processes, on any device.

    Returns:
        The same shape, dtype and device; without gradient.
    """
    if process_count() == 1:
        return tensor.detach()
    total = tensor.detach().to(_group_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Average every process's tensor; see `sum_over_processes`."""
    return sum_over_processes(tensor) / process_count()


def from_first_process(tensor: Tensor) -> Tensor:
    """Return the first process's tensor; all have the same shape and dtype."""
    if process_count() == 1:
        return tensor
    sent = tensor.detach().to(_group_device(), copy=True)
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def with_common_value(loss: Tensor) -> Tensor:
    """Give a scalar the mean of all processes as its value, and keep its gradient.

    Decisions by its value are then the same in all processes.
    """
    if process_count() == 1:
        return loss
    value = loss.detach().double()
    common = mean_over_processes(value).to(loss)
    # exactly that value, which adding the difference would round
    return _CommonValue.apply(loss, common)


def gather(value: T) -> list[T]:
    """Collect every process's value, any that can be pickled, by rank."""
    if process_count() == 1:
        return [value]
    values: list[T | None] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def _group_device() -> torch.device:
    """Return a device that the group can send tensors from."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "a group without a backend for the CPU is an accelerator's"
    return torch.device(kind.type, torch.accelerator.current_device_index())


class _CommonValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, _loss: Tensor, common: Tensor) -> Tensor:
        return common.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
