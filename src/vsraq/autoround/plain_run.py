# SPDX-License-Identifier: Apache-2.0
"""Watch a run of plain AutoRound, which has no callbacks of its own.

Methods of the run's objects are wrapped; what they compute stays as it is.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

from vsraq.autoround.resumable import block_count, model_and_scheme
from vsraq.callbacks import Callback
from vsraq.realignment.exported_routers import around_saving
from vsraq.run_inside import run_inside
from vsraq.run_record.file import run_file, write_run
from vsraq.run_record.loss_curves import RECONSTRUCTION
from vsraq.run_record.peak_memory import peak_mebibytes
from vsraq.run_record.recorder import RunRecorder


def watch_plain_run(orchestrator: Any, callbacks: Sequence[Callback] = ()) -> None:
    """Record a run with AutoRound's own algorithm, and tell callbacks of it.

    With `iters=0` AutoRound tunes nothing, and nothing but the time is recorded.

    Args:
        orchestrator: What `AutoRound(...)` has returned, before it quantizes.
        callbacks: Who hears of it.
    """
    recorder = RunRecorder(callbacks)

    @contextmanager
    def tuning() -> Iterator[None]:
        quantizer = orchestrator.alg_composer.block_quantizer
        if isinstance(quantizer, SignRoundQuantizer):  # not rounding to nearest
            _watch_blocks(quantizer, recorder)
            blocks = block_count(orchestrator)
            recorder.start(*model_and_scheme(orchestrator), blocks, quantizer.iters)
        yield

    def save(folders: list[Path]) -> None:
        model, scheme = model_and_scheme(orchestrator)
        content = run_file(
            model=model,
            scheme=scheme,
            seconds=recorder.seconds,
            peak_mebibytes=peak_mebibytes(),
            blocks=recorder.blocks,
            coverage=None,
        )
        for folder in folders:
            write_run(folder, content)

    run_inside(orchestrator, "quantize", recorder.running)
    run_inside(orchestrator, "_quantize_data_driven", tuning)
    around_saving(orchestrator, lambda _folder: None, save)


def _watch_blocks(quantizer: Any, recorder: RunRecorder) -> None:
    """Wrap the methods of one quantizer that AutoRound calls for blocks and steps."""
    quantize_block: Callable[..., Any] = quantizer.quantize_block
    get_loss: Callable[..., Any] = quantizer._get_loss

    @functools.wraps(quantize_block)
    def watched_block(*args: Any, **kwargs: Any) -> Any:
        block_ctx = args[5]  # by position, see the contract test
        name, keep_best = (
            "+".join(block_ctx.block_names),
            not quantizer.not_use_best_mse,
        )
        recorder.start_block(name, quantizer.iters, keep_best=keep_best)
        best_params = quantize_block(*args, **kwargs)
        recorder.end_iteration()  # an early stop skips the last _step
        recorder.end_block({}, ())
        recorder.announce()
        return best_params

    @functools.wraps(get_loss)
    def watched_loss(output: Any, *args: Any, **kwargs: Any) -> Any:
        loss = get_loss(output, *args, **kwargs)
        _reference, indices, loss_func, _device, masks = args
        is_sum = getattr(loss_func, "reduction", "mean") == "sum"
        is_sum &= not getattr(quantizer, "_use_outlier_suppressed_loss", False)
        valid = sum(masks[int(i)].sum() for i in indices) if masks else None
        if recorder.curves is not None:
            scale = output.numel() if is_sum else 1
            recorder.curves.add(RECONSTRUCTION, loss / scale)
            recorder.curves.end_batch(loss, valid)
        return loss

    @contextmanager
    def step() -> Iterator[None]:
        recorder.end_iteration()
        yield

    quantizer.quantize_block = watched_block
    quantizer._get_loss = watched_loss
    run_inside(quantizer, "_step", step)
