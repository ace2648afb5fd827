# SPDX-License-Identifier: Apache-2.0
"""AutoRound's tuning algorithm with router terms in its block loss.

Seams of AutoRound 0.16 used here, each pinned by a contract test: `bind`,
`bind_block_forward_runner`, `prepare_run`, `register_fp_input_forward_hooks`,
`quantize_block`, `_get_loss`, `_get_non_zero_cnt`, `_step`, `finalize_run`. Where
AutoRound has none, a method of one of the run's objects is wrapped: block forward,
calibration (`cache_data`), `wrapper_block` while a block is tuned, and what saves the
export. No class of AutoRound is changed, and of its modules only `calib_dataset`: our
data sets are registered there, and its `get_dataset` is wrapped (`calibration_data`).
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from auto_round.algorithms.quantization.adam_round.adam import AdamRoundQuantizer
from auto_round.algorithms.quantization.sign_roundv2.quantizer import (
    SignRoundV2Quantizer,
)
from auto_round.algorithms.registry import register_pipeline_member
from torch import Tensor, nn

from vsraq.autoround.after_wrapping import after_wrapping
from vsraq.autoround.aligned_block import AlignedBlock, without_checkpointing
from vsraq.autoround.alignment_run import AlignmentRun
from vsraq.autoround.block_tuning import BlockTuning, valid_tokens
from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.several_processes import SeveralProcesses
from vsraq.full_precision import FpRouters, FullPrecisionCapture
from vsraq.processes import with_common_value
from vsraq.realignment.exported_routers import around_saving
from vsraq.resume.disk_errors import explain_disk_errors
from vsraq.router_terms import BlockTensors
from vsraq.run_inside import run_inside
from vsraq.run_record.loss_curves import RECONSTRUCTION
from vsraq.tokens import TokenMask
from vsraq.tokens.counted import CountedTokens

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

# A child of AutoRound's logger, so it has that one's handler and level.
logger = logging.getLogger("autoround.vsraq")


@register_pipeline_member(VSRAQConfig)
class VSRAQQuantizer(SeveralProcesses):
    """SignRound with router alignment; its variants follow the config's switches.

    Attributes:
        run: What the blocks of this run share, from `bind` on.
        tuning: The block that is being tuned, None between blocks.
    """

    config: VSRAQConfig
    run: AlignmentRun
    tuning: BlockTuning | None = None

    def __new__(cls, config: VSRAQConfig) -> "VSRAQQuantizer":
        """Choose the variant that the configuration asks for."""
        if cls is VSRAQQuantizer and config.enable_adam:
            cls = _VSRAQAdamQuantizer
        elif cls is VSRAQQuantizer and config.enable_alg_ext:
            cls = _VSRAQV2Quantizer
        return super().__new__(cls)

    def __init__(self, config: VSRAQConfig) -> None:
        config.check_alignment()
        super().__init__(config)
        self._fp_capture: FullPrecisionCapture | None = None
        self._step_samples: list[int] = []  # of the step, over all micro-batches

    @property
    def token_mask(self) -> TokenMask | None:
        """The tokens that the routers of the run are aligned on, None for all."""
        return self.run.token_mask

    @property
    def _tokens(self) -> CountedTokens:
        valid_masks = getattr(self, "_cached_valid_token_mask", None)
        return CountedTokens(valid_masks, self.token_mask)

    # ── Run ──────────────────────────────────────────────────────────────────

    def bind(self, orchestrator: Any) -> None:
        """Begin a run."""
        super().bind(orchestrator)
        self.run = AlignmentRun(self.config, orchestrator)
        # AutoRound 0.16 stores nblocks on the config and never reads it from there.
        if self.config.nblocks != 1:
            orchestrator.nblocks = self.config.nblocks
        around_saving(orchestrator, self.run.start_export, self.run.finish_exports)
        explain_disk_errors(orchestrator)

    def prepare_run(self, composer: "AlgorithmComposer | None" = None) -> None:
        """Refuse what cannot work in any block; see `AlignmentRun.prepare`."""
        self.run.end_calibration()
        super().prepare_run(composer=composer)
        self.run.prepare(composer, self)

    def finalize_run(self) -> None:
        """Drop what a run left behind; safe to call twice."""
        self._fp_capture = None
        self.tuning = None
        self.run.finish()
        super().finalize_run()

    # ── Full-precision side ──────────────────────────────────────────────────

    def bind_block_forward_runner(self, block_forward_runner: Any) -> None:
        """Let AutoRound's next reference forward run inside a capture."""
        super().bind_block_forward_runner(block_forward_runner)
        run_inside(block_forward_runner, "forward", self._reference_forward)

    def _reference_forward(self) -> AbstractContextManager[None]:
        capture = self._fp_capture
        if capture is None or not capture.is_awaiting:
            return nullcontext()
        return capture.running()

    def register_fp_input_forward_hooks(self, block: nn.Module) -> list[Any]:
        """Await AutoRound's reference forward, in which full precision is captured.

        No hook is registered here: AutoRound removes hooks only when the forward pass
        that they are for succeeds.
        """
        handles = super().register_fp_input_forward_hooks(block)
        run = self.run
        routers = run.routers_of(block)
        self._fp_capture = None
        if routers:
            self._fp_capture = FullPrecisionCapture(
                block,
                routers,
                run.alignment,
                run.alignment.own_objective,
                self.compress_context.cache_device,
            )
            handles.append(self._fp_capture)
        return handles

    # ── Tuning ───────────────────────────────────────────────────────────────

    def quantize_block(
        self,
        block: nn.Module,
        fp_inputs: Any,
        input_others: dict[str, Any],
        fp_outputs: Any,
        q_inputs: Any,
        block_ctx: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tune one block; a block without a router is plain AutoRound."""
        given = fp_inputs, input_others, fp_outputs, q_inputs, block_ctx
        tune = partial(super().quantize_block, block, *given, *args, **kwargs)
        run, on_q_inputs = self.run, self.enable_quanted_input
        run.start_block(block_ctx, lacks_inputs=q_inputs is None and on_q_inputs)
        run.prepare_lone_block()
        name, keep_best = "+".join(block_ctx.block_names), not self.not_use_best_mse
        run.recorder.start_block(name, self.iters, keep_best=keep_best)
        self._find_valid_tokens(kwargs.get("input_ids"))
        if not run.alignment:
            best_params = tune()
            run.recorder.end_iteration()  # an early stop skips the last _step
            run.end_block(block_ctx)
            return best_params
        quantized_stream = q_inputs is not None and on_q_inputs
        inputs = q_inputs if quantized_stream else fp_inputs
        aligned = AlignedBlock(
            block,
            block_ctx.block_names,
            run.routers_of(block),
            BlockTensors(inputs, input_others, fp_outputs),
            self._tokens,
            run,
            self.block_forward,
        )
        aligned.check_routers()
        capture, self._fp_capture = self._fp_capture, None
        fp_routers = aligned.fp_routers(capture, derivable=q_inputs is None)
        aligned.count_tokens(fp_routers, quantized_stream=quantized_stream)
        best_params, weights = self._tune(tune, aligned, fp_routers)
        refits = aligned.refit(fp_routers)
        names = [aligned.full_name(router) for router in aligned.routers]
        run.end_block(block_ctx, names, weights, refits)
        return best_params

    def _find_valid_tokens(self, input_ids: list[Tensor] | None) -> None:
        """Compute AutoRound's token mask now, before the first block is tuned."""
        if input_ids is not None and not hasattr(self, "_cached_valid_token_mask"):
            self._cached_valid_token_mask = self._compute_valid_token_mask(input_ids)

    def _tune(
        self,
        tune: Callable[[], dict[str, Any]],
        block: AlignedBlock,
        fp_routers: FpRouters,
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Run AutoRound's loop with the terms of a block; return their weights too."""
        recorder = self.run.recorder
        assert recorder.curves is not None, "a block is tuned that was not started"
        # an automatic device map keeps the block's output off a device that is full
        device = getattr(self, "_loss_device", None) or self.block_forward.device
        with ExitStack() as stack:
            both = block.own_term(fp_routers, stack), block.next_term(device)
            terms = [term for term in both if term is not None]
            if not terms:
                best_params = tune()
                recorder.end_iteration()
                return best_params, {}
            curves = recorder.curves
            tuning = BlockTuning(block, terms, curves)
            stack.callback(setattr, self, "tuning", None)
            stack.enter_context(without_checkpointing(block.module))
            stack.enter_context(after_wrapping(self, partial(self._start, tuning)))
            best_params = tune()
        recorder.end_iteration()  # an early stop skips the last _step
        tuning.log(curves.curves())
        return best_params, tuning.weights

    def _start(self, tuning: BlockTuning, block: nn.Module) -> None:
        """Probe the terms of a block whose layers are wrapped, and switch them on."""
        valid_masks = self._tokens.valid_masks

        def reconstruction(
            output: Tensor, reference: Tensor, samples: list[int]
        ) -> Any:
            return super(VSRAQQuantizer, self)._get_loss(
                output, reference, samples, nn.MSELoss(), output.device, valid_masks
            )

        steps = self.gradient_accumulate_steps
        tuning.probe(block, steps, reconstruction, self.run.alignment.auto_ratio)
        self.tuning = tuning

    # ── Inside AutoRound's loop ──────────────────────────────────────────────

    def _get_loss(
        self,
        pred_output: Tensor,
        ref_output: Tensor,
        indices: Any,
        loss_func: Callable[..., Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Add the weighted router losses to AutoRound's loss of a micro-batch."""
        reconstruction = super()._get_loss(
            pred_output, ref_output, indices, loss_func, *args, **kwargs
        )
        samples = [int(i) for i in indices]
        # With gradient accumulation AutoRound sums the error over all elements instead
        # of averaging it. The router terms are scaled alike, so their ratio stays.
        scale = pred_output.numel() if self._reconstruction_is_sum(loss_func) else 1
        if self.tuning is None:
            reconstruction = with_common_value(reconstruction)
            self._record_plain(reconstruction, samples, scale)
            return reconstruction
        return self.tuning.total_loss(
            reconstruction, pred_output, samples, self._step_of(samples), scale
        )

    def _record_plain(self, loss: Tensor, samples: list[int], scale: int) -> None:
        """Record AutoRound's loss of a micro-batch that has no router loss."""
        curves = self.run.recorder.curves
        if curves is None:  # outside a block
            return
        curves.add(RECONSTRUCTION, loss / scale)
        curves.end_batch(loss, valid_tokens(self._tokens, samples, loss.device))

    def _get_non_zero_cnt(self, tensor: list[Tensor], indices: list[int]) -> float:
        """Return AutoRound's count of a step's valid tokens, and keep its samples."""
        self._step_samples = [int(i) for i in indices]
        return super()._get_non_zero_cnt(tensor, indices)

    def _step_of(self, samples: list[int]) -> list[int]:
        """Return all samples of the step that a micro-batch is in.

        Without a mask (single blocks, from llm-compressor) AutoRound does not say which
        these are. Every token counts there, so a micro-batch can stand for its step.

        Raises:
            RuntimeError: AutoRound did not say which, and only some tokens count.
        """
        if self.gradient_accumulate_steps == 1:
            return samples
        if set(samples) <= set(self._step_samples):
            return self._step_samples
        if self.token_mask is None:
            return samples
        raise RuntimeError(
            "AutoRound did not say which samples a step has, so the mean over its "
            "selected tokens is unknown; allowed with token selection is "
            "gradient_accumulate_steps=1 here"
        )

    def _reconstruction_is_sum(self, loss_func: Callable[..., Tensor]) -> bool:
        # AutoRound's outlier-suppressed loss (alg_ext) averages, whatever loss_func is.
        if getattr(self, "_use_outlier_suppressed_loss", False):
            return False
        return getattr(loss_func, "reduction", "mean") == "sum"

    def _step(self, scaler: Any, optimizer: Any, lr_schedule: Any) -> None:
        self.run.recorder.end_iteration()
        super()._step(scaler, optimizer, lr_schedule)


class _VSRAQAdamQuantizer(VSRAQQuantizer, AdamRoundQuantizer):
    """Router alignment on AutoRound's Adam variant (`enable_adam`)."""


class _VSRAQV2Quantizer(VSRAQQuantizer, SignRoundV2Quantizer):
    """Router alignment on AutoRound's algorithm extension (`enable_alg_ext`)."""
