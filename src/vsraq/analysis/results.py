# SPDX-License-Identifier: Apache-2.0
"""What a comparison found, and the two files that hold it.

`results.json` has every figure, `tokens.safetensors` the values of some tokens.
docs/compare.md describes both.

Shapes: n sampled tokens, E experts, K top-k.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vsraq.analysis.intervals import Interval
from vsraq.analysis.tally import SAMPLED, Thresholds
from vsraq.json_file import read_json_file, write_json_file
from vsraq.whole_file import write_whole

FORMAT = "vsraq-compare/1"
RESULTS_FILE, TOKENS_FILE = "results.json", "tokens.safetensors"
LAYER_METRICS = (
    *("jaccard", "routing_shift", "weights_only", "order_shift", "drop_inject"),
    *("inside_2k", "inside_3k"),
)
METRICS = (
    *("perplexity", "excess_nll", "kl", "jsd", "sampled_jsd", "top1_agreement"),
    *LAYER_METRICS,
    *("region_a", "region_b", "region_c", "region_d"),
)

SamplingSource: TypeAlias = Literal["generation_config", "default", "given"]


@dataclass(frozen=True)
class DataUsed:
    """The text that models were compared on.

    Attributes:
        source: Where it comes from.
        tokens: All tokens.
        sequences: How many sequences they are in.
        seqlen: Tokens of the longest.
    """

    source: str
    tokens: int
    sequences: int
    seqlen: int


@dataclass(frozen=True)
class SamplingUsed:
    """How outputs are sampled, for Sampled-JSD; see `vsraq.tokens.Sampling`.

    Attributes:
        temperature: What the logits are divided by.
        top_k: How many candidates at most; 0 or None for all.
        top_p: Probability that they hold; None for all.
        source: Who says so.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    source: SamplingSource


@dataclass(frozen=True)
class FullPrecision:
    """The full-precision model.

    Attributes:
        source: Its path, or its class where it was in memory.
        mebibytes: Size of its safetensors files, MiB; None where it was in memory.
        perplexity: exp of the mean NLL of the next token.
        seconds: Wall time of its pass, without loading.
        tokens_per_second: Tokens by that time.
    """

    source: str
    mebibytes: float | None
    perplexity: Interval
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Layer:
    """A MoE layer in full precision.

    Attributes:
        name: Its router.
        block: Its decoder block; -1 where that is not known.
        top_k: K.
        num_experts: E.
        load: Tokens of each expert, E numbers.
    """

    name: str
    block: int
    top_k: int
    num_experts: int
    load: list[int]


@dataclass(frozen=True)
class MethodLayer:
    """A MoE layer of a quantized model.

    Attributes:
        name: Its router.
        metrics: By `LAYER_METRICS`.
        dropped_ranks: How often an expert of full-precision rank 1 ... K was not
            chosen, K numbers.
        injected_ranks: How often one of rank K + 1 ... E was, E - K numbers.
        load: Tokens of each expert, E numbers.
    """

    name: str
    metrics: dict[str, Interval]
    dropped_ranks: list[int]
    injected_ranks: list[int]
    load: list[int]


@dataclass(frozen=True)
class HistogramCounts:
    """How many tokens have which values.

    Attributes:
        edges: n + 1 ascending numbers.
        counts: Tokens of each bin, n numbers; a bin has its lower edge, the last both.
        below: Tokens below the first edge.
        above: Tokens above the last edge.
    """

    edges: list[float]
    counts: list[int]
    below: int
    above: int


@dataclass(frozen=True)
class Method:
    """A quantized model.

    Attributes:
        source: Its path, or its class where it was in memory.
        mebibytes: Size of its safetensors files, MiB; None where it was in memory.
        seconds: Wall time of its pass, without loading.
        tokens_per_second: Tokens by that time.
        metrics: By `METRICS`.
        layers: Its MoE layers, in order.
        histograms: Of each value of a sampled token.
    """

    source: str
    mebibytes: float | None
    seconds: float
    tokens_per_second: float
    metrics: dict[str, Interval]
    layers: list[MethodLayer]
    histograms: dict[str, HistogramCounts]


@dataclass(frozen=True)
class Results:
    """Everything in `results.json`.

    Attributes:
        created: When, UTC.
        versions: Of vsraq, torch and transformers.
        data: The text.
        sampling: How outputs are sampled.
        thresholds: What counts as high in the regions.
        full_precision: The full-precision model.
        layers: Its MoE layers, in order.
        methods: The quantized models, by name.
    """

    created: str
    versions: dict[str, str]
    data: DataUsed
    sampling: SamplingUsed
    thresholds: Thresholds
    full_precision: FullPrecision
    layers: list[Layer]
    methods: dict[str, Method]


@dataclass(frozen=True)
class Comparison(Results):
    """What a comparison found.

    Attributes:
        tokens: "sequence", "position" and "token", (n,) int32, and for each method
            "<method>/<value>", (n,) float32, with the values of `SAMPLED`.
    """

    tokens: Mapping[str, Tensor] = field(repr=False, compare=False)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write both files, each whole or not at all.

        Args:
            folder: It is made if it is not there.

        Returns:
            Paths of the results and of the tokens.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        results, tokens = self.paths(folder)
        write_whole(tokens, save(dict(self.tokens), {"format": FORMAT}))
        write_json_file(results, self.as_dict())
        return results, tokens

    @staticmethod
    def paths(folder: str | Path) -> tuple[Path, Path]:
        """Return where `save` writes the results and the tokens."""
        return Path(folder) / RESULTS_FILE, Path(folder) / TOKENS_FILE

    def as_dict(self) -> dict[str, Any]:
        """Return what `results.json` holds."""
        found = {n: v for n, v in vars(self).items() if n != "tokens"}
        return {"format": FORMAT} | asdict(Results(**found))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` has written.

        Args:
            folder: With both files.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: A file is not of this version.
        """
        path, tokens_path = cls.paths(folder)
        refused = (
            f"{str(path)!r}: no results of this version; allowed is a folder that "
            "`vsraq compare` has written, so run it again"
        )
        results = read_json_file(path, FORMAT, Results, refused)
        try:
            tokens = load_file(tokens_path)
        except SafetensorError as error:
            raise ValueError(f"{refused} ({' '.join(str(error).split())})") from error
        return cls(**vars(results), tokens=tokens)

    def __str__(self) -> str:
        return headline(self)


def headline(results: Results) -> str:
    """Format the most important figures as a table, a line per model."""
    columns = [
        *("perplexity", "excess_nll", "kl", "sampled_jsd", "top1_agreement"),
        *("jaccard", "routing_shift", "region_b"),
    ]
    fp = results.full_precision
    lines = [
        ["", "MiB", *columns],
        ["full precision", _size(fp.mebibytes), _short(fp.perplexity)],
    ]
    for name, method in results.methods.items():
        figures = [_short(method.metrics[column]) for column in columns]
        lines.append([name, _size(method.mebibytes), *figures])
    lines = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _short(interval: Interval) -> str:
    """The figure, and half the width of its interval."""
    if interval.value is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.4f}"
    return f"{interval.value:.4f} ±{(interval.high - interval.low) / 2:.4f}"


def _size(mebibytes: float | None) -> str:
    return "-" if mebibytes is None else f"{mebibytes:.2f}"


def token_values(
    sequence: Tensor,
    position: Tensor,
    token: Tensor,
    methods: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Collect what `tokens.safetensors` holds; arguments (n,) each."""
    places = {"sequence": sequence, "position": position, "token": token}
    values = {name: place.to(torch.int32) for name, place in places.items()}
    for method, sampled in methods.items():
        values |= {f"{method}/{name}": sampled[name].float() for name in SAMPLED}
    return values
