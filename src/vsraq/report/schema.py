# SPDX-License-Identifier: Apache-2.0
"""What the files of a comparison, a replay and a run hold.

Units: divergences and NLL in nats, shares in [0, 1], sizes in MiB (2^20 bytes), times
in seconds. E experts, K top-k.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

RESULTS_FILE = "results.json"
TOKENS_FILE = "tokens.safetensors"
REPLAY_FILE = "replay.json"
RUN_FILE = "vsraq_run.json"


class _Table(BaseModel):
    """A part of a file; keys that are not known are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


_T = TypeVar("_T", bound=_Table)


class Interval(_Table):
    """A value and its 95 % interval (bootstrap over sequences).

    Attributes:
        value: None where there is nothing to take a share of.
        low: The interval's lower end.
        high: Its upper end.
    """

    value: float | None
    low: float | None
    high: float | None


_OF_LAYERS = (
    *("jaccard", "routing_shift", "weights_only", "order_shift", "drop_inject"),
    *("inside_2k", "inside_3k"),
)
_OF_METHODS = (
    *("perplexity", "excess_nll", "kl", "jsd", "sampled_jsd", "top1_agreement"),
    *_OF_LAYERS,
    *("region_a", "region_b", "region_c", "region_d"),
)
_HISTOGRAMS = ("sampled_jsd", "jsd", "kl", "routing_shift")


def _has(*names: str) -> AfterValidator:
    def check(values: Mapping[str, Any]) -> Mapping[str, Any]:
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"lacks {', '.join(missing)}")
        return values

    return AfterValidator(check)


class Histogram(_Table):
    """Counts of tokens between edges, and of those that lie beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int = 0
    above: int = 0

    @property
    def total(self) -> int:
        """All tokens, also those beyond the edges."""
        return sum(self.counts) + self.below + self.above


class Layer(_Table):
    """A router of the full-precision model; `load` has tokens per expert, E."""

    name: str
    block: int
    top_k: int
    num_experts: int
    load: tuple[int, ...]


class LayerResult(_Table):
    """One router of a quantized model.

    Attributes:
        name: The router's.
        metrics: See `Interval`.
        dropped_ranks: Dropped experts by full-precision rank 1...K.
        injected_ranks: Injected experts by full-precision rank K+1...E.
        load: Tokens per expert, E.
    """

    name: str
    metrics: Annotated[dict[str, Interval], _has(*_OF_LAYERS)]
    dropped_ranks: tuple[int, ...]
    injected_ranks: tuple[int, ...]
    load: tuple[int, ...]


class MethodResult(_Table):
    """One quantized model."""

    source: str
    mebibytes: float | None
    tokens_per_second: float
    metrics: Annotated[dict[str, Interval], _has(*_OF_METHODS)]
    layers: tuple[LayerResult, ...]
    histograms: Annotated[dict[str, Histogram], _has(*_HISTOGRAMS)]


class FullPrecision(_Table):
    """The model that the others are compared with."""

    source: str
    mebibytes: float | None
    perplexity: Interval
    tokens_per_second: float


class Data(_Table):
    """The text: windows of `seqlen` tokens."""

    source: str
    tokens: int
    sequences: int
    seqlen: int


class Sampling(_Table):
    """How candidates are chosen for the Sampled-JSD."""

    temperature: float
    top_k: int | None
    top_p: float | None
    source: str


class Thresholds(_Table):
    """Above these, a token's value is high."""

    sampled_jsd: float
    routing_shift: float


class Results(_Table):
    """results.json of `vsraq compare`."""

    format: Literal["vsraq-compare/1"]
    created: str
    versions: dict[str, str]
    data: Data
    sampling: Sampling
    thresholds: Thresholds
    full_precision: FullPrecision
    layers: tuple[Layer, ...]
    methods: Annotated[dict[str, MethodResult], Field(min_length=1)]


class Replay(_Table):
    """replay.json: the quantized model with full precision's routing on some tokens.

    `change` counts the chosen tokens by Sampled-JSD after - before.
    """

    format: Literal["vsraq-replay/1"]
    method: str
    tokens: int
    chosen: int
    region: str
    before: Annotated[dict[str, Interval], _has("sampled_jsd")]
    after: Annotated[dict[str, Interval], _has("sampled_jsd")]
    improved: Interval
    change: Histogram


class RunRouter(_Table):
    """A router of a tuned block; pairs are before and after its re-fit."""

    name: str
    refit: bool = False
    logit_error: tuple[float | None, float | None] | None = None
    jaccard: tuple[float | None, float | None] | None = None


# null is a loss that was not finite
_Loss = Annotated[float, BeforeValidator(lambda v: math.nan if v is None else v)]


class RunBlock(_Table):
    """A tuned block; `losses` has a value per iteration for each term."""

    name: str
    seconds: float | None = None
    iterations: int | None = None
    best_iteration: int | None = None
    losses: dict[str, tuple[_Loss, ...]] = {}
    weights: dict[str, float | None] = {}
    routers: tuple[RunRouter, ...] = ()


class Run(_Table):
    """vsraq_run.json, which a run writes beside its export."""

    format: Literal["vsraq-run/1"]
    created: str
    versions: dict[str, str]
    model: str
    scheme: str
    seconds: dict[str, float | None] = {}
    peak_mebibytes: dict[str, Any] = {}
    blocks: tuple[RunBlock, ...]
    coverage: dict[str, tuple[int, ...]] | None = None


def read_table(kind: type[_T], path: Path) -> _T:
    """Read a file of one of these kinds.

    Args:
        kind: `Results`, `Replay` or `Run`.
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else; the message names the place.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return kind.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"])) or "the file"
        reason = f"{place}: {fault['msg']}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(
        f"path={str(path)!r}: {reason}; allowed is a file that this version of vsraq "
        "has written; write it again"
    )
