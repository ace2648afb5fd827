# SPDX-License-Identifier: Apache-2.0
"""Compare a quantized model with the full-precision one."""

from vsraq.analysis.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
