# SPDX-License-Identifier: Apache-2.0
"""The tuning loop of AutoRound with router terms in its block loss.

Seams of AutoRound 0.16 used here, each pinned by a contract test: `prepare_run`,
`register_fp_input_forward_hooks`, `quantize_block`, `wrapper_block`, `_get_loss`,
`_step`, `finalize_run`. Nothing is patched.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from auto_round.algorithms.quantization.adam_round.adam import AdamRoundQuantizer
from auto_round.algorithms.quantization.sign_roundv2.quantizer import (
    SignRoundV2Quantizer,
)
from auto_round.algorithms.registry import register_pipeline_member
from auto_round.utils import get_block_names
from torch import Tensor, nn

from vsraq.autoround.aligned_tokens import AlignedTokens
from vsraq.autoround.balance import balance_terms
from vsraq.autoround.block_records import BlockRecord
from vsraq.autoround.checks import (
    check_next_router,
    check_router,
    check_run,
    check_selection,
    check_smoothing,
    check_stream,
    check_weighting,
    within_reach,
)
from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.disk_errors import explain_disk_errors
from vsraq.autoround.expert_coverage import RunCoverage
from vsraq.autoround.exported_routers import around_saving, restore_refitted_routers
from vsraq.autoround.full_precision import (
    FpRouters,
    FullPrecisionCapture,
    eager,
    ranking_of,
)
from vsraq.autoround.hybrids import adapt_attention_mask
from vsraq.autoround.next_router import (
    NextRouter,
    find_next_router,
    load_without_experts,
    shares_a_batch,
)
from vsraq.autoround.output_folder import set_leftovers_aside
from vsraq.autoround.process_checks import (
    check_exporter,
    check_processes,
    model_settings,
)
from vsraq.autoround.refit_logits import REFIT_BYTES
from vsraq.autoround.resumable import export_folders, open_run
from vsraq.autoround.resume_guard import ResumableRun
from vsraq.autoround.routing_pass import selected_experts
from vsraq.autoround.several_processes import SeveralProcesses
from vsraq.autoround.step import SampleTokens, count_tokens
from vsraq.autoround.terms import (
    NEXT_ROUTER,
    OWN_ROUTER,
    BlockRun,
    BlockTensors,
    RouterTerm,
    split_samples,
)
from vsraq.capture import RouterCapture, router_input
from vsraq.losses import FpLogits
from vsraq.options import Alignment
from vsraq.processes import (
    mean_over_processes,
    process_count,
    with_common_value,
)
from vsraq.realignment import refit_router
from vsraq.realignment_record import drop_record, record_realignment, router_weight
from vsraq.routers import (
    Router,
    count_experts,
    declared_router_classes,
    find_routers,
    routers_inside,
)
from vsraq.token_selection import TokenMask

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

# A child of AutoRound's logger: its handler and level, no configuration of our own.
logger = logging.getLogger("autoround.vsraq")


def _full_name(blocks: Sequence[str], router: str) -> str:
    """A router's name in the model, from its name in one block or several at once."""
    if len(blocks) == 1:
        return f"{blocks[0]}.{router}"
    _layers, index, own = router.split(".", 2)  # AutoRound's WrapperMultiblock
    return f"{blocks[int(index)]}.{own}"


@contextmanager
def _without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Let a backward pass not run the block, and so its routers, once more.

    AutoScheme leaves gradient checkpointing on in the model that it has scored.
    """
    checkpointed = [
        module
        for module in block.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@register_pipeline_member(VSRAQConfig)
class VSRAQQuantizer(SeveralProcesses):
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
        self._objective = config.alignment.own_objective
        self._next_objective = config.alignment.next_objective
        self._orchestrator: Any = None
        self._routers: tuple[Router, ...] = ()
        self._seed: int | None = None
        self._layer_config: Any = None
        self._groups: list[list[str]] | None = None
        self._router_classes: tuple[type, ...] = ()
        self._fp_capture: FullPrecisionCapture | None = None
        self._coverage = RunCoverage()
        self._run: BlockRun | None = None
        self._step_samples: list[int] = []  # of the step, over all micro-batches
        self._aligned_tokens: AlignedTokens | None = None
        self._checked = False
        # weights by parameter name, on the CPU until the last export
        self._refitted: dict[str, Tensor] = {}
        self._owns_output = False
        self._resumable: ResumableRun | None = None
        self._done = 0  # blocks that a killed run has tuned

    @property
    def _alignment(self) -> Alignment:
        return self.config.alignment

    @property
    def token_mask(self) -> TokenMask | None:
        """The tokens that the routers of the run are aligned on, None for all."""
        return None if self._aligned_tokens is None else self._aligned_tokens.mask

    # ── Run ──────────────────────────────────────────────────────────────────

    def bind(self, orchestrator: Any) -> None:
        """Take what the run context of AutoRound does not carry."""
        super().bind(orchestrator)
        self._orchestrator = orchestrator
        self._groups = None
        self._seed = getattr(orchestrator, "seed", None)
        self._layer_config = getattr(orchestrator, "layer_config", None)
        if self._alignment:
            # Now, because AutoRound may empty the blocks before the run is prepared.
            self._router_classes = declared_router_classes(self.model)
            self._routers = find_routers(
                self.model, router_pattern=self._alignment.router_pattern
            )
        if self._alignment.token_selection:
            self._aligned_tokens = AlignedTokens(self.config, self.model)
        # AutoRound 0.16 stores nblocks on the config and never reads it from there.
        if self.config.nblocks != 1:
            orchestrator.nblocks = self.config.nblocks
        around_saving(orchestrator, self._start_export, self._finish_exports)
        explain_disk_errors(orchestrator)

    def _start_export(self, folder: Path) -> None:
        """`quantize_and_save` has taken its folders before it tuned."""
        check_exporter()
        if not self._owns_output:
            set_leftovers_aside(folder)

    def _finish_exports(self, folders: list[Path]) -> None:
        """Put right what AutoRound's export has changed."""
        if self._refitted:
            for folder in folders:
                restore_refitted_routers(folder, self.model, self._refitted)
        if self._resumable is not None:
            self._resumable.finish()

    def _settings(self, composer: "AlgorithmComposer | None") -> dict[str, str]:
        """What decides the tuned weights besides AutoRound's own run signature."""
        own = {k: v for k, v in vars(self.config).items() if not k.startswith("_")}
        mask = None if self._aligned_tokens is None else self._aligned_tokens.given
        own |= {
            "vsraq": version("vsraq"),
            "alignment": self._alignment,
            "objective": self._objective,
            "next_router_objective": self._next_objective,
            "seed": self._seed,
            "batch_size": self.calibration_context.batch_size,
            "layer_config": self._layer_config,
            "token_mask": None if mask is None else mask.digest,
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
                objective needs more experts than one has, calibration samples are too
                few or padded as a hybrid cannot take it, a checkpoint cannot be
                streamed in the device's precision, or `AR_RESUME_DIR` holds an
                unfinished run with other settings.
            NotImplementedError: Its hidden states are not (batch, sequence, hidden),
                its blocks cannot be run ahead, or several processes tune together
                what each would find for itself; see `check_processes`.
        """
        if self._aligned_tokens is not None:
            self._aligned_tokens.end_calibration()
        super().prepare_run(composer=composer)
        check_stream(self.model_context)
        self._coverage = RunCoverage(
            self._alignment.min_tokens_per_expert, self._alignment.on_unreached
        )
        self._refitted = {}
        self._owns_output = bool(export_folders(self._orchestrator))
        settings = self._settings(composer)
        if process_count() > 1:
            self._check_processes(settings, composer)
        self._resumable, self._done = open_run(self._orchestrator, settings)
        for group in self._orchestrator.quant_block_list or self._block_groups():
            cached = (self._orchestrator.inputs or {}).get(group[0])
            if cached is not None:
                adapt_attention_mask(self.model, self._group_of(group[0]), cached)
        if self._alignment:
            self._check_model(composer)
        if self._aligned_tokens is not None:
            self._aligned_tokens.select(self._orchestrator, composer)
        if self._resumable is not None:
            self._take_up(self._resumable.tuned(self._done))

    def _take_up(self, records: Sequence[BlockRecord]) -> None:
        """Know what the killed run knew of the blocks that it has tuned."""
        for record in records:
            self._refitted |= record.routers
            for router, counts in record.counts.items():
                self._coverage.restore(router, counts)
        blocks = (self._orchestrator.quant_block_list or self._block_groups())[0]
        for block in blocks[: len(records)]:
            # Their shards are there; AutoRound would write weights in memory as well.
            self.model.get_submodule(block).to("meta")

    def _block_groups(self) -> list[list[str]]:
        if self._groups is None:  # a walk of the whole model, and every block asks
            self._groups = get_block_names(self.model)
        return self._groups

    def _block_names(self) -> list[str]:
        return [name for group in self._block_groups() for name in group]

    def _group_of(self, block: str) -> list[str]:
        """All blocks of the stack that a block is in, tuned or not."""
        return next((g for g in self._block_groups() if block in g), [block])

    def _check_model(self, composer: "AlgorithmComposer | None") -> None:
        """What `prepare_run` refuses or says about the model and its routers."""
        self._checked = True
        drop_record(self.model)  # of an earlier run of this model
        alignment, model = self._alignment, type(self.model).__name__
        if composer is not None:
            # not those of a vision tower, say
            blocks = self._block_names()
            self._routers = tuple(
                router
                for router in self._routers
                if any(router.name.startswith(f"{block}.") for block in blocks)
            )
        routers = self._routers
        if not routers and composer is None and len(self._block_names()) == 1:
            # a dense block of a MoE model, or a dense model: one block cannot tell
            logger.warning(
                "vsraq: AutoRound was given one block, %s, without a MoE router; it is "
                "tuned as AutoRound does",
                type(self.model.get_submodule(self._block_names()[0])).__name__,
            )
            return
        if not routers:
            raise ValueError(
                f"model={model}: it has no MoE router, so a router loss has nothing to "
                "align; allowed are MoE models; name its routers with router_pattern, "
                "or use AutoRound's SignRoundConfig for a dense one"
            )
        for router in routers:
            check_router(self.model, router, (self._objective, self._next_objective))
        check_run(alignment, self.calibration_context)
        check_selection(alignment, routers)
        check_weighting(self.model, routers, alignment)
        if composer is not None:
            check_smoothing(self.model, routers, composer)
        for reason in dict.fromkeys(r.unverified for r in routers if r.unverified):
            logger.info("vsraq: which experts a router chooses: %s", reason)
        if self.compress_context.enable_torch_compile:
            # Code compiled for an earlier run of this process knows no router hook,
            # and torch.compile does not look whether there is one.
            torch.compiler.reset()
        if alignment.next_router_weight != 0:
            check_next_router(self.model, self._orchestrator, composer)
        one_block = self.config.nblocks == 1 and not self.config.enable_norm_bias_tuning
        if (
            alignment.router_weight != 0
            and one_block
            and not within_reach(self.model, routers)
        ):
            logger.log(
                logging.WARNING if alignment.next_router_weight == 0 else logging.INFO,
                "vsraq: router_weight=%s: in no MoE block of %s does a quantized layer "
                "stand before the router, so the own-router loss tunes nothing; "
                'next_router_weight="auto" reaches the layers before a MoE block and '
                "its experts",
                alignment.router_weight,
                model,
            )
        logger.info(
            "vsraq: %d routers; router_weight=%s, objective %s; next_router_weight=%s, "
            "objective %s; realign_routers=%s",
            len(routers),
            alignment.router_weight,
            self._objective,
            alignment.next_router_weight,
            self._next_objective,
            alignment.realign_routers,
        )

    def finalize_run(self) -> None:
        """Drop what a run left behind; safe to call twice."""
        self._drop_fp_capture()
        self._run = None
        if self._aligned_tokens is not None:
            self._aligned_tokens.close()
        if self._refitted:
            record_realignment(self.model, self._refitted)
        self._coverage.report(len(self._routers), self._export_dir())
        super().finalize_run()

    def _export_dir(self) -> Any:
        exports = getattr(self._orchestrator, "formats", None)  # quantize_and_save
        return self.compress_context.output_dir if exports else None

    def _check_processes(
        self, settings: dict[str, str], composer: "AlgorithmComposer | None"
    ) -> None:
        cached: dict[str, Any] = self._orchestrator.inputs or {}
        groups = self._block_groups() + (self._orchestrator.quant_block_list or [])
        blocks = {name for group in groups for name in group}
        first: dict[str, Any] = next((cached[n] for n in cached if n in blocks), {})
        check_processes(
            settings | model_settings(self.model, self.calibration_context.seqlen),
            first.get("hidden_states", ()),
            self._export_dir(),
            composer,
            outside=[name for name in cached if name not in blocks],
        )

    # ── Full-precision side ──────────────────────────────────────────────────

    def register_fp_input_forward_hooks(self, block: nn.Module) -> list[Any]:
        """Capture the full-precision ranks during AutoRound's reference forward."""
        handles = super().register_fp_input_forward_hooks(block)
        self._drop_fp_capture()
        routers = self._routers_of(block)
        if routers:
            self._fp_capture = FullPrecisionCapture(
                block,
                routers,
                self._alignment,
                self._objective,
                self.compress_context.cache_device,
            )
            handles.append(self._fp_capture.open())
        return handles

    def _routers_of(self, block: nn.Module) -> tuple[Router, ...]:
        if not self._alignment:
            return ()
        return find_routers(
            block,
            router_classes=self._router_classes,
            router_pattern=self._alignment.router_pattern,
        )

    def _drop_fp_capture(self) -> None:
        if self._fp_capture is not None:
            self._fp_capture.close()
            self._fp_capture = None

    def _take_fp_routers(
        self,
        name: str,
        block: nn.Module,
        tensors: BlockTensors,
        *,
        derivable: bool,
    ) -> FpRouters:
        """What the block's routers do in full precision."""
        capture = self._fp_capture
        self._fp_capture = None
        if capture is None:
            raise RuntimeError(
                f"block {name}: its full-precision forward was not announced; allowed "
                "are runs through AutoRound 0.16's compress_block"
            )
        # The caller may have passed reference_output and so skipped that forward.
        forward = partial(
            self.block_forward.forward, block, tensors.inputs, tensors.others
        )
        return capture.take(name, tensors, forward if derivable else None)

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

        if self._resumable is not None:
            self._start_block(block_ctx, q_inputs)
        if not self._alignment:
            best_params = tune()
            self._end_block(block_ctx, ())
            return best_params
        if not self._checked:  # llm-compressor's single blocks are not prepared
            self._check_model(None)
            if self._aligned_tokens is not None:
                self._aligned_tokens.select(self._orchestrator, None)
        name = "+".join(block_ctx.block_names)
        routers = self._routers_of(block)
        expected = sum(
            len(routers_inside(self._routers, b)) for b in block_ctx.block_names
        )
        if len(routers) != expected:
            raise RuntimeError(
                f"block {name}: it has {len(routers)} routers, the model {expected} in "
                "it; allowed is a router_pattern that finds the same in both, from the "
                "name's end on"
            )
        use_q = q_inputs is not None and self.enable_quanted_input
        tensors = BlockTensors(
            q_inputs if use_q else fp_inputs, input_others, fp_outputs
        )
        fp_routers = FpRouters({}, {}, {})
        if routers:
            fp_routers = self._take_fp_routers(
                name, block, tensors, derivable=q_inputs is None
            )
        names = {r.name: _full_name(block_ctx.block_names, r.name) for r in routers}
        self._find_valid_tokens(kwargs.get("input_ids"))
        self._count_tokens(block, routers, names, fp_routers, tensors, use_q)
        last_block = block_ctx.block_names[-1]
        best_params = self._tune(
            tune, name, last_block, routers, fp_routers.targets, block, tensors
        )
        if self._alignment.realign_routers:
            for router in routers:
                fp_logits = fp_routers.logits[router.name]
                self._refit(names[router.name], block, router, fp_logits, tensors)
        self._end_block(block_ctx, names.values())
        return best_params

    def _start_block(self, block_ctx: Any, q_inputs: Any) -> None:
        """Refuse to tune a block that AutoRound does not resume at, or without inputs.

        AutoRound only warns of a resume folder that it cannot use.
        """
        index = block_ctx.block_index
        lacks_inputs = index > 0 and q_inputs is None and self.enable_quanted_input
        if index < self._done or lacks_inputs:
            raise RuntimeError(
                f"block {block_ctx.block_name}: {self._done} blocks are tuned already, "
                "and AutoRound does not go on behind them (its warning above says "
                "why); use an empty AR_RESUME_DIR and an empty output folder"
            )
        assert self._resumable is not None
        self._resumable.start_block(index)

    def _end_block(self, block_ctx: Any, routers: Iterable[str]) -> None:
        """Keep what a resumed run must know of this block."""
        if self._resumable is None:
            return
        inside = tuple(f"{name}." for name in block_ctx.block_names)
        record = BlockRecord(
            {n: w for n, w in self._refitted.items() if n.startswith(inside)},
            {name: self._coverage.counts_of(name) for name in routers},
            (),
        )
        self._resumable.end_block(block_ctx.block_index, record)

    def _tune(
        self,
        tune: Callable[[], dict[str, Any]],
        name: str,
        last_block: str,
        routers: Sequence[Router],
        fp_targets: dict[str, list[FpLogits]],
        block: nn.Module,
        tensors: BlockTensors,
    ) -> dict[str, Any]:
        """AutoRound's loop with the terms of this block."""
        with ExitStack() as stack:
            terms = []
            if routers and self._alignment.router_weight != 0:
                capture = stack.enter_context(
                    RouterCapture[Tensor](
                        block, routers, compared=self._objective.compares
                    )
                )
                terms.append(self._own_term(routers, fp_targets, capture))
            if self._alignment.next_router_weight != 0:
                next_router = self._next_router(name, last_block)
                if next_router is not None:
                    terms.append(self._next_term(name, next_router, tensors))
            if not terms:
                return tune()
            keep_best = not self.not_use_best_mse
            run = BlockRun(name, terms, keep_best, self._sample_tokens(tensors))
            stack.enter_context(_without_checkpointing(block))
            stack.enter_context(self._tuning(run, tensors))
            best_params = tune()
        run.finish_iteration()  # an early stop skips the last _step
        self._log(run)
        return best_params

    def _own_term(
        self,
        routers: Sequence[Router],
        fp_targets: dict[str, list[FpLogits]],
        capture: RouterCapture[Tensor],
    ) -> RouterTerm:
        def q_values(_output: Tensor, _samples: list[int]) -> dict[str, Tensor]:
            return {name: torch.cat(kept) for name, kept in capture.take().items()}

        return RouterTerm(
            OWN_ROUTER,
            self._objective,
            self._alignment.router_weight,
            routers,
            fp_targets,
            q_values,
        )

    def _next_router(self, name: str, last_block: str) -> NextRouter | None:
        group = self._group_of(last_block)
        following = group[group.index(last_block) + 1 :]
        lookahead = self._alignment.lookahead
        found = find_next_router(following, self._routers, lookahead)
        if found is None:
            logger.info(
                "vsraq: %s: no MoE router in the %d blocks behind it, so no next "
                "router term",
                name,
                min(lookahead, len(following)),
            )
            return None
        blocks, router = found
        # an automatic device map keeps the block's output off a card that is full
        device = getattr(self, "_loss_device", None) or self.block_forward.device
        loaded = [
            load_without_experts(
                self.model,
                block,
                self._routers,
                self._orchestrator._offloader,
                self.model_context.amp_dtype,
                device,
            )
            for block in blocks
        ]
        return NextRouter(
            f"{blocks[-1]}.{router.name}", router, loaded, self.block_forward
        )

    def _next_term(
        self,
        name: str,
        next_router: NextRouter,
        tensors: BlockTensors,
    ) -> RouterTerm:
        router = next_router.router
        objective = self._next_objective
        cache_device = self.compress_context.cache_device

        def values(output: Tensor, samples: list[int]) -> Tensor:
            return next_router.values(
                output, tensors.others, samples, objective.compares
            )

        kept = []
        with torch.no_grad():
            for samples in tensors.batches(self.block_forward.batch_size):
                fp_values = values(tensors.reference(samples), samples)
                ranking = None
                if objective.compares == "logits":
                    ranking = ranking_of(self._alignment.rank_by, router, fp_values)
                target = objective.target(
                    fp_values, top_k=router.top_k, ranking=ranking
                )
                kept.append(target.to(cache_device))

        def q_values(output: Tensor, samples: list[int]) -> dict[str, Tensor]:
            return {router.name: values(output, samples)}

        return RouterTerm(
            NEXT_ROUTER,
            objective,
            self._alignment.next_router_weight,
            (router.description,),
            {router.name: split_samples(name, next_router.name, kept, tensors.tokens)},
            q_values,
            every_second=not shares_a_batch(tensors.others, self.block_forward),
        )

    @contextmanager
    def _tuning(
        self,
        run: BlockRun,
        tensors: BlockTensors,
    ) -> Iterator[None]:
        """Tune with the terms of a block; they are probed once its layers are wrapped.

        AutoRound calls `self.wrapper_block` at the start of `quantize_block`, and
        builds no graph before it.
        """
        wrapper_block: Callable[..., Any] = self.wrapper_block  # type: ignore[has-type]

        def wrap(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            names = wrapper_block(block, *args, **kwargs)
            self._probe(run, block, tensors)
            self._run = run
            return names

        self.wrapper_block = wrap
        try:
            yield
        finally:
            self.wrapper_block = wrapper_block
            self._run = None

    def _probe(
        self,
        run: BlockRun,
        block: nn.Module,
        tensors: BlockTensors,
    ) -> None:
        """Find which layers each term reaches, and balance automatic weights."""
        automatic = any(term.weight == "auto" for term in run.terms)
        valid_token_mask = getattr(self, "_cached_valid_token_mask", None)
        batch_size = self.block_forward.batch_size
        # A step, not one sample: experts that get no token look unreached. Without a
        # selected token none is reached.
        steps = tensors.batches(batch_size * self.gradient_accumulate_steps)
        step = max(steps, key=lambda samples: run.tokens.share(samples, samples))
        looked_at = [term.looked_at(step) for term in run.terms]
        reconstruction_of = super()._get_loss

        def losses(samples: list[int]) -> tuple[Tensor | None, list[Tensor | None]]:
            output = self.block_forward.forward(
                block, tensors.inputs, tensors.others, torch.tensor(samples)
            )
            mask = self._mask(valid_token_mask, samples)
            # a masked sample's share, as in _get_loss
            share = 1.0 if mask is None else mask.float().mean().item()
            counted = self._counted(mask, samples)
            of_step = len(samples) / len(step)  # AutoRound's average
            own: list[Tensor | None] = []
            for term, looked in zip(run.terms, looked_at, strict=True):
                loss = term.loss(output, samples, counted, looked)
                weight = of_step * share * run.tokens.weight(samples, step, looked)
                own.append(None if loss is None else weight * loss)
            if not automatic:
                return None, own
            reconstruction = reconstruction_of(
                output,
                tensors.reference(samples).to(output.device),
                samples,
                nn.MSELoss(),
                output.device,
                valid_token_mask,
            )
            return of_step * reconstruction, own

        with torch.enable_grad(), eager():
            run.quantized = balance_terms(
                block,
                run.terms,
                [
                    partial(losses, step[i : i + batch_size])
                    for i in range(0, len(step), batch_size)
                ],
                self._alignment.auto_ratio,
            )

    def _mask(
        self, valid_token_mask: list[Tensor] | None, samples: Sequence[int]
    ) -> Tensor | None:
        """Valid tokens of some samples, (T,)."""
        if not valid_token_mask:
            return None
        return torch.cat([valid_token_mask[i].flatten() for i in samples])

    def _counted(self, valid: Tensor | None, samples: Sequence[int]) -> Tensor | None:
        """Tokens that count for the routers, (T,): valid ones that are selected.

        None is all of them: a mean over all tokens may round otherwise than one over
        a mask of ones.
        """
        if self.token_mask is None:
            return valid
        selected = self.token_mask.of_samples(samples)
        if selected.all():
            return valid
        return selected if valid is None else valid * selected.to(valid)

    def _find_valid_tokens(self, input_ids: list[Tensor] | None) -> None:
        """What AutoRound does once the first block is tuned; here before that."""
        if input_ids is not None and not hasattr(self, "_cached_valid_token_mask"):
            self._cached_valid_token_mask = self._compute_valid_token_mask(input_ids)

    def _count_tokens(
        self,
        block: nn.Module,
        routers: Sequence[Router],
        names: dict[str, str],
        fp_routers: FpRouters,
        tensors: BlockTensors,
        quantized_stream: bool,
    ) -> None:
        """Count the tokens that a block's experts are about to be tuned on."""
        fp_selected = fp_routers.selected
        counted = [router for router in routers if router.name in fp_selected]
        q_selected = fp_selected
        if quantized_stream:
            q_selected = selected_experts(block, counted, tensors, self.block_forward)
        valid_token_mask = getattr(self, "_cached_valid_token_mask", None)
        mask = self._mask(valid_token_mask, range(len(tensors.fp_outputs)))
        for router in counted:
            self._coverage.add(
                names[router.name],
                count_experts(block, router),
                q_selected[router.name],
                fp_selected[router.name],
                mask,
            )

    def _refit(
        self,
        name: str,
        block: nn.Module,
        router: Router,
        fp_logits: list[Tensor],
        tensors: BlockTensors,
    ) -> None:
        """Re-fit one router of the tuned block, before its output feeds the next."""
        bound = replace(router.bind(block), description=replace(router, name=name))
        mask = getattr(self, "_cached_valid_token_mask", None)
        if len(fp_logits) < len(tensors.fp_outputs):
            logger.info(
                "vsraq: router %s: re-fitted on the first %d of %d samples, whose "
                "logits are %d MB",
                name,
                len(fp_logits),
                len(tensors.fp_outputs),
                REFIT_BYTES // 10**6,
            )

        def samples() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for batch in tensors.batches(self.block_forward.batch_size, len(fp_logits)):
                forward = partial(
                    self.block_forward.forward,
                    block,
                    tensors.inputs,
                    tensors.others,
                    torch.tensor(batch),
                )
                hidden_states = router_input(bound.module, forward)
                logits = [fp_logits[i] for i in batch]
                flat = hidden_states.reshape(-1, hidden_states.shape[-1])
                own = flat.split([len(z) for z in logits])
                for i, x, z in zip(batch, own, logits, strict=True):
                    yield x, z, self._counted(self._mask(mask, [i]), [i])

        with torch.no_grad(), eager():
            refit = refit_router(
                bound,
                samples(),
                ridge=self._alignment.realign_ridge,
                weighting=self._alignment.realign_weighting,
            )
        logger.info("vsraq: %s", refit)
        if refit.applied:
            weight_name, weight = router_weight(name, bound.module)
            self._refitted[weight_name] = weight.detach().to("cpu", copy=True)

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
            return with_common_value(reconstruction)
        samples = [int(i) for i in indices]
        valid = self._mask(valid_token_mask, samples)
        # With gradient accumulation AutoRound sums the error over all elements instead
        # of averaging it, and its average divides by masked elements too. The router
        # terms follow both, so that the ratio of the losses stays.
        scale = pred_output.numel() if self._reconstruction_is_sum(loss_func) else 1
        share: Tensor | float = 1.0
        if valid is not None:
            valid = valid.to(reconstruction.device)
            share = valid.sum() / valid.numel()
        total = reconstruction
        counted = self._counted(valid, samples)
        step = self._step_of(samples)
        current = run.current
        for term in run.terms:
            looked_at = term.looked_at(step)
            loss = term.loss(pred_output, samples, counted, looked_at)
            if loss is None:
                continue
            weight = run.tokens.weight(samples, step, looked_at, over_processes=True)
            loss = weight * loss.to(reconstruction.device)
            current.add(term.label, loss)
            # One that nothing moves differs by micro-batch only, and would choose the
            # best iteration by that.
            if term.reaches_something:
                total = total + term.weight * scale * share * loss  # type: ignore[operator]
        current.add("reconstruction", reconstruction / scale)
        total = with_common_value(total)
        if not torch.isfinite(total):
            raise RuntimeError(
                f"block {run.name}, iteration {run.iteration}: loss is "
                f"{total.item()} (sums of this iteration: "
                f"{', '.join(f'{k} {float(v)}' for k, v in current.parts.items())}); "
                "allowed are finite values; look for inf or NaN in the block's weights "
                "and calibration inputs, or lower lr"
            )
        current.total += total.detach()
        # Without a mask AutoRound divides by a constant, which selects the same best.
        if valid is not None:
            current.valid_tokens += mean_over_processes(valid.sum())
        current.batches += 1
        return total

    def _get_non_zero_cnt(self, tensor: list[Tensor], indices: list[int]) -> float:
        """AutoRound's count of a step's valid tokens, which tells us its samples."""
        self._step_samples = [int(i) for i in indices]
        return super()._get_non_zero_cnt(tensor, indices)

    def _step_of(self, samples: list[int]) -> list[int]:
        """All samples of the step that a micro-batch is in.

        Without a mask (single blocks, of llm-compressor) AutoRound does not say them.
        Every token counts there, and every micro-batch is as good as a step.

        Raises:
            RuntimeError: AutoRound did not say them, and tokens are selected.
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

    def _sample_tokens(self, tensors: BlockTensors) -> SampleTokens:
        """Tokens of each calibration sample that are valid, and that count."""
        valid_token_mask = getattr(self, "_cached_valid_token_mask", None)

        def masks(sample: int) -> tuple[Tensor | None, Tensor | None]:
            valid = self._mask(valid_token_mask, [sample])
            return valid, self._counted(valid, [sample])

        return count_tokens(tensors.tokens, masks)

    def _reconstruction_is_sum(self, loss_func: Callable[..., Tensor]) -> bool:
        # AutoRound's outlier-suppressed loss (alg_ext) averages whatever loss_func is.
        if getattr(self, "_use_outlier_suppressed_loss", False):
            return False
        return getattr(loss_func, "reduction", "mean") == "sum"

    def _step(self, scaler: Any, optimizer: Any, lr_schedule: Any) -> None:
        run = self._run
        if run is not None:
            run.finish_iteration()
        super()._step(scaler, optimizer, lr_schedule)

    def _log(self, run: BlockRun) -> None:
        if run.first is None:
            logger.warning(
                "vsraq: %s: no layer was tuned, so no router was aligned", run.name
            )
            return
        logger.info("vsraq: %s", run.summary())
        for term in run.terms:
            # an automatic weight is 0 there, and promised nothing
            if term.weight != 0 and not term.reaches_something:
                logger.warning(
                    "vsraq: %s: the %s loss reaches no quantized layer of this block, "
                    "because none stands before its router; it had no effect there",
                    run.name,
                    term.label,
                )


class _VSRAQAdamQuantizer(VSRAQQuantizer, AdamRoundQuantizer):
    """The router term on AutoRound's Adam variant (`enable_adam`)."""


class _VSRAQV2Quantizer(VSRAQQuantizer, SignRoundV2Quantizer):
    """The router term on AutoRound's algorithm extension (`enable_alg_ext`)."""
