# SPDX-License-Identifier: Apache-2.0
"""The callbacks that a recipe names."""

from collections.abc import Callable, Mapping

from vsraq.callbacks import Callback, TensorBoard, WandB

_MADE_FROM: Mapping[str, Callable[[str], Callback]] = {
    "tensorboard": TensorBoard,  # from a folder
    "wandb": WandB,  # from a project
}


def make_callbacks(named: Mapping[str, str]) -> list[Callback]:
    """Make the callbacks under a recipe's `callbacks`.

    Args:
        named: A folder or a project, by the callback's key.

    Raises:
        ValueError: The package that one needs is not installed.
    """
    made = []
    for key, value in named.items():
        try:
            made.append(_MADE_FROM[key](value))
        except ImportError as error:
            raise ValueError(f"callbacks.{key}: {error}") from error
    return made
