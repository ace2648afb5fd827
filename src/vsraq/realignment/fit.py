# SPDX-License-Identifier: Apache-2.0
"""Re-fit routers in closed form to what reaches them after quantization.

Routers stay in full precision, so their weights may move for free. With the router's
inputs X (T, H) on the quantized path and the full-precision logits Z (T, E), the
residual R = Z - (X W^T + b) is regressed on X,

    dW = argmin ||R - X dW^T||^2 + rho ||dW||^2,  rho = ridge * mean diag(X^T X),

and W becomes W + dW. One H x H system per router, from the streamed sums X^T X and
X^T R. With weights w (T, E) on the squared errors the system differs by expert,
X^T diag(w_e) X: E times the memory.

EAC-MoE trains the router by gradient toward the same end.

Shapes: T tokens, E experts, K top-k, H hidden width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from vsraq.block_stream import Path, open_paths
from vsraq.metrics import StreamingMean, jaccard
from vsraq.processes import from_first_process, process_count, sum_over_processes
from vsraq.realignment.error_weights import (
    Weighting,
    check_weighted_size,
    error_weights,
)
from vsraq.realignment.record import record_realignment, router_weight
from vsraq.routers import BoundRouter, find_routers

DEFAULT_RIDGE = 1e-3
_HELDOUT_EVERY = 8  # one calibration sample in 8 is held out, the others are fitted


class RidgeSums:
    """The sums of a ridge regression, streamed in float64.

    Args:
        hidden: H.
        num_experts: E.
        device: Where the sums are kept and the system is solved; the CPU for an
            accelerator other than CUDA, because many have no double precision.
        weighted: Whether `update` gets weights; X^T X is then (E, H, H).

    Raises:
        ValueError: Weighted sums would be too large; see `check_weighted_size`.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        device: torch.device | str = "cpu",
        *,
        weighted: bool = False,
    ) -> None:
        if torch.device(device).type != "cuda":
            device = "cpu"
        if weighted:
            check_weighted_size(hidden, num_experts)
        systems = num_experts if weighted else 1
        self.gram = torch.zeros(
            systems, hidden, hidden, dtype=torch.float64, device=device
        )
        self.moment = torch.zeros(
            num_experts, hidden, dtype=torch.float64, device=device
        )

    def update(
        self, inputs: Tensor, residual: Tensor, weights: Tensor | None = None
    ) -> None:
        """Add tokens: inputs (T, H), residual logits (T, E), their weights (T, E)."""
        # Products of one batch in float32, their sum over the batches in float64:
        # double precision products would cost 60 times as much on most GPUs.
        x = inputs.detach().float()
        r = residual.detach().to(x)
        device = self.gram.device
        if weights is None:
            self.gram += (x.T @ x).to(device)
            self.moment += (r.T @ x).to(device)
            return
        w = weights.detach().to(x)
        for expert, expert_weights in enumerate(w.T):  # E at once would be T x E x H
            self.gram[expert] += ((x * expert_weights[:, None]).T @ x).to(device)
        self.moment += ((r * w).T @ x).to(device)

    def sum_over_processes(self) -> None:
        """Add what other processes have seen; all of them have the same sums then."""
        if process_count() > 1:
            for part in (*self.gram, self.moment):  # one H x H at a time
                part.copy_(sum_over_processes(part))

    def solve(self, ridge: float = DEFAULT_RIDGE) -> Tensor:
        """Solve for the correction dW.

        Args:
            ridge: rho as a fraction of the mean diagonal of X^T X, > 0.

        Returns:
            (E, H), float64.

        Raises:
            ValueError: `ridge` is not positive, or no token was added.
            torch.linalg.LinAlgError: Inputs are not finite.
        """
        if not ridge > 0:
            raise ValueError(f"ridge={ridge!r}: allowed is a number > 0")
        if not self.gram.any():
            raise ValueError(
                "RidgeSums holds no token, or only zeros: update() it with the "
                "router's inputs first"
            )
        if len(self.gram) == 1:
            return self._solve(self.gram[0], self.moment.T, ridge).T
        # one system at a time: a batch of them would be E times H x H again
        columns = [
            self._solve(gram, moment[:, None], ridge)[:, 0]
            for gram, moment in zip(self.gram, self.moment, strict=True)
        ]
        return torch.stack(columns)

    @staticmethod
    def _solve(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
        scale = gram.diagonal().mean()
        if scale == 0:  # an expert whose errors have no weight anywhere
            return torch.zeros_like(moment)
        regular = gram.clone()
        regular.diagonal().add_(ridge * scale)
        return torch.cholesky_solve(moment, torch.linalg.cholesky(regular))


@dataclass(frozen=True)
class Refit:
    """Result of re-fitting one router, measured on held-out samples.

    Attributes:
        router: The router's name.
        before: Mean squared error of the logits, weighted as the fit, with the old
            weight.
        after: The same with the new weight, in the router's own dtype.
        before_jaccard: Overlap of the selected experts with full precision; NaN if the
            router's rule is unknown.
        after_jaccard: The same with the new weight.
        applied: Whether the router holds the new weight; False where it does not help.
    """

    router: str
    before: float
    after: float
    before_jaccard: float
    after_jaccard: float
    applied: bool

    def __str__(self) -> str:
        """Return one line for a log."""
        verdict = "re-fitted" if self.applied else "left alone, no gain"
        return (
            f"router {self.router} {verdict}: held-out logit error {self.before:.3e} "
            f"-> {self.after:.3e}, Jaccard {self.before_jaccard:.4f} -> "
            f"{self.after_jaccard:.4f}"
        )


@dataclass
class _Heldout:
    """Errors on the held-out samples."""

    error: StreamingMean = field(default_factory=StreamingMean)
    overlap: StreamingMean = field(default_factory=StreamingMean)

    def sum_over_processes(self) -> None:
        """Add the samples of other processes."""
        for mean in (self.error, self.overlap):
            sums = torch.tensor([mean.total, mean.count], dtype=torch.float64)
            total, count = sum_over_processes(sums).tolist()
            mean.total, mean.count = total, int(count)


@torch.no_grad()
def refit_router(
    router: BoundRouter,
    samples: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    *,
    ridge: float = DEFAULT_RIDGE,
    weighting: Weighting = "uniform",
) -> Refit:
    """Re-fit one router, and keep the new weight if held-out samples confirm it.

    One sample in eight is held out. The new weight is rounded to the router's dtype
    before it is judged, and it is kept only if the held-out error falls. The processes
    of a torch.distributed group re-fit together, each on its own samples: all of them
    have to call this, and all get the same weight.

    Args:
        router: Only the weight of its linear map changes; its dtype, shape and device
            stay.
        samples: Per calibration sample (X (T, H), Z (T, E), mask): the router's inputs
            on the quantized path, the full-precision logits, and which tokens count,
            (T,) or None.
        ridge: rho as a fraction of the mean diagonal of X^T X, > 0.
        weighting: Of the errors that are fitted and judged; see `error_weights`.

    Returns:
        What the re-fit did.

    Raises:
        ValueError: `ridge` is not positive, `weighting` is unknown, or there are fewer
            than two samples with tokens that count.
        RuntimeError: The system cannot be solved.
    """
    weight, rule = router.weight, router.description.rule
    weigh = partial(_weights_of, router, weighting)
    sums = RidgeSums(
        weight.shape[1],
        router.num_experts,
        weight.device,
        weighted=weighting != "uniform",
    )
    heldout: list[tuple[Tensor, Tensor]] = []
    count = 0
    for count, (inputs, target) in enumerate(_counted(weight.device, samples), 1):
        if count % _HELDOUT_EVERY == 2:  # the second, the tenth, ...
            # copies: a sample may be a view that keeps its whole batch alive
            heldout.append((inputs.to("cpu", copy=True), target.to("cpu", copy=True)))
        else:
            sums.update(inputs, target - router.logits(inputs), weigh(target))
    sums.sum_over_processes()
    counts = torch.tensor([count - len(heldout), len(heldout)])
    if not sum_over_processes(counts).all():
        raise ValueError(
            f"samples={count} with tokens that count, for router {router.name}: "
            "allowed are 2 or more, one of which decides whether the new weight is "
            "kept; calibrate on more samples, or pass realign_routers=False"
        )
    rows = weight[: router.num_experts]
    old = rows.clone()
    before = _judge(router, heldout, weigh)
    correction = _correction(router, sums, ridge)
    rows.copy_(old.to(correction) + correction)
    after = _judge(router, heldout, weigh)
    applied = after.error.compute() < before.error.compute()
    if not applied:
        rows.copy_(old)
    return Refit(
        router=router.name,
        before=before.error.compute(),
        after=after.error.compute(),
        before_jaccard=before.overlap.compute() if rule else math.nan,
        after_jaccard=after.overlap.compute() if rule else math.nan,
        applied=applied,
    )


def _counted(
    device: torch.device, samples: Iterable[tuple[Tensor, Tensor, Tensor | None]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and logits of the tokens that count, of samples that have some."""
    for inputs, target, mask in samples:
        inputs, target = inputs.to(device), target.to(device).float()
        if mask is not None:
            valid = mask.to(device).bool()
            inputs, target = inputs[valid], target[valid]
        if len(inputs) > 0:
            yield inputs, target


def _weights_of(
    router: BoundRouter, weighting: Weighting, target: Tensor
) -> Tensor | None:
    """Return how much each error counts, (T, E); None: all alike."""
    if weighting == "uniform":
        return None  # no scores are needed
    return error_weights(router.scores(target), router.top_k, weighting)


def _judge(
    router: BoundRouter,
    heldout: Iterable[tuple[Tensor, Tensor]],
    weigh: Callable[[Tensor], Tensor | None],
) -> _Heldout:
    """Measure the errors of a router as it is, on held-out samples."""
    result = _Heldout()
    for inputs, target in heldout:
        target = target.to(router.weight.device)
        logits = router.logits(inputs)
        error = (logits - target).square()
        weights = weigh(target)
        result.error.update(error if weights is None else error * weights)
        if router.description.rule is not None:  # else its choice is unknown
            chosen, wanted = router.select(logits), router.select(target)
            result.overlap.update(jaccard(chosen, wanted))
    result.sum_over_processes()
    return result


def _correction(router: BoundRouter, sums: "RidgeSums", ridge: float) -> Tensor:
    """Compute what is added to the weight, (E, H), the same in every process.

    Raises:
        RuntimeError: The system cannot be solved.
    """
    try:
        return from_first_process(sums.solve(ridge))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RuntimeError(
            f"router {router.name}: its inputs are not finite, or its re-fit is "
            f"singular ({error}); look for inf or NaN in the calibration inputs, pass "
            "a larger ridge, or do not re-fit it (realign_routers=False)"
        ) from error


@torch.no_grad()
def realign_routers(
    q_model: nn.Module,
    fp_model: nn.Module,
    samples: Sequence[Tensor],
    *,
    ridge: float = DEFAULT_RIDGE,
    weighting: Weighting = "uniform",
) -> tuple[Refit, ...]:
    """Re-fit the routers of a model that any tool has quantized, in place.

    Routers are re-fitted in order, each on what the ones before it now send. Both
    models run block by block, every block once and its part before the router twice.
    CPU memory holds the hidden states of all samples on both paths, and one sample in
    eight of one router. Where a block cannot be run alone, both models run from the
    start up to every router in turn, about L + 1 passes for L MoE layers, and the log
    says so.

    Args:
        q_model: The quantized causal language model; its routers change.
        fp_model: The full-precision model, of the same architecture.
        samples: Calibration token ids, each (1, S), without padding.
        ridge: rho as a fraction of the mean diagonal of X^T X, > 0.
        weighting: Of the squared errors; see `error_weights`.

    Returns:
        One report per router, in model order.

    Raises:
        ValueError: The models' routers differ or there are none, `ridge` is not
            positive, there are fewer than two samples, or `weighting` needs more memory
            than `vsraq.realignment.error_weights.WEIGHTED_LIMIT`.
    """
    routers = find_routers(fp_model)
    if not routers or routers != find_routers(q_model):
        raise ValueError(
            f"fp_model has routers {[r.name for r in routers]} and q_model "
            f"{[r.name for r in find_routers(q_model)]}: allowed are equal ones, and "
            "at least one"
        )
    fp_path, q_path = open_paths((fp_model, q_model), routers, samples)
    reports = []
    for router in routers:
        reports.append(
            refit_router(
                router.bind(q_model),
                _along(fp_path, q_path, router.bind(fp_model)),
                ridge=ridge,
                weighting=weighting,
            )
        )
    refitted = [report.router for report in reports if report.applied]
    if refitted:
        record_realignment(
            q_model,
            dict(router_weight(n, q_model.get_submodule(n)) for n in refitted),
        )
    return tuple(reports)


def _along(
    fp_path: Path, q_path: Path, fp_router: BoundRouter
) -> Iterator[tuple[Tensor, Tensor, None]]:
    """Yield the samples of `refit_router` for one router of two models."""
    for path in (fp_path, q_path):
        path.advance_to(fp_router.name)
    for sample in range(len(fp_path)):
        inputs = q_path.router_input(fp_router.name, sample)
        fp_inputs = fp_path.router_input(fp_router.name, sample)
        yield inputs.reshape(-1, inputs.shape[-1]), fp_router.logits(fp_inputs), None
