# SPDX-License-Identifier: Apache-2.0
"""Record what a model's routers decide while it runs.

Shapes: T tokens, B sequences, S positions, E experts, K top-k.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vsraq.analysis.router_values import (
    holds_choice,
    holds_logits,
    inside_compiled,
    modules_of,
    places,
    plain_name,
    raw_logits_among,
    token_dims,
    values_of,
)
from vsraq.analysis.routing_record import RecordedRouter, RoutingRecord, Rows
from vsraq.routers import Router, find_routers, linear_map


@torch.no_grad()
def record_routing(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    logits: bool = True,
    routers: Sequence[Router] | None = None,
) -> RoutingRecord:
    """Run a model and keep the experts and the routing weights of every token.

    Memory, on the CPU: per token and MoE layer, whatever the router module returns for
    a token, in its own dtype; experts as int16. For most families that are E logits, K
    weights and K experts: 2 E + 4 K bytes in bfloat16, so 0.3 KB for 128 experts with K
    = 8, or 14 KB per token in 48 layers. Without the logits it is 4 K bytes: 1.5 KB.

    Args:
        model: A transformers causal language model; compiled code runs in eager mode.
        batches: Token ids, each (B, S), without padding.
        logits: Keep the logits of routers that return the choice, too. They are needed
            only by models whose router module returns nothing else: AutoRound loads
            Qwen3-MoE and Qwen3-Next in that way.
        routers: Some of the model's routers, from `find_routers`; None takes all.

    Returns:
        The record, for `replay_routing`.

    Raises:
        ValueError: There is no batch or no router, or what a router returns does not
            have one row per token.
        RuntimeError: A router was not called.
    """
    device = next(model.parameters()).device
    with RoutingRecorder(model, routers, logits=logits) as recorder:
        for input_ids in batches:
            model(input_ids=input_ids.to(device), use_cache=False)
            recorder.keep(input_ids)
        return recorder.take()


@dataclass(eq=False)
class _Found:
    """What is known of one router while the model runs."""

    router: Router
    module: nn.Module
    places: list[str]  # one, once it is known
    raw_logits: int | None = None
    known: bool = False
    chooses: bool = False  # its module returns experts and weights
    calls: list[tuple[int, Rows]] = field(default_factory=list)


class RoutingRecorder:
    """A context manager that records the routing while a model runs.

    Compiled code runs in eager mode inside of it.

    Args:
        model: The model.
        routers: Some of its routers; None takes all.
        logits: See `record_routing`.

    Raises:
        ValueError: There is no router.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: Sequence[Router] | None = None,
        *,
        logits: bool = True,
    ) -> None:
        self._model = inside_compiled(model)
        self._complete = routers is None
        if routers is None:
            routers = find_routers(self._model)
        if not routers:
            raise ValueError(
                f"model={type(self._model).__name__}: it has no router to record; "
                "allowed are mixture-of-experts models"
            )
        self._modules = modules_of(self._model)
        self._found = [
            _Found(r, self._modules[plain_name(r.name)], places(self._modules, r))
            for r in routers
        ]
        self._logits = logits
        self._batches: list[Tensor] = []
        self._outputs: dict[str, list[Any]] = {}
        self._inputs: dict[str, Tensor] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        for found in self._found:
            for place in found.places:
                if place not in self._handles:
                    hook = self._hook(place)
                    module = self._modules[place]
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    self._handles[place] = handle
                    self._cleanup.callback(handle.remove)
        self._cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        self._handles.clear()
        self._outputs.clear()
        self._inputs.clear()

    def keep(self, input_ids: Tensor) -> None:
        """Keep what the routers decided since the last time.

        Args:
            input_ids: The token ids that the model has run on, (B, S).

        Raises:
            ValueError: What a router returned does not have one row per token.
            RuntimeError: A router was not called.
        """
        batch, tokens = len(self._batches), input_ids.numel()
        for found in self._found:
            if not found.known:
                self._learn(found, tokens)
            (place,) = found.places
            outputs = self._outputs.get(place, [])
            if not outputs:
                raise _not_called(found.router)
            for output in outputs:
                values = values_of(output)
                rows = tuple(self._kept(found, v, tokens) for v in values)
                found.calls.append((batch, rows))
        self._outputs.clear()
        self._inputs.clear()
        self._batches.append(input_ids.detach().cpu().to(torch.int32))

    def take(self) -> RoutingRecord:
        """Return what was kept since the last time.

        Raises:
            ValueError: Nothing was.
        """
        if not self._batches:
            raise ValueError(
                "batches=(): there are no tokens whose routing is to be recorded; "
                "allowed is at least one batch of token ids"
            )
        routers = tuple(
            RecordedRouter(f.router, f.places[0], f.raw_logits, tuple(f.calls))
            for f in self._found
        )
        record = RoutingRecord(tuple(self._batches), routers, self._complete)
        self._batches = []
        for found in self._found:
            found.calls = []
        return record

    def _hook(self, place: str) -> Any:
        def hook(
            _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
        ) -> None:
            values = tuple(  # copies: other code may write into them
                v.detach().clone() if isinstance(v, Tensor) else v
                for v in values_of(output)
            )
            self._outputs.setdefault(place, []).append(values)
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, Tensor) and not self._found[-1].known:
                self._inputs[place] = first.detach().clone()

        return hook

    def _learn(self, found: _Found, tokens: int) -> None:
        """Find out which of the modules return a token's routing."""
        router = found.router
        called = {
            place: values_of(self._outputs[place][0])
            for place in found.places
            if place in self._outputs
        }
        if not called:
            raise _not_called(router)
        width = len(linear_map(found.module).weight)  # type: ignore[arg-type]
        chosen = [p for p in called if holds_choice(called[p], tokens, router.top_k)]
        found.chooses = bool(chosen)
        chosen = chosen or [
            p
            for p in called
            if holds_logits(called[p], tokens, width)
            or holds_logits(called[p], tokens, router.num_experts)
        ]
        if not chosen:
            shapes = [
                tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
                for values in called.values()
                for v in values
            ]
            raise ValueError(
                f"router {router.name!r} ({type(found.module).__name__}): of {tokens} "
                f"tokens, it and the modules around it return values of shapes "
                f"{shapes}, none with its logits or its choice in one row per token; "
                "allowed are routers that return such rows, or call a linear map that "
                "does, so leave this one out: routers=find_routers(model, "
                "router_pattern=...)"
            )
        inputs = self._inputs.get(plain_name(router.name))
        if inputs is not None:
            values = called[chosen[0]]
            found.raw_logits = raw_logits_among(values, found.module, inputs)
        needed = {p for f in self._found if f is not found for p in f.places}
        for place in set(found.places) - {chosen[0]} - needed:
            self._handles[place].remove()
        found.places, found.known = chosen[:1], True

    def _kept(self, found: _Found, value: Any, tokens: int) -> Tensor | None:
        """Return the rows of a value as they are kept, None to leave it out."""
        dims = token_dims(value, tokens)
        if dims is None:
            return None
        router = found.router
        rows: Tensor = value.flatten(0, dims - 1).cpu()
        if not rows.is_floating_point() and router.num_experts <= 2**15:
            return rows.to(torch.int16)
        values = self._outputs[found.places[0]][0]
        by_expert = rows[0].numel() >= router.num_experts > router.top_k
        if (
            by_expert
            and not self._logits
            and holds_choice(values, tokens, router.top_k)
        ):
            return None
        return rows


def _not_called(router: Router) -> RuntimeError:
    return RuntimeError(
        f"router {router.name!r} was not called: its layer did not run, or it is for "
        "other tokens than these (images); allowed are routers that see every token, "
        "so leave it out: routers=find_routers(model, router_pattern=...)"
    )
