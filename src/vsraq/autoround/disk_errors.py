# SPDX-License-Identifier: Apache-2.0
"""One message for a disk that is full or read-only, whoever was writing.

safetensors reports it as a SafetensorError, `torch.save` as a RuntimeError, both
without the file.
"""

import errno
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from auto_round import envs
from safetensors import SafetensorError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


class DiskError(OSError):
    """A disk that cannot be written, with the folder and the remedy."""


def _disk_errno(error: BaseException) -> int | None:
    """What the disk refused, or None if it was something else."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _NO_ROOM + _NOT_ALLOWED else None
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found else None
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
        return errno.ENOSPC
    return None


@contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Say where there is no room, and what to do.

    Args:
        folder: Of the export.

    Raises:
        DiskError: Instead of what was raised, if that came from the disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _disk_errno(error)
        if number is None or isinstance(error, DiskError):
            raise
        where = [folder]
        remedy = "make room, or export to another disk, and run it again"
        if envs.AR_RESUME_DIR:
            where.append(f"AR_RESUME_DIR={envs.AR_RESUME_DIR!r}")
            remedy = "make room and run the same command again: it resumes"
        raise DiskError(
            number,
            f"{os.strerror(number)} while writing to {' or '.join(where)} ({error}); "
            f"what is written stays; {remedy}",
        ) from error


def explain_disk_errors(orchestrator: Any) -> None:
    """Do so for this run of AutoRound, which has no seam for it."""
    for name in ("quantize", "save_quantized"):
        method: Callable[..., Any] = getattr(orchestrator, name)
        setattr(orchestrator, name, _explained(orchestrator, method))


def _explained(orchestrator: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with disk_errors(str(orchestrator.output_dir)):
            return method(*args, **kwargs)

    return call
