# SPDX-License-Identifier: Apache-2.0
"""How much memory this process has had at once."""

import sys
from importlib.util import find_spec
from typing import Any

import torch


def peak_mebibytes() -> dict[str, Any]:
    """Return the peaks of this process since it started, in MiB.

    Returns:
        "host", the largest resident set, None on Windows; and "devices", by CUDA device
        the most that torch had allocated, empty without one.
    """
    devices = {}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            if allocated := torch.cuda.max_memory_allocated(index):
                devices[f"cuda:{index}"] = round(allocated / 2**20, 1)
    return {"host": _host(), "devices": devices}


def _host() -> float | None:
    if find_spec("resource") is None:  # only Unix has it
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
