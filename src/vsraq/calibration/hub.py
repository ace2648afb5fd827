# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set: streamed from the hub or a folder, in an order that a seed draws.

A stream that breaks is opened again and goes on where it was. What cannot be helped by
trying again (a gated set, no network) ends with what to do about it.
"""

import logging
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vsraq.calibration.sources import Source

logger = logging.getLogger("autoround.vsraq")

FOLDER = "VSRAQ_DATASETS"  # of copies of the sets, as OWNER/NAME
BUFFER = 1_000  # rows among which a stream is shuffled, on top of its files
WAITS = (2.0, 8.0)  # seconds before another try, on top of those of the hub's client
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP


def rows(source: Source, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a source, shuffled; never more is read than is asked for.

    Args:
        source: What to read.
        seed: Draws the order of the files, and of the rows within `BUFFER`.

    Raises:
        ConnectionError: The hub could not be reached.
        PermissionError: The data set is gated.
        FileNotFoundError: There is no such file or data set.
        ValueError: The data set has another layout, or the file cannot be read.
    """
    position, waits = 0, iter(WAITS)
    while True:
        try:
            for row in islice(_open(source, seed), position, None):
                position += 1
                yield row
            return
        except Exception as error:
            wait = next(waits, None) if _may_pass(error) else None
            if wait is None:
                raise _explained(source, error) from error
            logger.warning(
                "vsraq: %s could not be read (%s); another try in %g s",
                source.repo,
                type(error).__name__,
                wait,
            )
            time.sleep(wait)


def _open(source: Source, seed: int) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    if source.is_file:
        kind = "parquet" if source.repo.endswith(".parquet") else "json"
        data = load_dataset(kind, data_files=source.repo, split="train", streaming=True)
    else:
        data = load_dataset(
            _place(source.repo), source.config, split=source.split, streaming=True
        )
    yield from data.shuffle(seed=seed, buffer_size=BUFFER)


def _place(repo: str) -> str:
    """Return where a data set is: a folder with copies, if there is one, or the hub."""
    root = os.environ.get(FOLDER)
    if not root:
        return repo
    copy = Path(root).expanduser() / repo
    if not copy.is_dir():
        raise FileNotFoundError(
            f"{FOLDER}={root!r}: {copy} is missing; put the set there with `hf "
            f"download {repo} --repo-type dataset --local-dir {copy}`, or unset "
            f"{FOLDER}"
        )
    return str(copy)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _is_network(error: BaseException) -> bool:
    """Whether an exception is one of a connection, of whatever HTTP library."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or (
        module in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp")
        and _status(error) is None
    )


def _may_pass(error: BaseException) -> bool:
    """Whether the same may work a little later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = list(_chain(error))
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or _is_offline():
        return False
    return any(_is_network(e) or _status(e) in _PASSING for e in chain)


def _is_offline() -> bool:
    import datasets
    import huggingface_hub

    return bool(
        huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
    )


def _explained(source: Source, error: Exception) -> Exception:
    """Return an error that says what to do."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    name = f"dataset={source.repo!r}"
    if isinstance(error, FileNotFoundError) and FOLDER in str(error):
        return error
    if source.is_file:
        if not Path(source.repo).is_file():
            return FileNotFoundError(
                f"{name}: no such file; allowed is a .jsonl, .json or .parquet file"
            )
        return ValueError(
            f"{name}: it cannot be read ({_first_line(error)}); allowed is a file "
            "whose rows all have the same fields"
        )
    chain = list(_chain(error))
    if any(isinstance(e, GatedRepoError) or "gated dataset" in str(e) for e in chain):
        return PermissionError(
            f"{name}: the data set is gated; accept its terms at {source.page}, then "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    if any(_is_network(e) or _status(e) in _PASSING for e in chain):
        why = "HF_HUB_OFFLINE is set; unset it"
        if not _is_offline():
            why = (
                f"{len(WAITS) + 1} tries failed ({type(error).__name__}); check the "
                "network and the proxy (HTTPS_PROXY, HF_ENDPOINT)"
            )
        return ConnectionError(
            f"{name}: {source.page} could not be reached: {why}, or copy the set with "
            f"`hf download {source.repo} --repo-type dataset --local-dir "
            f"DIR/{source.repo}` and set {FOLDER}=DIR"
        )
    if isinstance(error, DatasetNotFoundError):
        return FileNotFoundError(
            f"{name}: not found at {source.page}, or not with these rights; look at "
            "that page, and log in with `hf auth login` if it is private"
        )
    return ValueError(
        f"{name}: config {source.config!r}, split {source.split!r} cannot be read "
        f"({_first_line(error)}); compare with {source.page}, whose layout may have "
        "changed"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
