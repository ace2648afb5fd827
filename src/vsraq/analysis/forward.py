# SPDX-License-Identifier: Apache-2.0
"""Run a model on a batch: how it routes, and what its output follows from.

Shapes: T tokens of the batch, E experts, K top-k, H hidden width, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vsraq.blocks import block_output, decoder_blocks
from vsraq.capture import RouterCapture
from vsraq.routers import BoundRouter, Router
from vsraq.tokens.output_head import OutputHead, output_head, takes_embeddings

Kept = TypeVar("Kept")
CHECKED_TOKENS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward(Generic[Kept]):
    """What a model gave for a batch of T tokens.

    Attributes:
        routing: By router name, what was kept of its logits.
        rows: Hidden states after its last block, (T, H), or its logits, (T, V).
        returns_tuple: Whether its last block returns a tuple; None for logits.
    """

    routing: dict[str, Kept]
    rows: Tensor
    returns_tuple: bool | None


class RoutedModel:
    """A causal language model with its routers and decoder blocks.

    Args:
        model: The model, in evaluation mode while it runs.
        routers: Its routers.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router]) -> None:
        self.model = model
        self.routers = tuple(routers)
        blocks = decoder_blocks(model, routers)
        self._blocks = blocks if takes_embeddings(model) else ()

    @property
    def device(self) -> torch.device:
        """Where it takes token ids."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        module = self.model if embedding is None else embedding
        return next(module.parameters(), torch.empty(0)).device

    def run(
        self,
        input_ids: Tensor,
        keep: Callable[[BoundRouter, Tensor], Kept],
    ) -> Forward[Kept]:
        """Run it up to its last block, or to its logits where that is not possible.

        Args:
            input_ids: (B, S).
            keep: `(router, logits (T, E)) -> anything`, called once per router.

        Raises:
            RuntimeError: A router saw other tokens than these, or was not called.
        """
        input_ids = input_ids.to(self.device)
        with RouterCapture(self.model, self.routers, keep) as capture:
            rows, returns_tuple = self._rows(input_ids)
            calls = capture.take()
        several = [name for name, kept in calls.items() if len(kept) != 1]
        if several:
            raise RuntimeError(
                f"router {', '.join(several)} was called more than once for a batch; "
                "allowed is one call for all tokens, so name other routers with "
                "router_pattern"
            )
        routing = {name: kept[0] for name, kept in calls.items()}
        return Forward(routing, rows, returns_tuple)

    def check_head(self, input_ids: Tensor) -> None:
        """Keep to logits from now on, where `head` would give others than the model.

        In some families more than hidden states goes from block to block, or from the
        blocks to the head.

        Args:
            input_ids: (B, S); a part of the first sequence is run.
        """
        if not self._blocks:
            return
        input_ids = input_ids[:1, :CHECKED_TOKENS].to(self.device)
        expected: Tensor = self.model(input_ids=input_ids).logits.flatten(0, 1).float()
        try:
            rows, returns_tuple = self._rows(input_ids)
            with self.head(returns_tuple) as head:
                found = head(rows)
        except Exception as error:  # it is the code of any family
            reason = f"{type(error).__name__}: {error}"
        else:
            precision = max(4 * torch.finfo(found.dtype).eps, 1e-4)
            tolerance = precision * expected[expected.isfinite()].abs().max().item()
            shapes = found.shape == expected.shape and rows.ndim == 2
            if shapes and torch.allclose(found.float(), expected, 0, tolerance):
                return
            reason = "its head gives other logits"
        _log.info(
            "%s cannot be split after its last block (%s): its logits are compared as "
            "they are",
            type(self.model).__name__,
            " ".join(reason.split()),
        )
        self.keep_to_logits()

    def keep_to_logits(self) -> None:
        """Take the model's logits from now on, not the states after its last block."""
        self._blocks = ()

    def _rows(self, input_ids: Tensor) -> tuple[Tensor, bool | None]:
        if self._blocks:
            last = self.model.get_submodule(self._blocks[-1])
            hidden_states, returns_tuple = block_output(
                last, lambda: self.model(input_ids=input_ids, use_cache=False)
            )
            return hidden_states.flatten(0, 1), returns_tuple
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits.flatten(0, 1), None

    @contextmanager
    def head(self, returns_tuple: bool | None) -> Iterator[OutputHead]:
        """Yield the function that turns rows into logits, (n, V).

        Args:
            returns_tuple: As in `Forward`.
        """
        if returns_tuple is None:
            yield lambda rows: rows
            return
        with output_head(self.model, self._blocks, returns_tuple=returns_tuple) as head:
            device = self.device
            yield lambda rows: head(rows.to(device))

    def drop_blocks(self) -> None:
        """Free the memory of everything that `head` does not need."""
        # a block is no longer asked for a dtype or a device, so it may be anywhere
        for name in self._blocks or ("",):
            nn.Module.to(self.model.get_submodule(name), "meta")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode, eagerly and without gradients; put it back."""
    training = {m: m.training for model in models for m in model.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # hooks are not in compiled code
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
