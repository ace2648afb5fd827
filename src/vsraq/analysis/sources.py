# SPDX-License-Identifier: Apache-2.0
"""A model to compare: a folder that is loaded for its pass only, or a live module."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from vsraq.checkpoint import load_model, local_folder
from vsraq.checkpoint.weight_files import weight_files

ModelOrPath: TypeAlias = nn.Module | str | Path
# as `device_map` of transformers
Device: TypeAlias = str | torch.device | dict[str, str | int | torch.device]


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded from folders.

    Attributes:
        dtype: What to compute in, such as "float32"; None takes the checkpoint's.
        device: Where to, such as "cuda:0", or "auto" for all devices, or a device by
            the name of the module; None is the CPU.
        trust_remote_code: As in transformers.
    """

    dtype: str | torch.dtype | None = None
    device: Device | None = None
    trust_remote_code: bool = False

    def keywords(self) -> dict[str, Any]:
        """Return keywords of `from_pretrained`."""
        given = {
            "dtype": self.dtype,
            "device_map": self.device,
            "trust_remote_code": self.trust_remote_code or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """What of them decides the numbers of a pass, as JSON has it."""
        dtype, device = self.dtype, self.device
        if isinstance(device, dict):
            placed: Any = {name: str(place) for name, place in device.items()}
        else:
            placed = None if device is None else str(device)
        return {
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "device": placed,
            "trust_remote_code": self.trust_remote_code,
        }


class ModelSource:
    """A model in memory, or the folder of one.

    Args:
        argument: What an error calls it.
        given: The module, the folder, or the name of a model in the hub's cache.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        TypeError: It is neither.
    """

    def __init__(self, argument: str, given: ModelOrPath) -> None:
        self.module = given if isinstance(given, nn.Module) else None
        self.folder: Path | None = None
        if isinstance(given, str | Path):
            self.folder = local_folder(given, argument)
            if not (self.folder / "config.json").is_file():
                raise FileNotFoundError(
                    f"{argument}={str(given)!r}: no config.json there; allowed is the "
                    "folder of a saved model"
                )
            self.label = str(given)
        elif self.module is not None:
            self.label = f"{type(given).__name__} in memory"
        else:
            raise TypeError(
                f"{argument}={type(given).__name__}: allowed is a model, or the path "
                "of one"
            )

    @property
    def mebibytes(self) -> float | None:
        """Size of its weight files, MiB; None for a module."""
        if self.folder is None:
            return None
        files = weight_files(self.folder)
        return sum(file.stat().st_size for file in files) / 2**20

    @property
    def is_quantized(self) -> bool:
        """Whether it is a folder whose config says that the weights are quantized."""
        if self.folder is None:
            return False
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return "quantization_config" in config

    def identity(self) -> dict[str, Any] | None:
        """What tells whether a model is still the same; None for a module.

        That is its path, and the size and the modification time of its weight files,
        of the files that say what is in them, and of its code.
        """
        if self.folder is None:
            return None
        described = [*self.folder.glob("*.json"), *self.folder.glob("*.py")]
        files = {path.name: path.stat() for path in sorted(described)}
        files |= {path.name: path.stat() for path in weight_files(self.folder)}
        return {
            "folder": str(self.folder.resolve()),
            "files": {
                n: [found.st_size, found.st_mtime_ns] for n, found in files.items()
            },
        }

    @contextmanager
    def opened(self, options: LoadOptions) -> Iterator[nn.Module]:
        """Yield the model; one that was loaded is freed afterwards."""
        if self.module is not None:
            yield self.module
            return
        assert self.folder is not None
        try:
            yield load_model(self.folder, **options.keywords())
        finally:
            free_memory()


def free_memory() -> None:
    """Give back what models that are gone have left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
