# SPDX-License-Identifier: Apache-2.0
"""Record the router logits of a block while it runs.

    with RouterCapture(block, routers) as capture:
        block(hidden_states)
        q_logits = capture.take()["mlp.gate"]   # (T, E), attached to the graph

Only routers are hooked: a hook on an expert would switch AutoRound's grouped-expert
kernel off. Outside the `with` block no hook is left, even after an exception.

A forward pass under torch.compile is captured too, as long as `keep` is not given.
torch.compile neither guards on hooks nor traces them anew for the next block of the
same class, so a compiled hook must find its state through the module that it is called
with, not through a closure: it only appends the router's input to a list on that
module, and `take` computes the logits outside. A `keep` of your own runs in eager mode
only.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vsraq.routers import BoundRouter, Compared, Router

Kept = TypeVar("Kept")

_INPUTS = "_vsraq_router_inputs"


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden_states: Tensor = args[0] if args else next(iter(kwargs.values()))
    return hidden_states


def _record_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    getattr(module, _INPUTS).append(_input(args, kwargs))


class _RouterReachedError(Exception):
    """Signal that ends a forward pass at the router; never leaves this file."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


def _stop_at_router(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    raise _RouterReachedError(_input(args, kwargs))


def router_input(router: nn.Module, forward: Callable[[], object]) -> Tensor:
    """Run a forward pass up to a router, and no further: no expert is computed.

    Args:
        router: The router module.
        forward: Runs the module that holds it, in eager mode.

    Returns:
        The router's input, (..., H), attached to the graph.

    Raises:
        RuntimeError: The pass ended without calling the router.
    """
    handle = router.register_forward_pre_hook(_stop_at_router, with_kwargs=True)
    try:
        forward()
    except _RouterReachedError as reached:
        return reached.hidden_states
    finally:
        handle.remove()
    raise RuntimeError(
        f"{type(router).__name__} was not called by the forward pass that should reach "
        "it: another block holds it, or its weight is used without calling the module"
    )


class RouterCapture(Generic[Kept]):
    """A context manager that keeps something of every router call.

    Args:
        module: The block or model that holds the routers.
        routers: Their descriptions, named relative to `module`.
        keep: `(router, values) -> anything`, called once per router call; the default
            keeps the values as they are, attached to the graph.
        compared: Which values: the router's "logits", (T, E), or its "inputs", (T, H).

    Raises:
        ValueError: There is no router to capture.
    """

    def __init__(
        self,
        module: nn.Module,
        routers: Sequence[Router],
        keep: Callable[[BoundRouter, Tensor], Kept] | None = None,
        compared: Compared = "logits",
    ) -> None:
        if not routers:
            raise ValueError(
                f"routers=(): {type(module).__name__} has no router to capture"
            )
        self.module = module
        self.routers = tuple(routers)
        self._keep = keep
        self._compared = compared
        self._calls: dict[str, list[Kept]] = {r.name: [] for r in self.routers}
        self._handles: list[RemovableHandle] = []
        # set while open: AutoRound wraps layers, so names may lead to other modules
        self._open: dict[str, BoundRouter] = {}

    def open(self) -> Self:
        """Register the hooks; `with` does this.

        Raises:
            RuntimeError: This capture, or another without `keep` on one of the same
                routers, is open already.
        """
        bound = {router.name: router.bind(self.module) for router in self.routers}
        if self._handles or (
            self._keep is None
            and any(_INPUTS in r.module.__dict__ for r in bound.values())
        ):
            raise RuntimeError(
                f"a RouterCapture of this {type(self.module).__name__} is open "
                "already; allowed is one at a time, so close() it first"
            )
        self._open = bound
        for router in bound.values():
            module = router.module
            if self._keep is None:
                module.__dict__[_INPUTS] = []
                hook: Callable[..., None] = _record_input
            else:
                hook = self._keeping_hook(self._keep, router)
            self._handles.append(
                module.register_forward_pre_hook(hook, with_kwargs=True)
            )
        return self

    def close(self) -> None:
        """Remove the hooks; what was kept stays until `take` or `clear`."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._keep is None:
            for router in self._open.values():
                del router.module.__dict__[_INPUTS]
        self._handles.clear()
        self._open = {}

    def clear(self) -> None:
        """Forget what was kept so far."""
        for calls in self._calls.values():
            calls.clear()
        for router in self._open.values():
            router.module.__dict__.get(_INPUTS, []).clear()

    def take(self) -> dict[str, list[Kept]]:
        """Return what was kept since the last `take`: per router, one item per call.

        Raises:
            RuntimeError: A router was not called.
        """
        if self._keep is None:
            for router in self._open.values():
                self._calls[router.name] += [
                    router.values(hidden_states, self._compared)  # type: ignore[misc]
                    for hidden_states in router.module.__dict__[_INPUTS]
                ]
        silent = [name for name, calls in self._calls.items() if not calls]
        if silent:
            raise RuntimeError(
                f"router {', '.join(silent)} of {type(self.module).__name__} was not "
                "called: its block's forward did not run, or uses the router's weight "
                "without calling the module, or the router is for other tokens than "
                "these (images); name those that are called with router_pattern"
            )
        taken = {name: list(calls) for name, calls in self._calls.items()}
        self.clear()
        return taken

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear()
        self.close()

    def _keeping_hook(
        self, keep: Callable[[BoundRouter, Tensor], Kept], router: BoundRouter
    ) -> Callable[..., None]:
        calls = self._calls[router.name]

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            values = router.values(_input(args, kwargs), self._compared)
            calls.append(keep(router, values))

        return hook
