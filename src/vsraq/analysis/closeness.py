# SPDX-License-Identifier: Apache-2.0
"""The few figures of one comparison in memory, for loops over many models."""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vsraq.analysis.compare_models import run_models
from vsraq.analysis.fp_pass import FullPrecisionPass
from vsraq.analysis.preparation import Prepared, Settings
from vsraq.analysis.sources import ModelSource
from vsraq.analysis.text import read_text


@dataclass(frozen=True)
class Closeness:
    """Closeness of a quantized model to its full-precision original.

    Attributes:
        perplexity: exp of the mean next-token NLL of the quantized model.
        kl: Mean KL(fp || q) of the next-token distributions, nats.
        excess_nll: Mean next-token NLL minus that of the full-precision model, nats.
        excess_nll_error: Its standard error over the sequences; NaN for one sequence.
        jaccard: Mean Jaccard of the selected experts per MoE layer, by router name.
    """

    perplexity: float
    kl: float
    excess_nll: float
    excess_nll_error: float
    jaccard: dict[str, float]

    @property
    def mean_jaccard(self) -> float:
        """Mean over the MoE layers."""
        return sum(self.jaccard.values()) / len(self.jaccard)


def closeness(
    q_model: nn.Module, fp_model: nn.Module, batches: Iterable[Tensor]
) -> Closeness:
    """Compare two models in memory as `compare` does, without intervals and files.

    Args:
        q_model: The quantized model.
        fp_model: The full-precision model, of the same architecture.
        batches: Token ids, each (B, S), held out from calibration.

    Returns:
        The figures over all batches.

    Raises:
        ValueError: The models' routers differ, or there is no router or no batch.
    """
    text = read_text(list(batches), None, 0)
    settings = Settings()
    fp_source = ModelSource("fp_model", fp_model)
    sources = {"q_model": ModelSource("q_model", q_model)}
    with tempfile.TemporaryDirectory(prefix="vsraq-compare-") as folder:
        stored = FullPrecisionPass(Path(folder), text.tokens)
        ready = Prepared.of(fp_model, text, settings)
        run = run_models(ready, fp_source, sources, stored, settings)
    tally = run.tallies["q_model"]
    sums, tokens = tally.token_sums(), text.tokens
    excess = sums["excess_nll"] / sums["predicted"]
    spread = excess.std().item() if len(excess) > 1 else math.nan
    return Closeness(
        perplexity=math.exp(sums["q_nll"].sum() / sums["predicted"].sum()),
        kl=sums["kl"].sum().item() / tokens,
        excess_nll=(sums["excess_nll"].sum() / sums["predicted"].sum()).item(),
        excess_nll_error=spread / math.sqrt(len(excess)),
        jaccard={
            name: layer["jaccard"].sum().item() / tokens
            for name, layer in tally.layer_sums().items()
        },
    )
