# SPDX-License-Identifier: Apache-2.0
"""Do something once AutoRound has wrapped the layers of the block that it tunes.

AutoRound calls `self.wrapper_block` at the start of `quantize_block`, and builds no
graph before it. The method is replaced on that one object, as AutoRound itself does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def after_wrapping(
    quantizer: Any, action: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Call `action` with the block whose layers AutoRound has just wrapped.

    Args:
        quantizer: AutoRound's; its `wrapper_block` is replaced in the `with` block.
        action: Gets the block.
    """
    wrapper_block: Callable[..., Any] = quantizer.wrapper_block

    def wrap(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names = wrapper_block(block, *args, **kwargs)
        action(block)
        return names

    quantizer.wrapper_block = wrap
    try:
        yield
    finally:
        quantizer.wrapper_block = wrapper_block
