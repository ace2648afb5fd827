# SPDX-License-Identifier: Apache-2.0
"""Send samples through a model block by block, without keeping earlier states.

    stream = BlockStream(model, blocks, samples)
    stream.advance_to("model.layers.3.mlp.gate")        # all samples, to its block
    stream.router_input("model.layers.3.mlp.gate", 0)   # (1, S, H), of sample 0

The other arguments of a block (mask, positions) are what the model's own forward passes
to it. They are computed again for each block and sample, because the masks of all
samples would be S values per token; that costs one forward pass without a block.

Shapes: N samples, S tokens each, H hidden width.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch import Tensor, nn

from vsraq.blocks import decoder_blocks, replaced_forward
from vsraq.capture import router_input
from vsraq.routers import Router
from vsraq.tokens.output_head import output_head

logger = logging.getLogger(__name__)


class _BlockReachedError(Exception):
    """Signal that ends a forward pass at a block; never leaves this file."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, kwargs)


def _stop_at_block(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    raise _BlockReachedError(args, kwargs)


@dataclass(frozen=True)
class BlockCall:
    """The arguments that a model's own forward passes to a block, for some samples.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def states(self) -> Tensor:
        """The hidden states among them, (B, S, H)."""
        states: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return states

    def float_on(self, device: torch.device | str) -> "BlockCall":
        """Return the same on a device, 16-bit tensors in float32."""
        moved = send_to_device((self.args, self.kwargs), device)
        return BlockCall(*convert_to_fp32(moved))

    def run(
        self, block: nn.Module, states: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        """Run a block.

        Args:
            block: The block, or a copy of it.
            states: Hidden states instead of those of the call; None takes those.

        Returns:
            Its hidden states, (B, S, H), and whether it returns a tuple that starts
            with them, as older code does.
        """
        call = self if states is None else self.with_states(states)
        output = block(*call.args, **call.kwargs)
        is_tuple = isinstance(output, tuple)
        return (output[0] if is_tuple else output), is_tuple

    def with_states(self, states: Tensor) -> "BlockCall":
        """Return the same with other hidden states, moved to their device."""
        states = states.to(self.states.device)
        if self.args:
            return BlockCall((states, *self.args[1:]), self.kwargs)
        name = next(iter(self.kwargs))
        return BlockCall(self.args, self.kwargs | {name: states})


class BlockCalls:
    """What a model's own forward passes to each of its blocks.

    The blocks in front of the one that is asked for are not computed, and may be on
    meta: only what the block gets besides hidden states is right.

    Args:
        model: A transformers causal language model.
        blocks: Names of all of its decoder blocks, in order.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._model = model
        self.blocks = tuple(blocks)
        self._returns_tuple: dict[int, bool] = {}

    def passed(self, position: int, returns_tuple: bool) -> None:
        """Say what a block returns, before the next one is asked for."""
        self._returns_tuple[position] = returns_tuple

    def of(self, position: int, input_ids: Tensor) -> BlockCall:
        """Return the arguments of a block, with the hidden states of the first one.

        Args:
            position: The block's index.
            input_ids: Token ids, (B, S), without padding.

        Raises:
            RuntimeError: The model does not call the block.
        """
        block = self._model.get_submodule(self.blocks[position])
        device = next(self._model.parameters()).device
        with ExitStack() as stack:
            for index, name in enumerate(self.blocks[:position]):
                passed = self._model.get_submodule(name)
                forward = _pass_as_tuple if self._returns_tuple[index] else _pass
                stack.enter_context(replaced_forward(passed, forward))
            handle = block.register_forward_pre_hook(_stop_at_block, with_kwargs=True)
            stack.callback(handle.remove)
            try:
                self._model(input_ids=input_ids.to(device), use_cache=False)
            except _BlockReachedError as reached:
                return BlockCall(*reached.call)
        raise RuntimeError(
            f"{type(self._model).__name__} does not call {self.blocks[position]}, so "
            "its blocks cannot be run alone"
        )


class BlockStream:
    """Every sample in front of one block of a model: N S H values, on the CPU.

    Args:
        model: A transformers causal language model.
        blocks: Names of all of its decoder blocks, in order.
        samples: Token ids, each (1, S), without padding.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], samples: Sequence[Tensor]
    ) -> None:
        self._model = model
        self._calls = BlockCalls(model, blocks)
        self._samples = samples
        self._position = 0
        self._states: list[Tensor] | None = None  # None in front of the first block

    def router_input(self, router: str, sample: int) -> Tensor:
        """Run the block that the samples are in front of up to a router inside it.

        Args:
            router: The router's qualified name in the model.
            sample: Index of the sample.

        Returns:
            (1, S, H).

        Raises:
            RuntimeError: The block did not call the router.
        """
        module = self._model.get_submodule(router)
        return router_input(module, partial(self._run, sample))

    def __len__(self) -> int:
        return len(self._samples)

    def advance_to(self, router: str) -> None:
        """Run all samples through the blocks before the one with that router."""
        names = enumerate(self._calls.blocks)
        position = next(i for i, name in names if router.startswith(f"{name}."))
        while self._position < position:
            states = []
            for sample in range(len(self._samples)):
                output, is_tuple = self._run(sample)
                states.append(output.cpu())
            self._states = states
            self._calls.passed(self._position, is_tuple)
            self._position += 1

    def _run(self, sample: int) -> tuple[Tensor, bool]:
        """Run the block that a sample is in front of."""
        block = self._model.get_submodule(self._calls.blocks[self._position])
        call = self._calls.of(self._position, self._samples[sample])
        return call.run(block, None if self._states is None else self._states[sample])


def _pass(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _pass_as_tuple(*args: Any, **kwargs: Any) -> Any:
    return (_pass(*args, **kwargs),)


class WholePasses:
    """The same for a model whose blocks cannot be run alone: a pass up to each router.

    Args:
        model: A transformers causal language model.
        samples: Token ids, each (1, S), without padding.
    """

    def __init__(self, model: nn.Module, samples: Sequence[Tensor]) -> None:
        self._model = model
        self._samples = samples

    def router_input(self, router: str, sample: int) -> Tensor:
        """Run the model up to a router; see `BlockStream.router_input`."""
        device = next(self._model.parameters()).device
        input_ids = self._samples[sample].to(device)
        return router_input(
            self._model.get_submodule(router),
            lambda: self._model(input_ids=input_ids, use_cache=False),
        )

    def __len__(self) -> int:
        return len(self._samples)

    def advance_to(self, router: str) -> None:
        """Do nothing: every pass starts at the beginning."""


Path: TypeAlias = BlockStream | WholePasses


@torch.no_grad()
def open_paths(
    models: Sequence[nn.Module],
    routers: Sequence[Router],
    samples: Sequence[Tensor],
) -> list[Path]:
    """Open a path to all routers for each model, block by block if possible.

    Args:
        models: Models with the same routers.
        routers: Their routers.
        samples: Token ids, each (1, S), without padding.

    Returns:
        A path per model, its samples in front of the first block.
    """
    paths: list[Path] = []
    for model in models:
        blocks = decoder_blocks(model, routers)
        reason = why_not_streamed(model, blocks, samples[:2], routers[-1].name)
        if reason:
            logger.warning(
                "vsraq: %s cannot be run block by block (%s), so it runs from the "
                "start up to each of its %d routers",
                type(model).__name__,
                reason,
                len(routers),
            )
            paths.append(WholePasses(model, samples))
        else:
            paths.append(BlockStream(model, blocks, samples))
    return paths


@torch.no_grad()
def why_not_streamed(
    model: nn.Module, blocks: Sequence[str], samples: Sequence[Tensor], router: str
) -> str:
    """Find out whether blocks that run alone do the same as inside the model.

    Args:
        model: A transformers causal language model.
        blocks: Names of all of its decoder blocks, in order; empty if unknown.
        samples: What to try it with, token ids, each (1, S).
        router: Name of the last router: what reaches it is compared.

    Returns:
        Empty if they do, otherwise the reason why not.
    """
    if not blocks:
        return "its routers are not in one list of blocks"
    stream = BlockStream(model, blocks, samples)
    whole = WholePasses(model, samples)
    try:
        stream.advance_to(router)
        alone = [stream.router_input(router, i) for i in range(len(samples))]
    except Exception as error:  # a family's own code may raise anything
        return f"{type(error).__name__}: {error}"
    for sample, inputs in enumerate(alone):
        expected = whole.router_input(router, sample)
        difference = _difference(inputs, expected)
        if difference:
            return f"what reaches {router} differs by up to {difference:.3g}"
    return ""


@torch.no_grad()
def why_not_alone(model: nn.Module, blocks: Sequence[str], input_ids: Tensor) -> str:
    """Find out whether all blocks that run alone lead to the model's own output.

    Args:
        model: A transformers causal language model, in memory.
        blocks: Names of all of its decoder blocks, in order.
        input_ids: Token ids to try it with, (B, S), without padding.

    Returns:
        Empty if they do, otherwise the reason why not.
    """
    input_ids = input_ids.to(next(model.parameters()).device)
    expected = model(input_ids=input_ids, use_cache=False).logits
    calls = BlockCalls(model, blocks)
    try:
        states = calls.of(0, input_ids).states
        for position, name in enumerate(blocks):
            call = calls.of(position, input_ids)
            states, is_tuple = call.run(model.get_submodule(name), states)
            calls.passed(position, is_tuple)
        with output_head(model, blocks, returns_tuple=is_tuple) as head:
            logits = head(states)
    except Exception as error:  # a family's own code may raise anything
        return f"{type(error).__name__}: {error}"
    difference = _difference(logits, expected)
    return f"the output differs by up to {difference:.3g}" if difference else ""


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, or 0 if it is one of rounding.

    The same operations on the same numbers, but a kernel may add in another order.
    """
    difference = (actual - expected).abs().max().item()
    # also what is not finite differs
    return 0.0 if difference <= 1e-2 * expected.abs().max().item() else difference
