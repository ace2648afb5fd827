# SPDX-License-Identifier: Apache-2.0
"""Runs of AutoRound that select tokens and tune nothing."""

from collections.abc import Callable
from typing import Any

from auto_round import AutoRound

from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.token_selection import SelectionDoneError, TokenSelection
from vsraq.tokens import TokenMask


def select_tokens(
    model: Any,
    dataset: Any,
    scheme: Any,
    *,
    tau: float = 1e-4,
    shift_threshold: float | None = None,
    **kwargs: Any,
) -> TokenMask:
    """Select the tokens whose output changes when a model is rounded to nearest.

        mask = vsraq.select_tokens(model, dataset, "W4A16", nsamples=128)
        config = vsraq.VSRAQConfig(objective="sra", token_mask=mask)

    The run that gets the mask needs the same calibration tokens; without a mask it
    selects them itself. SRA (method: Eq. 7, 11-12) compares what both models sample.

    Args:
        model: What `auto_round.AutoRound` takes: a model, an id or a path. Its values
            stay; AutoRound prepares a model in memory for quantization.
        dataset: What AutoRound calibrates on.
        scheme: What it would quantize to.
        tau: Tokens are selected whose Sampled-JSD is above it, nats.
        shift_threshold: And whose routing shift is above it, a fraction; None does not
            look at the routing.
        **kwargs: Other arguments of `AutoRound` (`tokenizer`, `nsamples`, `seqlen`,
            `seed`, `group_size`, `ignore_layers`, ...), the same as those of the run.

    Returns:
        The mask.

    Raises:
        ValueError: A threshold is not allowed, or the model has no MoE router.
    """
    config = VSRAQConfig(
        objective="ra",
        router_weight=1.0,
        token_selection={"tau": tau, "shift_threshold": shift_threshold},
    )
    config.select_only = True
    run = AutoRound(model, dataset=dataset, scheme=scheme, alg_configs=config, **kwargs)
    return selection_of(run.quantize).mask


def selection_of(quantize: Callable[[], object]) -> TokenSelection:
    """Start a run that has `select_only` set, and return what it selects.

    Args:
        quantize: Starts the run.

    Raises:
        RuntimeError: The run ended without selecting tokens.
    """
    try:
        quantize()
    except SelectionDoneError as done:
        return done.selection
    raise RuntimeError("AutoRound ended the run before it selected tokens")
