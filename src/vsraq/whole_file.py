# SPDX-License-Identifier: Apache-2.0
"""Write a file whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is never seen half written.

    The old file stays until the new one is on the disk, even if the process or the
    machine dies.

    Args:
        path: The file; its folder must exist.
        content: Bytes, or text that is written as UTF-8.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # one name for all runs, so that a killed one leaves no more than one such file
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
