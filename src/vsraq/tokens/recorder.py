# SPDX-License-Identifier: Apache-2.0
"""The token ids of the calibration samples, as the model reads them."""

from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class TokenRecorder:
    """A context manager that keeps the token ids of the calibration samples.

    AutoRound hands them on only with the first block, and with -100 at padding and at
    last positions. So they are read where the model reads them, at its input embedding.
    Entering the context forgets the ids of an earlier pass.

    Args:
        model: The model that calibration runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._token_ids: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Self:
        self._token_ids = []
        self._handle = self._embedding.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _keep(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._token_ids += args[0].detach().cpu().split(1)

    def take(self) -> list[Tensor]:
        """Return the ids of every sample, (1, S) each, in order.

        Raises:
            RuntimeError: No sample went through the embedding.
        """
        if not self._token_ids:
            raise RuntimeError(
                "TokenRecorder has seen no calibration sample; allowed are models that "
                "calibrate inside `with recorder:` and through their input embedding"
            )
        taken, self._token_ids = self._token_ids, []
        return taken
