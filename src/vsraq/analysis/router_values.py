# SPDX-License-Identifier: Apache-2.0
"""Where a model decides a token's routing: what a module returns, token by token.

Most router modules return the choice: K experts and K weights for each token. Others
return logits, and code around them chooses; some of that code sorts across tokens, so
that nothing which it returns belongs to one token. The place that can be recorded and
replaced is then the linear map inside.

Shapes: T tokens, B sequences, S positions, E experts, K top-k.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vsraq.routers import Router, router_logits
from vsraq.routers.experts import experts_beside

# what torch.compile puts around a module
_COMPILED = "_orig_mod"


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, without the names that torch.compile adds."""
    return {plain_name(name): module for name, module in model.named_modules()}


def plain_name(name: str) -> str:
    """Leave out the names that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def inside_compiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped, or the model itself."""
    inner = getattr(model, _COMPILED, model)
    return inner if isinstance(inner, nn.Module) else model


def places(modules: Mapping[str, nn.Module], router: Router) -> list[str]:
    """List where a router's decision may be: its module, and those around it.

    Args:
        modules: Those of the model, by name.
        router: One of its routers.

    Returns:
        Names, the innermost first; none of them holds experts or a stack of blocks.
    """
    name = plain_name(router.name)
    found = [name]
    while name := name.rpartition(".")[0]:
        module = modules[name]
        if isinstance(module, nn.ModuleList) or experts_beside(module) is not None:
            break
        found.append(name)
    return found


def values_of(output: Any) -> tuple[Any, ...]:
    """Return what a module returned as a tuple, also if it is one tensor."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def rebuilt(output: Any, values: tuple[Any, ...]) -> Any:
    """Return other values in the form of what a module returned."""
    if not isinstance(output, tuple | list):
        return values[0]
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*values)
    return type(output)(values)


def token_dims(value: Any, tokens: int) -> int | None:
    """Count the leading dimensions that are tokens: (T, ...) or (B, S, ...).

    Args:
        value: Part of what a module returned.
        tokens: T.

    Returns:
        1 or 2, or None if the value does not have one row per token.
    """
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    if value.shape[0] == tokens:
        return 1
    if value.ndim > 2 and value.shape[0] * value.shape[1] == tokens:
        return 2
    return None


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) and (
        value.element_size() > 1
    )


def holds_choice(values: tuple[Any, ...], tokens: int, top_k: int) -> bool:
    """Whether there are K experts and K weights for each token among the values."""
    rows = [
        value
        for value in values
        if token_dims(value, tokens) and value.numel() == tokens * top_k
    ]
    experts = any(_is_integer(value) for value in rows)
    return experts and any(value.is_floating_point() for value in rows)


def holds_logits(values: tuple[Any, ...], tokens: int, width: int) -> bool:
    """Whether one value for each expert and token is among the values."""
    return any(
        token_dims(value, tokens)
        and value.is_floating_point()
        and value.numel() == tokens * width
        for value in values
    )


def raw_logits_among(
    values: tuple[Any, ...], router: nn.Module, inputs: Tensor
) -> int | None:
    """Find the raw logits among the values: those of the linear map, recomputed.

    Args:
        values: What was returned around the router, or by it.
        router: The router module.
        inputs: Its input, (..., H).

    Returns:
        Their index, or None if no value is the raw logits up to rounding.
    """
    raw = router_logits(router, inputs)
    for index, value in enumerate(values):
        dims = token_dims(value, len(raw))
        if dims is None or not value.is_floating_point():
            continue
        found = value.flatten(0, dims - 1).float()
        width = found.shape[-1]
        if found.ndim != 2 or width > raw.shape[1] or width < 2:
            continue
        expected = raw[:, :width].to(found.device)
        if (found - expected).norm() <= 1e-2 * expected.norm():
            return index
    return None
