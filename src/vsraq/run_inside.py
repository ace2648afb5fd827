# SPDX-License-Identifier: Apache-2.0
"""Run a method of one object inside a context, where AutoRound has no seam.

Only that object changes, and only for the run that it belongs to: another run of the
same process has objects of its own.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def run_inside(
    owner: Any, method: str, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Let every call of a method of this one object run inside a context.

    Args:
        owner: The object.
        method: The method's name.
        context: Makes the context of one call.
    """
    original: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    setattr(owner, method, call)
