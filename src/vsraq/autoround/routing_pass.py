# SPDX-License-Identifier: Apache-2.0
"""Which experts the tokens of the quantized stream choose, before a block is tuned."""

from collections.abc import Sequence
from functools import partial

import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from torch import Tensor, nn

from vsraq.capture import RouterCapture, router_input
from vsraq.full_precision import eager
from vsraq.router_terms import BlockTensors
from vsraq.routers import BoundRouter, Router


def selected_experts(
    block: nn.Module,
    routers: Sequence[Router],
    tensors: BlockTensors,
    runner: BlockForwardRunner,
) -> dict[str, Tensor]:
    """Run a block on its inputs up to its router, and keep the router's selection.

    With one router no expert is computed. Several blocks at once are run as a whole.

    Args:
        block: The block, not tuned yet.
        routers: Those of its routers whose rule is known, named relative to it.
        tensors: Its inputs.
        runner: AutoRound's, for its batches, precision and device.

    Returns:
        By router name, the experts of every token, (T, K), int16, in sample order.
    """
    if not routers:
        return {}

    def choose(router: BoundRouter, logits: Tensor) -> Tensor:
        return router.select(logits).to(runner.cache_device, torch.int16)

    def forward(samples: list[int]) -> object:
        return runner.forward(
            block, tensors.inputs, tensors.others, torch.tensor(samples)
        )

    only = block.get_submodule(routers[0].name) if len(routers) == 1 else None
    capture = RouterCapture(block, routers, choose)
    with capture, torch.no_grad(), eager():
        for samples in tensors.batches(runner.batch_size):
            if only is None:
                forward(samples)
            else:
                router_input(only, partial(forward, samples))
        return {name: torch.cat(calls) for name, calls in capture.take().items()}
