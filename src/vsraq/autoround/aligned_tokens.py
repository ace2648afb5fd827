# SPDX-License-Identifier: Apache-2.0
"""Which tokens the routers of a run are aligned on."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.token_selection import (
    SelectionDoneError,
    TokenSelection,
    select_tokens_of_run,
)
from vsraq.options import Threshold
from vsraq.processes import gather
from vsraq.tokens import TokenMask
from vsraq.tokens.recorder import TokenRecorder

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

logger = logging.getLogger("autoround.vsraq")


class AlignedTokens:
    """The selected tokens of a run, from a mask that is given or computed.

    Args:
        config: The run's configuration, with token selection on.
        model: The model that calibration runs.

    Attributes:
        given: The mask that the configuration names, or None.
        mask: The run's mask, once `select` has been called.

    Raises:
        FileNotFoundError: There is no file at the path of the mask.
        ValueError: The file is not a token mask.
    """

    def __init__(self, config: VSRAQConfig, model: nn.Module) -> None:
        given = config.token_mask
        self.given = TokenMask.load(given) if isinstance(given, str | Path) else given
        self.mask: TokenMask | None = None
        self._config = config
        self._token_ids: list[Tensor] | None = None
        self._recorder: TokenRecorder | None = None
        if hasattr(model, "get_input_embeddings"):  # single blocks have none
            self._recorder = TokenRecorder(model)

    def calibrating(self) -> AbstractContextManager[object]:
        """Return a context that keeps the token ids of AutoRound's calibration."""
        # AutoRound calibrates a second time for layers outside of the blocks
        if self._recorder is None or self._token_ids is not None:
            return nullcontext()
        return self._recorder

    def end_calibration(self) -> None:
        """Take the token ids of the calibration.

        Raises:
            RuntimeError: Calibration has run no sample.
        """
        if self._recorder is not None:
            self._token_ids = self._recorder.take()

    def select(
        self, orchestrator: Any, composer: "AlgorithmComposer | None"
    ) -> TokenMask:
        """Check the given mask, or compute one.

        Args:
            orchestrator: AutoRound's, with its block inputs collected.
            composer: AutoRound's, None for single blocks.

        Returns:
            The mask.

        Raises:
            NotImplementedError: The run is one of single blocks.
            SelectionDoneError: The run only selects tokens.
            ValueError: The given mask is for other tokens, or too few samples have
                selected tokens to re-fit routers on.
        """
        if self._token_ids is None or composer is None:
            raise NotImplementedError(
                "token_selection: single blocks do not tell which tokens they see; "
                "allowed are runs of a whole model through AutoRound"
            )
        mask = self.given
        selection = None
        if mask is None:
            selection = self._compute(orchestrator, composer, self._token_ids)
            mask = selection.mask
        else:
            self._check(mask, self._token_ids)
            logger.info(
                "vsraq: a given mask selects %d of %d tokens (%.1f %%); it was made "
                "for %s, %s, with tau=%g",
                mask.selected,
                mask.total,
                100 * mask.share,
                mask.model,
                mask.scheme,
                mask.tau,
            )
        warning = mask.warning()
        if warning is not None:
            logger.warning("vsraq: %s", warning)
        if selection is not None and self._config.select_only:
            raise SelectionDoneError(selection)
        # a process with two samples holds one out and fits the other
        fitted = max(gather(sum(bool(selected.any()) for selected in mask.masks)))
        if self._config.alignment.realign_routers and fitted < 2:
            raise ValueError(
                f"token mask: {fitted} samples have selected tokens; re-fitting "
                "routers needs 2 or more, so lower tau, calibrate on more, or "
                "pass realign_routers=False"
            )
        self.mask = mask
        return mask

    def _check(self, mask: TokenMask, token_ids: Sequence[Tensor]) -> None:
        """Refuse a mask of other tokens; name its file if it came from one."""
        try:
            mask.check(token_ids)
        except ValueError as error:
            if isinstance(self._config.token_mask, TokenMask):
                raise
            name = str(self._config.token_mask)
            raise ValueError(f"token_mask={name!r}: {error}") from error

    def _compute(
        self,
        orchestrator: Any,
        composer: "AlgorithmComposer",
        token_ids: Sequence[Tensor],
    ) -> TokenSelection:
        threshold = self._config.alignment.threshold or Threshold()
        selection = select_tokens_of_run(
            orchestrator,
            composer,
            token_ids,
            tau=threshold.tau,
            shift_threshold=threshold.shift_threshold,
        )
        logger.info("vsraq: %s", selection)
        return selection
