# SPDX-License-Identifier: Apache-2.0
"""Read an exported checkpoint and verify it against the model it came from.

The tensors are read from the safetensors files themselves and decoded here, so that
no loader of another library can hide what is missing.
"""

from vsraq.checkpoint.faults import CheckpointError
from vsraq.checkpoint.formats import check_formats
from vsraq.checkpoint.load import load_model, local_folder
from vsraq.checkpoint.reader import Checkpoint
from vsraq.checkpoint.verify import Verification, verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Verification",
    "check_formats",
    "load_model",
    "local_folder",
    "verify",
]
