# SPDX-License-Identifier: Apache-2.0
"""Experts: how many there are, and which modules hold them.

Experts are recognised by their layout: numbered copies of one module, or matrices of
all experts in one stack, (E, ...).
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vsraq.routers.router import Router


def expert_containers(module: nn.Module, routers: Iterable[Router]) -> tuple[str, ...]:
    """Find the modules that hold the experts which routers choose from.

    Args:
        module: The module that the routers were found in.
        routers: Its routers.

    Returns:
        Qualified names, in module order.
    """
    by_router = experts_of_routers(module, routers).values()
    names = {name for names in by_router for name in names}
    if len(names) < 2:
        return tuple(names)
    return tuple(name for name, _ in module.named_modules() if name in names)


def experts_of_routers(
    module: nn.Module, routers: Iterable[Router]
) -> dict[str, tuple[str, ...]]:
    """Find the modules that hold each router's experts, in one walk of the module.

    Args:
        module: The module that the routers were found in.
        routers: Its routers.

    Returns:
        Qualified names by router name; routers whose experts are of a layout that is
        not recognised are missing.
    """
    wanted = {router.name for router in routers}
    found: dict[str, tuple[str, ...]] = {}
    for parent_name, parent in module.named_modules():
        num_experts = experts_beside(parent)
        if num_experts is None:
            continue
        prefix = f"{parent_name}." if parent_name else ""
        below = {f"{prefix}{name}" for name, _ in children_below(parent)}
        names = tuple(
            f"{prefix}{name}"
            for name, child in parent.named_children()
            if _count_experts(child) == num_experts or _stacked(child) == [num_experts]
        )
        for router in wanted & below:
            found[router] = (*found.get(router, ()), *names)
    return found


def count_experts(module: nn.Module, router: Router) -> int:
    """Count the experts: a router may also choose things that are not experts.

    Args:
        module: The module that the router was found in.
        router: The router.

    Returns:
        Experts with weights; E if they are of a layout that is not recognised.
    """
    for name in expert_containers(module, [router]):
        parent = module.get_submodule(name.rpartition(".")[0])
        return experts_beside(parent) or router.num_experts
    return router.num_experts


def experts_beside(parent: nn.Module) -> int | None:
    """Return E if direct children of `parent` hold experts, else None."""
    for child in parent.children():
        num_experts = _count_experts(child)
        if num_experts is not None:
            return num_experts
    # one module for each matrix of all experts
    matrices = [stack[0] for c in parent.children() if len(stack := _stacked(c)) == 1]
    return matrices[0] if len(matrices) >= 2 and len(set(matrices)) == 1 else None


def _stacked(module: nn.Module) -> list[int]:
    """List the first dimensions of the stacks of matrices that a module holds."""
    if isinstance(module, _ConvNd):
        return []
    return [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]


def _count_experts(module: nn.Module) -> int | None:
    """Count the experts in a container of experts; None for anything else."""
    fused = _stacked(module)
    if len(fused) >= 2:
        return max(fused)  # the identities of zero experts need no second matrix
    numbered = [child for name, child in module.named_children() if name.isdecimal()]
    # Experts are copies of each other and hold nothing but linear layers and an
    # activation; decoder layers also fit the first half, so the caller looks for the
    # router too.
    if len(numbered) >= 2 and len({type(child) for child in numbered}) == 1:
        return len(numbered)
    return None


def children_below(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all submodules of `parent` but experts and those beside other experts."""
    for name, child in parent.named_children():
        if _count_experts(child) is None and experts_beside(child) is None:
            yield name, child
            for below, module in children_below(child):
                yield f"{name}.{below}", module


def rows_of(module: nn.Module) -> int:
    """Count the rows of a module's weight, 0 if it has none."""
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0
