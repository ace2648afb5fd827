# SPDX-License-Identifier: Apache-2.0
"""One message for a disk that is full or read-only, whoever was writing.

safetensors reports it as a SafetensorError, tokenizers as an Exception, `torch.save` as
a RuntimeError, all without the file; and AutoRound only warns about some.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vsraq.run_inside import run_inside

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


class DiskError(OSError):
    """A disk that cannot be written, with the folder and the remedy."""


def _disk_errno(error: BaseException) -> int | None:
    """Return the errno of a disk error, or None if it is another error."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _NO_ROOM + _NOT_ALLOWED else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1]) if int(found[1]) in _NO_ROOM + _NOT_ALLOWED else None
    # the second is what PyTorch says when it closes the file after the first
    if isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter|inline_container", str(error)
    ):
        return errno.ENOSPC
    return None


class _Swallowed(logging.Handler):
    """A handler that keeps disk errors which AutoRound only warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: list[Exception] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the first argument of a message that is such an error."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.errors += [
            error
            for error in arguments
            if isinstance(error, Exception) and _disk_errno(error) is not None
        ]


@contextmanager
def _none_swallowed() -> Iterator[None]:
    """Raise the first error of the disk that was only a warning."""
    handler = _Swallowed()
    logger = logging.getLogger("autoround")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if handler.errors:
        raise handler.errors[0]


@contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Explain a disk error: which folder, and what to do.

    Args:
        folder: Of the export.

    Raises:
        DiskError: Instead of what was raised, if that came from the disk.
    """
    try:
        with _none_swallowed():
            yield
    except Exception as error:
        number = _disk_errno(error)
        if number is None or isinstance(error, DiskError):
            raise
        where = [folder]
        remedy = "make room, or export to another disk, and run it again"
        if resume_dir := os.environ.get("AR_RESUME_DIR"):
            where.append(f"AR_RESUME_DIR={resume_dir!r}")
            remedy = "make room and run the same command again: it resumes"
        raise DiskError(
            number,
            f"{os.strerror(number)} while writing to {' or '.join(where)} ({error}); "
            f"what is written stays; {remedy}",
        ) from error


def explain_disk_errors(orchestrator: Any) -> None:
    """Explain the disk errors of this run of AutoRound, which has no seam for it."""
    for method in ("quantize", "save_quantized"):
        run_inside(
            orchestrator, method, lambda: disk_errors(str(orchestrator.output_dir))
        )
