# SPDX-License-Identifier: Apache-2.0
"""Files of our own that hold tensors: safetensors with a format in its metadata."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vsraq.whole_file import write_whole

_FORMAT = "format"


def write_tensor_file(
    path: str | Path,
    format: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file, completely or not at all.

    Args:
        path: The file; its folder must exist.
        format: What it is, with a version.
        tensors: By name.
        metadata: What else there is to say.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(Path(path), save(dict(tensors), {_FORMAT: format, **metadata}))


def read_tensor_file(
    path: str | Path,
    format: str,
    refused: str,
    names: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensor_file` has written.

    Args:
        path: The file.
        format: What it has to be.
        refused: What an error says: which file, what is allowed, and what to do.
        names: Tensors to read; None reads all.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get(_FORMAT) != format:
                raise ValueError(f"{refused} (format={found.get(_FORMAT)!r})")
            read = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in read}, found
    except SafetensorError as error:
        raise ValueError(f"{refused} ({error})") from error
