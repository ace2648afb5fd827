# SPDX-License-Identifier: Apache-2.0
"""Routing replay: a quantized model uses the full-precision routing (SRA Fig. 4).

    routing = vsraq.record_routing(fp_model, batches)
    with vsraq.replay_routing(q_model, routing, tokens=mask):
        q_model(input_ids)  # batches in the recorded order

Replaced is what the router module returns, not what it reads: the quantized model's
router may be a re-fitted one. Everything else stays the quantized model's.

Shapes: T tokens, B sequences, S positions, N sequences of all batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vsraq.analysis.router_values import (
    inside_compiled,
    modules_of,
    plain_name,
    rebuilt,
    token_dims,
    values_of,
)
from vsraq.analysis.routing_record import RecordedRouter, RoutingRecord, Rows
from vsraq.routers import find_routers, linear_map


@contextmanager
def replay_routing(
    q_model: nn.Module,
    routing: RoutingRecord,
    tokens: Tensor | Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Give chosen tokens the recorded experts and routing weights.

    Inside the `with` block the model has to be called with the recorded batches, in
    their order. Without any chosen token nothing is changed at all. Otherwise compiled
    code runs in eager mode inside the block, because it knows no hooks.

    Args:
        q_model: The quantized model, with the routers of the one that was recorded;
            their weights may differ.
        routing: From `record_routing`.
        tokens: Which tokens to choose: bool, (N, S), or one (B, S) per batch; None
            chooses all.

    Yields:
        Nothing.

    Raises:
        ValueError: The mask is not one of the recorded tokens, the model has other
            routers, or, inside the block, it is called with other tokens than the
            recorded ones or more often.
    """
    masks = _masks(routing, tokens)
    model = inside_compiled(q_model)
    _check_routers(model, routing)
    with _replaying(model, routing, masks):
        yield


@contextmanager
def replaying(
    model: nn.Module, routing: RoutingRecord, tokens: Tensor | Sequence[Tensor] | None
) -> Iterator[None]:
    """Do the same for a model that is known to have the recorded routers."""
    with _replaying(inside_compiled(model), routing, _masks(routing, tokens)):
        yield


@contextmanager
def _replaying(
    model: nn.Module, routing: RoutingRecord, masks: Sequence[Tensor]
) -> Iterator[None]:
    if not any(mask.any() for mask in masks):
        yield
        return
    modules = modules_of(model)
    replays = [_Replay(recorded, masks) for recorded in routing.routers]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        passes = _Passes(routing, replays)
        hook = model.register_forward_pre_hook(passes, with_kwargs=True)
        stack.callback(hook.remove)
        for replay in replays:
            module = modules[replay.recorded.place]
            stack.callback(module.register_forward_hook(replay).remove)
        yield


def _masks(
    routing: RoutingRecord, tokens: Tensor | Sequence[Tensor] | None
) -> list[Tensor]:
    """Return the chosen tokens of each batch, bool, (T,)."""
    batches = routing.batches
    shapes = [tuple(ids.shape) for ids in batches]
    if tokens is None:
        return [torch.ones(ids.numel(), dtype=torch.bool) for ids in batches]
    if isinstance(tokens, Tensor):
        sequences, lengths = sum(s[0] for s in shapes), {s[1] for s in shapes}
        found: Any = tuple(tokens.shape)
        fits = len(lengths) == 1 and found == (sequences, *lengths)
        parts = tokens.split([s[0] for s in shapes]) if fits else ()
        allowed = f"bool of shape {(sequences, *lengths)}" if len(lengths) == 1 else ""
    else:
        parts, found = tuple(tokens), [tuple(mask.shape) for mask in tokens]
        fits, allowed = found == shapes, ""
    dtypes = {mask.dtype for mask in parts}
    if not fits or dtypes != {torch.bool}:
        dtype = ", ".join(map(str, dtypes)) or getattr(tokens, "dtype", "no tensor")
        raise ValueError(
            f"tokens: {dtype} of shape {found}, but the routing of {routing.tokens} "
            f"tokens was recorded; allowed is {allowed or f'bool of shapes {shapes}'}, "
            "or None for all"
        )
    return [mask.detach().flatten().cpu() for mask in parts]


def _check_routers(model: nn.Module, routing: RoutingRecord) -> None:
    """Refuse a model with other routers than those that were recorded."""
    recorded = {plain_name(r.router.name): r for r in routing.routers}
    modules = modules_of(model)
    wrong = [
        name
        for name, r in recorded.items()
        if name not in modules
        or r.place not in modules
        or len(linear_map(modules[name]).weight) < r.router.num_experts  # type: ignore[arg-type]
    ]
    found = set(recorded)
    if routing.complete and not wrong:
        by_name = {plain_name(r.name): r for r in find_routers(model)}
        found = set(by_name)
        wrong = [
            name
            for name in sorted(found & recorded.keys())
            if (by_name[name].top_k, by_name[name].num_experts)
            != (recorded[name].router.top_k, recorded[name].router.num_experts)
        ]
    wrong += sorted(found ^ recorded.keys())
    if wrong:
        raise ValueError(
            f"q_model={type(model).__name__}: its routers are not those that were "
            f"recorded: {', '.join(wrong[:5])} of {len(recorded)} recorded ones are "
            "missing, new, or have other numbers of experts; allowed is a model of the "
            "recorded architecture"
        )


class _Passes:
    """Before each pass of a model: is this the batch that was recorded?"""

    def __init__(self, routing: RoutingRecord, replays: Sequence["_Replay"]) -> None:
        self._batches = routing.batches
        self._replays = replays
        self._next = 0

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        batch = self._next
        if batch >= len(self._batches):
            raise ValueError(
                f"the model is called {batch + 1} times, but {batch} batches were "
                "recorded; allowed is one call for each, so record the others too"
            )
        expected = self._batches[batch]
        if isinstance(ids, Tensor) and not torch.equal(ids.cpu().int(), expected):
            kind = "other tokens" if ids.shape == expected.shape else "another shape"
            raise ValueError(
                f"input_ids of shape {tuple(ids.shape)} in call {batch + 1}: {kind} "
                f"than the recorded batch, {tuple(expected.shape)}; allowed are the "
                "recorded batches in their order"
            )
        self._next += 1
        for replay in self._replays:
            replay.start(batch)


class _Replay:
    """After each call of a module: put the recorded rows into what it returned."""

    def __init__(self, recorded: RecordedRouter, masks: Sequence[Tensor]) -> None:
        self.recorded = recorded
        self._masks = masks
        self._next = 0

    def start(self, batch: int) -> None:
        """Begin a batch, whatever became of the pass before it."""
        batches = [number for number, _ in self.recorded.calls]
        self._next = batches.index(batch)

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        name, calls = self.recorded.router.name, self.recorded.calls
        if self._next >= len(calls):
            raise ValueError(
                f"router {name!r} is called {self._next + 1} times, but {len(calls)} "
                "calls were recorded; allowed are the recorded batches, so record the "
                "others too"
            )
        batch, rows = calls[self._next]
        self._next += 1
        mask = self._masks[batch]
        values = values_of(output)
        rows = self._fitting(values, rows, len(mask))
        if not mask.any():
            return None
        replaced = tuple(
            value if recorded is None else _with_rows(value, recorded, mask)
            for value, recorded in zip(values, rows, strict=True)
        )
        return rebuilt(output, replaced)

    def _fitting(self, values: tuple[Any, ...], rows: Rows, tokens: int) -> Rows:
        """Return the rows for these values; a router with logits only gets those."""
        raw = self.recorded.raw_logits
        if len(values) == 1 and len(rows) > 1 and raw is not None:
            rows = (rows[raw],)
            if rows[0] is None:
                raise ValueError(
                    f"router {self.recorded.router.name!r} returns logits only, and "
                    "they were not recorded; allowed is record_routing(..., "
                    "logits=True)"
                )
        pairs = list(zip(values, rows, strict=False))
        if len(values) != len(rows) or not all(
            recorded is None or _same_rows(value, recorded, tokens)
            for value, recorded in pairs
        ):
            raise ValueError(
                f"router {self.recorded.router.name!r} returns {_shapes(values)}, "
                f"recorded were rows of {_shapes(rows)} for {tokens} tokens; allowed "
                "are the recorded batches, and a model whose router module returns "
                "what the recorded one did, or its logits"
            )
        return rows


def _same_rows(value: Any, recorded: Tensor, tokens: int) -> bool:
    dims = token_dims(value, tokens)
    return (
        dims is not None
        and value.shape[dims:] == recorded.shape[1:]
        and value.is_floating_point() == recorded.is_floating_point()
    )


def _with_rows(value: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
    """Replace the rows of the chosen tokens."""
    dims = token_dims(value, len(mask))
    chosen = mask.view(value.shape[:dims]).to(value.device)
    replaced = value.clone()
    replaced[chosen] = recorded[mask].to(value)
    return replaced


def _shapes(values: tuple[Any, ...]) -> str:
    shapes = [
        str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__
        for v in values
    ]
    return ", ".join(shapes)
