# SPDX-License-Identifier: Apache-2.0
"""Read an exported checkpoint and verify it against the model it came from.

The tensors are read from the safetensors files themselves and decoded here, so that
no loader of another library can hide what is missing.
"""

from vsraq.checkpoint.supported import check_formats
from vsraq.checkpoint.verify import (
    Checkpoint,
    CheckpointError,
    Verification,
    load_model,
    verify,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Verification",
    "check_formats",
    "load_model",
    "verify",
]
