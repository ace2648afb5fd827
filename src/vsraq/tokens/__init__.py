# SPDX-License-Identifier: Apache-2.0
"""Tokens: which of them count for the routers, and how that is found."""

from vsraq.tokens.mask import TokenMask, check_mask_file, check_thresholds, hash_tokens
from vsraq.tokens.sampling import Sampling

__all__ = [
    "Sampling",
    "TokenMask",
    "check_mask_file",
    "check_thresholds",
    "hash_tokens",
]
