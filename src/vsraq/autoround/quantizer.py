# SPDX-License-Identifier: Apache-2.0
"""The tuning loop of AutoRound with a router term in its block loss.

Seams of AutoRound 0.16 used here, each pinned by a contract test: `prepare_run`,
`register_fp_input_forward_hooks`, `quantize_block`, `_get_loss`, `_step`,
`finalize_run`. Nothing is patched.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from auto_round import envs
from auto_round.algorithms.quantization.adam_round.adam import AdamRoundQuantizer
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.algorithms.quantization.sign_roundv2.quantizer import (
    SignRoundV2Quantizer,
)
from auto_round.algorithms.registry import register_pipeline_member
from auto_round.utils import check_to_quantized
from auto_round.wrapper import WrapperLinear
from torch import Tensor, nn

from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.resume_guard import guard_resume
from vsraq.capture import RouterCapture
from vsraq.losses import RankedLogits, rank_logits, reduce_tokens
from vsraq.routers import Router, declared_router_classes, find_routers

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

# A child of AutoRound's logger: its handler and level, no configuration of our own.
logger = logging.getLogger("autoround.vsraq")


def _eager() -> AbstractContextManager[None]:
    return torch.compiler.set_stance("force_eager")


class _CaptureHandle:
    """Ends the full-precision capture when AutoRound is done with its forward pass.

    AutoRound calls `remove` after a forward pass that succeeds. When it fails, the
    unwinding stack drops the list that holds this handle, and with it the hooks.

    Until then compiled code runs in eager mode: it would keep calling the hooks of the
    block that it was compiled for. One forward pass of many, so it costs little.
    """

    def __init__(self, capture: RouterCapture[RankedLogits]) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(_eager())
        self._stack.callback(capture.close)

    def remove(self) -> None:
        self._stack.close()

    def __del__(self) -> None:
        self.remove()


@dataclass
class _Losses:
    """Sums over the micro-batches of one iteration."""

    reconstruction: Tensor | float = 0.0
    router: Tensor | float = 0.0
    total: Tensor | float = 0.0
    valid_tokens: Tensor | float = 0.0
    batches: int = 0

    def mean(self) -> tuple[float, float]:
        count = max(self.batches, 1)
        return float(self.reconstruction) / count, float(self.router) / count

    def selection_value(self) -> float:
        """What AutoRound compares to find the best iteration, up to a constant."""
        return float(self.total) / max(float(self.valid_tokens), 1.0)


@dataclass
class _BlockRun:
    """The state of the block that is being tuned."""

    name: str
    block: nn.Module
    inputs: Any
    input_others: dict[str, Any]
    keep_best: bool
    q_capture: RouterCapture[Tensor]
    fp_ranks: dict[str, list[RankedLogits]]  # router -> one entry per sample
    iteration: int = 0
    current: _Losses = field(default_factory=_Losses)
    first: tuple[float, float] | None = None
    best: tuple[float, float] = (math.nan, math.nan)
    best_value: float = math.inf
    best_iteration: int = 0
    sample: int | None = None  # one that the audit may run again
    reached: int = 0
    quantized: int = 0
    reaches_something: bool = False

    def finish_iteration(self) -> None:
        if self.current.batches == 0:
            return
        mean, value = self.current.mean(), self.current.selection_value()
        if self.first is None:
            self.first = mean
        if value < self.best_value or not self.keep_best:
            self.best, self.best_value = mean, value
            self.best_iteration = self.iteration
        self.current = _Losses()
        self.iteration += 1


@register_pipeline_member(VSRAQConfig)
class VSRAQQuantizer(SignRoundQuantizer):
    """SignRound with the router term; its variants follow the config's switches."""

    config: VSRAQConfig

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
        self._objective = config.resolve_objective()
        self._seed: int | None = None
        self._layer_config: Any = None
        self._router_classes: tuple[type, ...] = ()
        self._fp_capture: RouterCapture[RankedLogits] | None = None
        self._run: _BlockRun | None = None

    @property
    def _aligns(self) -> bool:
        return self.config.router_weight > 0

    # ── Run ──────────────────────────────────────────────────────────────────

    def bind(self, orchestrator: Any) -> None:
        """Take what the run context of AutoRound does not carry."""
        super().bind(orchestrator)
        self._seed = getattr(orchestrator, "seed", None)
        self._layer_config = getattr(orchestrator, "layer_config", None)
        # AutoRound 0.16 stores nblocks on the config and never reads it from there.
        if self.config.nblocks != 1:
            orchestrator.nblocks = self.config.nblocks

    def _settings(self, composer: "AlgorithmComposer | None") -> dict[str, str]:
        """What decides the tuned weights besides AutoRound's own run signature."""
        own = {k: v for k, v in vars(self.config).items() if not k.startswith("_")}
        own |= {
            "objective": self._objective,
            "seed": self._seed,
            "batch_size": self.calibration_context.batch_size,
            "layer_config": self._layer_config,
        }
        for member in composer.members() if composer is not None else ():
            if member is not self:
                own[type(member).__name__] = vars(member.config)
        # an object's address differs in the process that resumes
        return {n: re.sub(r" at 0x[0-9a-f]+", "", str(v)) for n, v in own.items()}

    def prepare_run(self, composer: "AlgorithmComposer | None" = None) -> None:
        """Refuse before the first block what cannot work in any.

        Raises:
            ValueError: The model has no MoE router, one is to be quantized, the
                objective needs more experts than one has, or `AR_RESUME_DIR` holds an
                unfinished run with other settings.
            NotImplementedError: Its hidden states are not (batch, sequence, hidden).
        """
        super().prepare_run(composer=composer)
        if envs.AR_RESUME_DIR:
            guard_resume(envs.AR_RESUME_DIR, self._settings(composer))
        if not self._aligns:
            return
        self._router_classes = declared_router_classes(self.model)
        routers = find_routers(self.model)
        if not routers:
            raise ValueError(
                f"model={type(self.model).__name__}: it has no MoE router, so a router "
                "loss has nothing to align; allowed are MoE models; use AutoRound's "
                "SignRoundConfig for a dense one"
            )
        for router in routers:
            self._check_router(router)
        if self.compress_context.enable_torch_compile:
            # Code compiled for an earlier run of this process knows no router hook,
            # and torch.compile does not look whether there is one.
            torch.compiler.reset()
        if self.calibration_context.batch_dim != 0:
            raise NotImplementedError(
                f"batch_dim={self.calibration_context.batch_dim}: allowed is 0, hidden "
                "states of shape (batch, sequence, hidden)"
            )
        logger.info(
            "vsraq: %d routers, router_weight=%s, objective %s",
            len(routers),
            self.config.router_weight,
            self._objective,
        )

    def _check_router(self, router: Router) -> None:
        if check_to_quantized(self.model.get_submodule(router.name)):
            raise ValueError(
                f"router {router.name}: it is among the layers to quantize; allowed "
                f"are routers in full precision, so pass ignore_layers={router.name!r}"
            )
        ranks = self._objective.ranks(router.top_k, router.num_experts)
        if not max(router.top_k, 1) <= router.num_experts >= ranks:
            raise ValueError(
                f"objective {self._objective} reads {ranks} ranks of router "
                f"{router.name}: allowed is 1 to its {router.num_experts} experts"
            )

    def finalize_run(self) -> None:
        """Drop what a run left behind; safe to call twice."""
        super().finalize_run()
        self._drop_fp_capture()
        self._run = None

    # ── Full-precision side ──────────────────────────────────────────────────

    def register_fp_input_forward_hooks(self, block: nn.Module) -> list[Any]:
        """Capture the full-precision ranks during AutoRound's reference forward."""
        handles = super().register_fp_input_forward_hooks(block)
        self._drop_fp_capture()
        routers = self._routers_of(block)
        if routers:
            self._fp_capture = self._open_fp_capture(block, routers)
            handles.append(_CaptureHandle(self._fp_capture))
        return handles

    def _routers_of(self, block: nn.Module) -> tuple[Router, ...]:
        if not self._aligns:
            return ()
        return find_routers(block, router_classes=self._router_classes)

    def _open_fp_capture(
        self, block: nn.Module, routers: Sequence[Router]
    ) -> RouterCapture[RankedLogits]:
        cache_device = self.compress_context.cache_device

        def keep(router: Router, logits: Tensor) -> RankedLogits:
            ranks = self._objective.ranks(router.top_k, router.num_experts)
            return rank_logits(logits, ranks).to(cache_device)

        return RouterCapture(block, routers, keep).open()

    def _drop_fp_capture(self) -> None:
        if self._fp_capture is not None:
            self._fp_capture.close()
            self._fp_capture = None

    def _take_fp_ranks(
        self,
        name: str,
        block: nn.Module,
        inputs: Any,
        input_others: dict[str, Any],
        fp_outputs: Sequence[Tensor],
        q_inputs: Any,
    ) -> dict[str, list[RankedLogits]]:
        """Full-precision ranks of every router, split by sample."""
        capture = self._fp_capture
        self._fp_capture = None
        if capture is None:
            raise RuntimeError(
                f"block {name}: its full-precision forward was not announced; allowed "
                "are runs through AutoRound 0.16's compress_block"
            )
        try:
            kept = capture.take()
        except RuntimeError as error:
            if q_inputs is not None:
                raise RuntimeError(
                    f"block {name}: no full-precision router logits were captured, and "
                    "its inputs are the quantized stream, so they cannot be derived; "
                    "let AutoRound run the reference forward (reference_output=None) "
                    f"if the caller skips it; else: {error}"
                ) from error
            # The caller passed reference_output and so skipped AutoRound's forward.
            with capture, torch.no_grad(), _eager():
                self.block_forward.forward(block, inputs, input_others)
                kept = capture.take()
        tokens = [output.numel() // output.shape[-1] for output in fp_outputs]
        return {
            router: _split_samples(name, router, calls, tokens)
            for router, calls in kept.items()
        }

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

        def tune() -> dict[str, Any]:
            return super(VSRAQQuantizer, self).quantize_block(
                block,
                fp_inputs,
                input_others,
                fp_outputs,
                q_inputs,
                block_ctx,
                *args,
                **kwargs,
            )

        routers = self._routers_of(block)
        if not routers:
            return tune()
        use_q = q_inputs is not None and self.enable_quanted_input
        inputs = q_inputs if use_q else fp_inputs
        name = "+".join(block_ctx.block_names)
        fp_ranks = self._take_fp_ranks(
            name, block, fp_inputs, input_others, fp_outputs, q_inputs
        )
        with RouterCapture[Tensor](block, routers) as q_capture:
            run = self._run = _BlockRun(
                name=name,
                block=block,
                inputs=inputs,
                input_others=input_others,
                keep_best=not self.not_use_best_mse,
                q_capture=q_capture,
                fp_ranks=fp_ranks,
            )
            try:
                best_params = tune()
            finally:
                self._run = None
        run.finish_iteration()  # an early stop skips the last _step
        self._log(run)
        return best_params

    def _get_loss(
        self,
        pred_output: Tensor,
        ref_output: Tensor,
        indices: Any,
        loss_func: Callable[..., Tensor],
        device: str | torch.device = "cpu",
        valid_token_mask: list[Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """AutoRound's loss of a micro-batch plus the weighted router loss."""
        reconstruction = super()._get_loss(
            pred_output,
            ref_output,
            indices,
            loss_func,
            device,
            valid_token_mask,
            *args,
            **kwargs,
        )
        run = self._run
        if run is None:
            return reconstruction
        router, valid = self._router_loss(run, indices, valid_token_mask)
        router = router.to(reconstruction.device)
        # With gradient accumulation AutoRound sums the error over all elements instead
        # of averaging it, and its average divides by masked elements too. The router
        # term follows both, so that the ratio of the two losses stays.
        scale = pred_output.numel() if self._reconstruction_is_sum(loss_func) else 1
        share: Tensor | float = 1.0
        if valid is not None:
            valid = valid.to(reconstruction.device)
            share = valid.sum() / valid.numel()
        total = reconstruction + self.config.router_weight * scale * share * router
        if not torch.isfinite(total):
            raise RuntimeError(
                f"block {run.name}, iteration {run.iteration}: loss is "
                f"{total.item()} (reconstruction {reconstruction.item()}, router "
                f"{router.item()}); allowed are finite values; look for inf or NaN in "
                "the block's weights and calibration inputs, or lower lr"
            )
        if run.sample is None:
            run.sample = int(indices[0])
        run.current.reconstruction += reconstruction.detach() / scale
        run.current.router += router.detach()
        run.current.total += total.detach()
        # Without a mask AutoRound divides by a constant, which selects the same best.
        run.current.valid_tokens += 0.0 if valid is None else valid.sum()
        run.current.batches += 1
        return total

    def _reconstruction_is_sum(self, loss_func: Callable[..., Tensor]) -> bool:
        # AutoRound's outlier-suppressed loss (alg_ext) averages whatever loss_func is.
        if getattr(self, "_use_outlier_suppressed_loss", False):
            return False
        return getattr(loss_func, "reduction", "mean") == "sum"

    def _router_loss(
        self, run: _BlockRun, indices: Any, valid_token_mask: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean over routers and valid tokens, and the mask of the tokens (T,)."""
        samples = [int(i) for i in indices]
        mask: Tensor | None = None
        if valid_token_mask:
            mask = torch.cat([valid_token_mask[i].flatten() for i in samples])
        losses = []
        q_kept = run.q_capture.take()
        for router in run.q_capture.routers:
            q_logits = torch.cat(q_kept[router.name])
            fp_ranks = run.fp_ranks[router.name]
            fp = _concatenate([fp_ranks[i] for i in samples]).to(q_logits.device)
            loss = self._objective(q_logits, fp, top_k=router.top_k)
            device_mask = None if mask is None else mask.to(loss.device)
            losses.append(reduce_tokens(loss, device_mask))
        mean = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
        return mean, mask

    def _audit_reach(self, run: _BlockRun) -> None:
        """Count the quantized layers that the block's router logits depend on."""
        wrapped = [m for m in run.block.modules() if hasattr(m, "orig_layer")]
        # norms are wrapped too where enable_norm_bias_tuning tunes them
        linear = [isinstance(module, WrapperLinear) for module in wrapped]
        layers = [
            [p for p in vars(m)["params"].values() if p.requires_grad] for m in wrapped
        ]
        run.quantized = sum(linear)
        # One sample, in eager mode: no second graph in memory, none to compile.
        with torch.enable_grad(), _eager():
            self.block_forward.forward(
                run.block, run.inputs, run.input_others, torch.tensor([run.sample])
            )
            kept = [
                logits for calls in run.q_capture.take().values() for logits in calls
            ]
            probe = torch.stack([logits.square().sum().cpu() for logits in kept]).sum()
        if not probe.requires_grad:
            return
        flat = [parameter for layer in layers for parameter in layer]
        gradients = iter(torch.autograd.grad(probe, flat, allow_unused=True))
        for layer, is_linear in zip(layers, linear, strict=True):
            reached = any([next(gradients) is not None for _ in layer])
            run.reached += reached and is_linear
            run.reaches_something |= reached

    def _step(self, scaler: Any, optimizer: Any, lr_schedule: Any) -> None:
        run = self._run
        if run is not None:
            if run.iteration == 0:  # after the backward pass: its graph is gone
                self._audit_reach(run)
            run.finish_iteration()
        super()._step(scaler, optimizer, lr_schedule)

    def _log(self, run: _BlockRun) -> None:
        if run.first is None:
            logger.warning(
                "vsraq: %s: no layer was tuned, so its router was not aligned", run.name
            )
            return
        logger.info(
            "vsraq: %s: reconstruction %.3e -> %.3e, router %.3e -> %.3e "
            "(iter 0 -> %d), router loss reaches %d of %d quantized layers",
            run.name,
            run.first[0],
            run.best[0],
            run.first[1],
            run.best[1],
            run.best_iteration,
            run.reached,
            run.quantized,
        )
        if not run.reaches_something:
            logger.warning(
                "vsraq: %s: the router loss reaches no quantized layer of this block, "
                "because none stands before its router; the router term had no effect "
                "there",
                run.name,
            )


class _VSRAQAdamQuantizer(VSRAQQuantizer, AdamRoundQuantizer):
    """The router term on AutoRound's Adam variant (`enable_adam`)."""


class _VSRAQV2Quantizer(VSRAQQuantizer, SignRoundV2Quantizer):
    """The router term on AutoRound's algorithm extension (`enable_alg_ext`)."""


def _split_samples(
    block: str, router: str, calls: Sequence[RankedLogits], tokens: Sequence[int]
) -> list[RankedLogits]:
    ranks = _concatenate(calls)
    captured = ranks.values.shape[0]
    if captured != sum(tokens):
        raise RuntimeError(
            f"block {block}: router {router} saw {captured} tokens, the block "
            f"{sum(tokens)}; allowed is every token exactly once"
        )
    if not torch.isfinite(ranks.values).all():
        raise RuntimeError(
            f"block {block}: router {router} has non-finite full-precision logits; "
            "look for inf or NaN in the model's weights or the calibration inputs"
        )
    return [
        RankedLogits(values, indices, ranks.num_experts)
        for values, indices in zip(
            ranks.values.split(list(tokens)),
            ranks.indices.split(list(tokens)),
            strict=True,
        )
    ]


def _concatenate(parts: Sequence[RankedLogits]) -> RankedLogits:
    return RankedLogits(
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        parts[0].num_experts,
    )
