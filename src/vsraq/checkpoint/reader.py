# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: which files count, what lies in them, one tensor at a time.

`model.safetensors.index.json` decides which files and tensors count, as it does when a
model is served. Without it, only `model.safetensors` counts. Names, shapes and dtypes
come from the files' headers.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vsraq.checkpoint.faults import CheckpointError
from vsraq.checkpoint.schemes import Schemes

_SINGLE = "model.safetensors"
_INDEX = f"{_SINGLE}.index.json"


class Header(NamedTuple):
    """What a file's header says about a tensor.

    Attributes:
        shape: Its shape.
        dtype: Its dtype as safetensors names it: "BF16", "F8_E4M3", "I32".
    """

    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a checkpoint folder, read one at a time.

    Use it as a context manager.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        config: What config.json holds.
        faults: Faults that do not make it unreadable: files and tensors that the index
            does not name, and tensors that only the index names.
        missing: Those of the faults that are tensors that only the index names.

    Raises:
        FileNotFoundError: The folder has no config.json, no safetensors file that
            counts, or not all files of its index.
        CheckpointError: A file of it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(
                f"path={str(path)!r}: no config.json there; allowed is the folder of a "
                "saved model"
            )
        self.config: dict[str, Any] = self._read_json("config.json")
        self.faults: list[str] = []
        self.missing: list[str] = []
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}
        self._headers: dict[str, Header] = {}

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._owner.clear()

    def _open(self) -> None:
        found = {file.name for file in self.path.glob("*.safetensors")}
        index = self._read_index()
        if index is None and _SINGLE not in found:
            raise FileNotFoundError(
                f"path={str(self.path)!r}: neither {_INDEX} nor {_SINGLE} there; "
                "allowed is the folder of a model saved with safetensors"
            )
        files = sorted({_SINGLE} if index is None else set(index.values()))
        missing = [name for name in files if name not in found]
        if missing:
            raise FileNotFoundError(
                f"path={str(self.path)!r}: {_INDEX} names {', '.join(missing)}, not "
                "there; allowed is a complete checkpoint"
            )
        for name in sorted(found.difference(files)):
            self.faults.append(f"{name}: {self._names(index)} does not name this file")
        for name in files:
            self._open_file(name, index)
        for name, file in (index or {}).items():
            if name not in self._owner:
                self.missing.append(f"{name}: {_INDEX} says {file}, which lacks it")
        self.faults += self.missing

    @staticmethod
    def _names(index: Mapping[str, str] | None) -> str:
        return "a checkpoint without an index" if index is None else _INDEX

    def _open_file(self, name: str, index: Mapping[str, str] | None) -> None:
        try:
            opened = safe_open(self.path / name, framework="pt")
            handle = self._stack.enter_context(opened)
            keys = handle.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                self.path, [f"{name}: cannot be read ({error})"]
            ) from error
        for key in keys:
            if index is not None and index.get(key) != name:
                self.faults.append(f"{key}: in {name}, but {_INDEX} does not say so")
            else:
                self._owner[key] = handle

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(
                self.path, [f"{name}: cannot be read ({error})"]
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(
                self.path, [f"{name}: {type(content).__name__}, allowed is an object"]
            )
        return content

    def _read_index(self) -> dict[str, str] | None:
        if not (self.path / _INDEX).is_file():
            return None
        names = self._read_json(_INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(self.path, [f"{_INDEX}: it has no weight_map"])
        for tensor, file in names.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    self.path,
                    [f"{_INDEX}: {tensor} lies in {file!r}, which is not a file name"],
                )
        return names

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._owner[name].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                self.path, [f"{name}: cannot be read ({error})"]
            ) from error
        return tensor

    def header(self, name: str) -> Header:
        """Shape and dtype of a tensor, without reading it."""
        if name not in self._headers:
            view = self._owner[name].get_slice(name)
            self._headers[name] = Header(tuple(view.get_shape()), view.get_dtype())
        return self._headers[name]

    @property
    def quantization_config(self) -> dict[str, Any]:
        """`quantization_config` of config.json.

        Raises:
            ValueError: The checkpoint is not quantized.
        """
        config = self.config.get("quantization_config")
        if not isinstance(config, dict):
            raise ValueError(
                f"path={str(self.path)!r}: config.json has no quantization_config; "
                "allowed is a quantized export"
            )
        return config

    def suffixes(self) -> dict[str, set[str]]:
        """Tensors by what they belong to: {"a.b": {"qweight", "scales"}}."""
        belonging: dict[str, set[str]] = defaultdict(set)
        for name in self:
            owner, _, suffix = name.rpartition(".")
            belonging[owner].add(suffix)
        return belonging

    @cached_property
    def schemes(self) -> Schemes:
        """The scheme of each layer, as the config declares it.

        Raises:
            ValueError: The checkpoint is not quantized, or in another format.
            CheckpointError: The config contradicts itself, or lacks something.
        """
        return Schemes(self.path, self.quantization_config)

    def dequantize(self, layer: str) -> Tensor:
        """The weight of a quantized layer as numbers, float32, (out, in).

        Args:
            layer: The layer's name as stored, such as "model.layers.0.mlp.up_proj".

        Returns:
            The weight, computed in the export's own arithmetic.

        Raises:
            KeyError: The layer is not quantized, or a tensor of it is missing.
        """
        scheme = self.schemes(layer)
        if scheme is None:
            raise KeyError(f"{layer}: declared full precision")
        prefix = f"{layer}."
        tensors = {
            name.removeprefix(prefix): self[name]
            for name in self
            if name.startswith(prefix)
        }
        return scheme.format.dequantize(tensors, scheme)
