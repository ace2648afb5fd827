# SPDX-License-Identifier: Apache-2.0
"""The part of a causal language model after its last decoder block.

Final norm, output projection, logit scale and soft-capping are placed differently in
every family, so none of it is rebuilt here: the model's own forward runs, with every
decoder block replaced by one that returns the hidden states. Blocks may be on meta.

Shapes: n tokens, H hidden width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vsraq.blocks import replaced_forward

# hidden states after the last block, (..., H) -> output logits, (..., V)
OutputHead: TypeAlias = Callable[[Tensor], Tensor]


@contextmanager
def output_head(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    returns_tuple: bool = False,
) -> Iterator[OutputHead]:
    """Open the part of a model after its last decoder block.

    Inside the `with` block the model computes nothing else. Every token goes through it
    as a sequence of its own, which is right because only decoder blocks mix tokens; it
    keeps masks and positions trivial. What stands outside of the blocks is moved to
    `device` (embeddings and output projection, 2 V H values) and put back afterwards.

    Args:
        model: A transformers causal language model whose forward takes `inputs_embeds`.
        blocks: Names of all decoder blocks, in order.
        device: Where to compute; None leaves the model where it is.
        dtype: What to compute in; None leaves it.
        autocast: Run under autocast with this dtype; None runs without.
        returns_tuple: Whether the model's blocks return a tuple with the hidden states
            first, as older code does, and not the hidden states.

    Yields:
        A function from hidden states (..., H) to logits (..., V), without gradient.

    Raises:
        NotImplementedError: The model takes no `inputs_embeds`.
        RuntimeError: A tensor outside of the blocks is not in memory.
    """
    name = type(model).__name__
    if not takes_embeddings(model):
        raise NotImplementedError(
            f"model={name}: its forward takes no inputs_embeds; allowed are causal "
            "language models of transformers, or pass a head of your own"
        )
    stack = _Replay(returns_tuple)
    with ExitStack() as cleanup:
        for block in blocks:
            cleanup.enter_context(replaced_forward(model.get_submodule(block), stack))
        if device is not None or dtype is not None:
            cleanup.enter_context(_outside_on(model, blocks, device, dtype))

        @torch.no_grad()
        def head(hidden_states: Tensor) -> Tensor:
            tokens = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
            tokens = tokens if device is None else tokens.to(device)
            kind = tokens.device.type
            stack.hidden_states, stack.calls = tokens, 0
            with torch.autocast(kind, autocast, enabled=autocast is not None):
                logits = model(inputs_embeds=tokens, use_cache=False).logits
            stack.hidden_states = None
            if stack.calls == 0 or logits.shape[:2] != tokens.shape[:2]:
                raise RuntimeError(
                    f"model={name}: its forward called {stack.calls} of the blocks "
                    f"{blocks[0]} ... {blocks[-1]} and gave logits of shape "
                    f"{tuple(logits.shape)} for {len(tokens)} tokens; allowed is a "
                    "model that runs these blocks and gives (tokens, 1, vocabulary)"
                )
            return logits.reshape(*hidden_states.shape[:-1], logits.shape[-1])

        yield head


def takes_embeddings(model: nn.Module) -> bool:
    """Whether a model's forward takes `inputs_embeds`; `output_head` needs it."""
    return "inputs_embeds" in inspect.signature(model.forward).parameters


class _Replay:
    """A replacement for the forward of every block: it returns given hidden states."""

    def __init__(self, returns_tuple: bool) -> None:
        self.hidden_states: Tensor | None = None
        self.calls = 0
        self._returns_tuple = returns_tuple

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        self.calls += 1
        return (self.hidden_states,) if self._returns_tuple else self.hidden_states


@contextmanager
def _outside_on(
    model: nn.Module,
    blocks: Sequence[str],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Iterator[None]:
    inside = {id(m) for name in blocks for m in model.get_submodule(name).modules()}
    parameters: list[tuple[nn.Parameter, Tensor]] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for owner_name, owner in model.named_modules():
            if id(owner) in inside:
                continue
            for name, parameter in owner.named_parameters(recurse=False):
                _check_in_memory(f"{owner_name}.{name}", parameter)
                parameters.append((parameter, parameter.data))
                parameter.data = _moved(parameter.data, device, dtype)
            for name, buffer in owner.named_buffers(recurse=False):
                _check_in_memory(f"{owner_name}.{name}", buffer)
                buffers.append((owner, name, buffer))
                owner._buffers[name] = _moved(buffer, device, dtype)
        yield
    finally:
        # reversed: a tied parameter was moved once per owner
        for parameter, data in reversed(parameters):
            parameter.data = data
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


def _moved(
    tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None
) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else None
    return tensor.to(device=device, dtype=dtype)


def _check_in_memory(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.numel() == 0:
        raise RuntimeError(
            f"{name.lstrip('.')}: it stands outside of the decoder blocks and is not "
            "in memory, so the model's output cannot be computed; load it first"
        )
