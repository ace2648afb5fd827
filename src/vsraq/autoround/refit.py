# SPDX-License-Identifier: Apache-2.0
"""Re-fit the routers of a block that has just been tuned."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from torch import Tensor, nn

from vsraq.capture import router_input
from vsraq.full_precision import eager
from vsraq.options import RefitSettings
from vsraq.realignment import Refit, refit_router
from vsraq.realignment.logits import REFIT_BYTES
from vsraq.realignment.record import router_weight
from vsraq.router_terms import BlockTensors
from vsraq.routers import BoundRouter
from vsraq.tokens.counted import CountedTokens

logger = logging.getLogger("autoround.vsraq")


def refit_in_block(
    block: nn.Module,
    router: BoundRouter,
    fp_logits: Sequence[Tensor],
    tensors: BlockTensors,
    tokens: CountedTokens,
    runner: BlockForwardRunner,
    settings: RefitSettings,
) -> tuple[Refit, dict[str, Tensor]]:
    """Re-fit one router of the tuned block, before its output feeds the next.

    Args:
        block: The block.
        router: The router, named as in the model.
        fp_logits: Full-precision logits of the first samples, (T, E) each.
        tensors: What the block was tuned with.
        tokens: Which tokens count.
        runner: AutoRound's, for its batches, precision and device.
        settings: Its ridge and weighting.

    Returns:
        What the re-fit did, and the new weight, (E, H), on the CPU, by its name in the
        model; empty if the old one stays.

    Raises:
        ValueError: There are fewer than two samples with tokens that count.
        RuntimeError: The system cannot be solved.
    """
    if len(fp_logits) < len(tensors.fp_outputs):
        logger.info(
            "vsraq: router %s: re-fitted on the first %d of %d samples, whose "
            "logits are %d MB",
            router.name,
            len(fp_logits),
            len(tensors.fp_outputs),
            REFIT_BYTES // 10**6,
        )

    def samples() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for batch in tensors.batches(runner.batch_size, len(fp_logits)):
            forward = partial(
                runner.forward,
                block,
                tensors.inputs,
                tensors.others,
                torch.tensor(batch),
            )
            hidden_states = router_input(router.module, forward)
            logits = [fp_logits[i] for i in batch]
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            inputs = flat.split([len(z) for z in logits])
            for i, x, z in zip(batch, inputs, logits, strict=True):
                yield x, z, tokens.counted([i])

    with torch.no_grad(), eager():
        refit = refit_router(
            router,
            samples(),
            ridge=settings.ridge,
            weighting=settings.weighting,
        )
    logger.info("vsraq: %s", refit)
    if not refit.applied:
        return refit, {}
    weight_name, weight = router_weight(router.name, router.module)
    return refit, {weight_name: weight.detach().to("cpu", copy=True)}
