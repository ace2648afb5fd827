# SPDX-License-Identifier: Apache-2.0
"""Models on the papers' tasks: WikiText-2, and lm-evaluation-harness."""

from vsraq.evaluation.evaluate_models import evaluate
from vsraq.evaluation.results import Evaluation

__all__ = ["Evaluation", "evaluate"]
