# SPDX-License-Identifier: Apache-2.0
"""The token ids of the calibration samples, as the model reads them."""

import weakref
from typing import Any

from torch import Tensor, nn


class TokenRecorder:
    """Keeps the token ids of the calibration samples.

    AutoRound hands them on only with the first block, and with -100 at padding and at
    last positions. So they are read where the model reads them, at its input embedding.

    Open it before AutoRound collects the blocks' inputs; `take` closes it.

    Args:
        model: The model that calibration runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._token_ids: list[Tensor] = []
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        own = weakref.ref(self)

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            recorder = own()
            if recorder is not None:
                recorder._token_ids += args[0].detach().cpu().split(1)

        self._handle = embedding.register_forward_pre_hook(keep)
        # a run that fails before it takes the ids must not leave the hook
        weakref.finalize(self, self._handle.remove)

    def take(self) -> list[Tensor]:
        """The ids of every sample so far, (1, S) each, in order; closes the recorder.

        Raises:
            RuntimeError: No sample went through the embedding.
        """
        self.close()
        if not self._token_ids:
            raise RuntimeError(
                "TokenRecorder has seen no calibration sample: open it before "
                "AutoRound collects block inputs (bind), take() behind that "
                "(prepare_run)"
            )
        taken, self._token_ids = self._token_ids, []
        return taken

    def close(self) -> None:
        """Remove the hook; safe to call twice."""
        self._handle.remove()
