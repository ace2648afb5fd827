# SPDX-License-Identifier: Apache-2.0
"""The stack of decoder blocks of a model, and how to stop or replace a block."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vsraq.routers import Router


def decoder_blocks(model: nn.Module, routers: Iterable[Router]) -> tuple[str, ...]:
    """Return the blocks of the stack that holds all routers.

    Args:
        model: A model.
        routers: Its routers.

    Returns:
        Qualified names, in order; empty if the routers are not all in one
        `nn.ModuleList`.
    """
    stacks = {_outermost_list(model, router.name) for router in routers}
    if len(stacks) != 1:
        return ()
    (stack,) = stacks
    if stack is None:
        return ()
    children = model.get_submodule(stack).named_children()
    return tuple(f"{stack}.{name}" for name, _ in children)


def _outermost_list(model: nn.Module, name: str) -> str | None:
    """Return the first module list on the way to a module."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return parent
    return None


class _BlockDoneError(Exception):
    """Signal that ends a forward pass after a block; never leaves this file."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop_after_block(_module: nn.Module, _args: Any, output: Any) -> None:
    raise _BlockDoneError(output)


def block_output(
    block: nn.Module, forward: Callable[[], object]
) -> tuple[Tensor, bool]:
    """Run a forward pass up to the end of a block, and no further.

    Args:
        block: The block.
        forward: Runs the model that holds it, in eager mode.

    Returns:
        Its hidden states, (B, S, H), and whether it returns a tuple that starts with
        them, as older code does.

    Raises:
        RuntimeError: The pass ended without calling the block.
    """
    handle = block.register_forward_hook(_stop_after_block)
    try:
        forward()
    except _BlockDoneError as done:
        if isinstance(done.output, tuple):
            return done.output[0], True
        return done.output, False
    finally:
        handle.remove()
    raise RuntimeError(
        f"{type(block).__name__} was not called by the forward pass that should reach "
        "its end"
    )


@contextmanager
def replaced_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a block; it is put back afterwards."""
    previous = vars(block).get("forward")  # AutoRound leaves one on some blocks
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = previous
