# SPDX-License-Identifier: Apache-2.0
"""The embedded small mixture-of-experts model and its text."""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Folder of the embedded model: safetensors, config and tokenizer."""
    return Path(__file__).with_name("model")
