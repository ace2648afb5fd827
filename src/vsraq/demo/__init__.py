# SPDX-License-Identifier: Apache-2.0
"""The embedded small mixture-of-experts model and its text."""

from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Folder of the embedded model: safetensors, config and tokenizer."""
    with as_file(files("vsraq.demo") / "model") as path:
        return path
