# SPDX-License-Identifier: Apache-2.0
"""One AutoRound run with router alignment: what all of its blocks share."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from auto_round.utils import get_block_names
from torch import Tensor, nn

from vsraq.autoround.aligned_tokens import AlignedTokens
from vsraq.autoround.checks import (
    check_next_router,
    check_router,
    check_run,
    check_selection,
    check_smoothing,
    check_stream,
    check_weighting,
)
from vsraq.autoround.config import VSRAQConfig
from vsraq.autoround.log_alignment import log_alignment
from vsraq.autoround.process_checks import (
    check_exporter,
    check_processes,
    model_settings,
)
from vsraq.autoround.resumable import (
    block_count,
    export_folders,
    model_and_scheme,
    open_run,
)
from vsraq.callbacks import RouterRefit
from vsraq.hybrids import adapt_attention_mask
from vsraq.processes import process_count
from vsraq.realignment.exported_routers import restore_refitted_routers
from vsraq.realignment.record import drop_record, record_realignment
from vsraq.resume.block_records import BlockRecord
from vsraq.resume.guard import ResumableRun
from vsraq.resume.output_folder import set_leftovers_aside
from vsraq.routers import Router, declared_router_classes, find_routers
from vsraq.run_coverage import RunCoverage
from vsraq.run_inside import run_inside
from vsraq.run_record.file import run_file, write_run
from vsraq.run_record.peak_memory import peak_mebibytes
from vsraq.run_record.recorder import RunRecorder
from vsraq.tokens import TokenMask

if TYPE_CHECKING:
    from auto_round.algorithms.composer import AlgorithmComposer

logger = logging.getLogger("autoround.vsraq")


class AlignmentRun:
    """The routers, tokens, counts and re-fits of a run.

    Create it before AutoRound calibrates: the token ids are seen only then, and the
    blocks may be empty afterwards.

    Args:
        config: The run's configuration.
        orchestrator: AutoRound's.

    Attributes:
        alignment: The final values of the options.
        orchestrator: AutoRound's.
        routers: Of all blocks, by their names in the model.
        coverage: Calibration tokens per expert.
        recorder: What the run writes down, and whom it tells.
        refitted: Re-fitted weights by parameter name, on the CPU until the last export.

    Raises:
        ValueError: A MoE layer's router cannot be identified.
    """

    def __init__(self, config: VSRAQConfig, orchestrator: Any) -> None:
        self.alignment = config.alignment
        self.orchestrator = orchestrator
        self.routers: tuple[Router, ...] = ()
        self.coverage = self._new_coverage()
        self.recorder = RunRecorder(config.callbacks)
        self.refitted: dict[str, Tensor] = {}
        self._config = config
        self._router_classes: tuple[type, ...] = ()
        self._tokens: AlignedTokens | None = None
        self._groups: list[list[str]] | None = None
        self._checked = False
        self._is_lone = False  # blocks without a run around them, which has no end
        self._owns_output = False
        self._resumable: ResumableRun | None = None
        self._done = 0  # blocks that a killed run has tuned
        self._expert_tokens: dict[str, list[int]] = {}
        run_inside(orchestrator, "_quantize_data_driven", self.recorder.running)
        if self.alignment:
            self._router_classes = declared_router_classes(self.model)
            self.routers = self.routers_of(self.model)
        if self.alignment.token_selection:
            self._tokens = AlignedTokens(config, self.model)
            run_inside(orchestrator, "cache_data", self._tokens.calibrating)

    def _new_coverage(self) -> RunCoverage:
        alignment = self.alignment
        return RunCoverage(alignment.min_tokens_per_expert, alignment.on_unreached)

    @property
    def model(self) -> nn.Module:
        """The model that is quantized."""
        model: nn.Module = self.orchestrator.model_context.model
        return model

    @property
    def token_mask(self) -> TokenMask | None:
        """The tokens that the routers are aligned on, None for all."""
        return None if self._tokens is None else self._tokens.mask

    def routers_of(self, module: nn.Module) -> tuple[Router, ...]:
        """Find the routers of the model or of a block, named relative to it."""
        if not self.alignment:
            return ()
        return find_routers(
            module,
            router_classes=self._router_classes,
            router_pattern=self.alignment.router_pattern,
        )

    @property
    def block_groups(self) -> list[list[str]]:
        """Names of the blocks, by the stack that they are in."""
        if self._groups is None:  # a walk of the whole model, and every block asks
            self._groups = get_block_names(self.model)
        return self._groups

    def group_of(self, block: str) -> list[str]:
        """Return all blocks of the stack that a block is in, tuned or not."""
        return next((g for g in self.block_groups if block in g), [block])

    @property
    def _tuned_groups(self) -> list[list[str]]:
        return self.orchestrator.quant_block_list or self.block_groups

    # ── Before the first block ───────────────────────────────────────────────

    def prepare(self, composer: "AlgorithmComposer | None", member: object) -> None:
        """Refuse, before the first block, a run that cannot work.

        Args:
            composer: AutoRound's.
            member: The algorithm in it that this run belongs to.

        Raises:
            ValueError: The model has no MoE router, one is to be quantized, an
                objective needs more experts than one has, calibration samples are too
                few or padded where a hybrid cannot take it, a checkpoint cannot be
                streamed in the device's precision, or `AR_RESUME_DIR` holds an
                unfinished run with other settings.
            NotImplementedError: Its hidden states are not (batch, sequence, hidden),
                its blocks cannot be run ahead, or several processes would each find
                parameters of their own; see `check_processes`.
        """
        context = self.orchestrator.model_context
        check_stream(context._disk_stream_index, context.amp_dtype)
        self.coverage = self._new_coverage()
        self.refitted = {}
        self._owns_output = bool(export_folders(self.orchestrator))
        settings = self._settings(composer, member)
        if process_count() > 1:
            self._check_processes(settings, composer)
        self._resumable, self._done = open_run(self.orchestrator, settings)
        for group in self._tuned_groups:
            cached = (self.orchestrator.inputs or {}).get(group[0])
            if cached is not None:
                adapt_attention_mask(self.model, self.group_of(group[0]), cached)
        if self.alignment:
            self._check_model(composer)
        if self._tokens is not None:
            self._tokens.select(self.orchestrator, composer)
        done = self._resumable.tuned(self._done) if self._resumable is not None else []
        self._take_up(done)
        self.recorder.start(
            *model_and_scheme(self.orchestrator),
            block_count(self.orchestrator),
            self._config.iters,
            [record.entry for record in done],
        )

    def prepare_lone_block(self) -> None:
        """Prepare a run of single blocks, which AutoRound does not announce."""
        if self._checked or not self.alignment:
            return
        self._is_lone = True
        self._check_model(None)
        if self._tokens is not None:
            self._tokens.select(self.orchestrator, None)

    def end_calibration(self) -> None:
        """Take the token ids that calibration has run."""
        if self._tokens is not None:
            self._tokens.end_calibration()

    def _settings(
        self, composer: "AlgorithmComposer | None", member: object
    ) -> dict[str, str]:
        """Collect what decides the tuned weights besides AutoRound's run signature."""
        config = vars(self._config)
        settings = {k: v for k, v in config.items() if not k.startswith("_")}
        mask = None if self._tokens is None else self._tokens.given
        settings |= {
            "vsraq": version("vsraq"),
            # the digest below stands for the mask
            "alignment": replace(self.alignment, token_mask=None),
            "objective": self.alignment.own_objective,
            "next_router_objective": self.alignment.next_objective,
            "seed": getattr(self.orchestrator, "seed", None),
            "batch_size": self.orchestrator.calibration_context.batch_size,
            "layer_config": getattr(self.orchestrator, "layer_config", None),
            "token_mask": None if mask is None else mask.digest,
        }
        for other in composer.members() if composer is not None else ():
            if other is not member:
                settings[type(other).__name__] = vars(other.config)
        # an object's address differs in the process that resumes
        return {n: re.sub(r" at 0x[0-9a-f]+", "", str(v)) for n, v in settings.items()}

    def _check_processes(
        self, settings: dict[str, str], composer: "AlgorithmComposer | None"
    ) -> None:
        cached: dict[str, Any] = self.orchestrator.inputs or {}
        groups = self.block_groups + (self.orchestrator.quant_block_list or [])
        blocks = {name for group in groups for name in group}
        first: dict[str, Any] = next((cached[n] for n in cached if n in blocks), {})
        seqlen = self.orchestrator.calibration_context.seqlen
        check_processes(
            settings | model_settings(self.model, seqlen),
            first.get("hidden_states", ()),
            self._export_dir(),
            composer,
            outside=[name for name in cached if name not in blocks],
        )

    def _check_model(self, composer: "AlgorithmComposer | None") -> None:
        """Check the model and its routers."""
        self._checked = True
        drop_record(self.model)  # of an earlier run of this model
        blocks = [name for group in self.block_groups for name in group]
        if composer is not None:
            # not those of a vision tower, say
            self.routers = tuple(
                router for router in self.routers if any(map(router.is_in, blocks))
            )
        elif not self.routers and len(blocks) == 1:
            # a dense block of a MoE model, or a dense model: one block does not show
            logger.warning(
                "vsraq: AutoRound was given one block, %s, without a MoE router; it is "
                "tuned as AutoRound does",
                type(self.model.get_submodule(blocks[0])).__name__,
            )
            return
        if not self.routers:
            raise ValueError(
                f"model={type(self.model).__name__}: it has no MoE router, so a router "
                "loss has nothing to align; allowed are MoE models; name its routers "
                "with router_pattern, or use AutoRound's SignRoundConfig for a dense "
                "one"
            )
        self._check_routers(composer)
        if self.orchestrator.compress_context.enable_torch_compile:
            # Code compiled for an earlier run of this process calls no router hook,
            # and torch.compile does not check for one.
            torch.compiler.reset()
        log_alignment(self.model, self.routers, self.alignment, self._config)

    def _check_routers(self, composer: "AlgorithmComposer | None") -> None:
        alignment, routers = self.alignment, self.routers
        objectives = (alignment.own_objective, alignment.next_objective)
        for router in routers:
            check_router(self.model, router, objectives)
        check_run(alignment, self.orchestrator.calibration_context)
        check_selection(alignment, routers)
        check_weighting(self.model, routers, alignment)
        if composer is not None:
            check_smoothing(self.model, routers, composer)
        for reason in dict.fromkeys(r.unverified for r in routers if r.unverified):
            logger.info("vsraq: which experts a router chooses: %s", reason)
        if alignment.next_router_weight != 0:
            check_next_router(self.model, self.orchestrator, composer)

    # ── Killed and resumed ───────────────────────────────────────────────────

    def _take_up(self, records: Sequence[BlockRecord]) -> None:
        """Restore what the killed run knew about the blocks that it had tuned."""
        for record in records:
            self.refitted |= record.routers
            for router, counts in record.counts.items():
                self.coverage.restore(router, counts)
        for block in self._tuned_groups[0][: len(records)]:
            # Their shards are on disk; weights left in memory would be written again.
            self.model.get_submodule(block).to("meta")

    def start_block(self, block_ctx: Any, *, lacks_inputs: bool) -> None:
        """Refuse a block that AutoRound does not resume at, or that has no inputs.

        AutoRound only warns about a resume folder that it cannot use.

        Args:
            block_ctx: AutoRound's names and index of the block.
            lacks_inputs: Whether the quantized stream into it is missing.

        Raises:
            RuntimeError: The block must not be tuned.
        """
        if self._resumable is None:
            return
        index = block_ctx.block_index
        if index < self._done or (index > 0 and lacks_inputs):
            raise RuntimeError(
                f"block {block_ctx.block_name}: {self._done} blocks are tuned already, "
                "and AutoRound does not go on after them (its warning above says "
                "why); use an empty AR_RESUME_DIR and an empty output folder"
            )
        self._resumable.start_block(index)

    def end_block(
        self,
        block_ctx: Any,
        routers: Iterable[str] = (),
        weights: Mapping[str, float] | None = None,
        refits: Sequence[RouterRefit] = (),
    ) -> None:
        """Record a block, keep what a resumed run must know, and tell the callbacks.

        Args:
            block_ctx: AutoRound's names and index of the block.
            routers: The names of its routers.
            weights: Of its router losses, by label.
            refits: Of its routers.
        """
        if self._is_lone:
            self.coverage.report(len(self.routers), None)
        entry = self.recorder.end_block(weights or {}, refits)
        if self._resumable is not None:
            inside = tuple(f"{name}." for name in block_ctx.block_names)
            record = BlockRecord(
                {n: w for n, w in self.refitted.items() if n.startswith(inside)},
                {name: self.coverage.counts_of(name) for name in routers},
                (),
                entry,
            )
            self._resumable.end_block(block_ctx.block_index, record)
        self.recorder.announce()

    # ── After the last block ─────────────────────────────────────────────────

    def finish(self) -> None:
        """Report and record what was done; safe to call twice."""
        if self.refitted:
            record_realignment(self.model, self.refitted)
        self._expert_tokens |= self.coverage.tokens
        self.coverage.report(len(self.routers), self._export_dir())

    def start_export(self, folder: Path) -> None:
        """Prepare an export's folder; `quantize_and_save` did so before it tuned."""
        check_exporter()
        if not self._owns_output:
            set_leftovers_aside(folder)

    def finish_exports(self, folders: list[Path]) -> None:
        """Restore what AutoRound's export has changed."""
        if self.refitted:
            for folder in folders:
                restore_refitted_routers(folder, self.model, self.refitted)
        for folder in folders:
            write_run(folder, self._run_file())
        if self._resumable is not None:
            self._resumable.finish()

    def _run_file(self) -> dict[str, Any]:
        model, scheme = model_and_scheme(self.orchestrator)
        return run_file(
            model=model,
            scheme=scheme,
            seconds=self.recorder.seconds,
            peak_mebibytes=peak_mebibytes(),
            blocks=self.recorder.blocks,
            coverage=self._expert_tokens or None,
        )

    def _export_dir(self) -> Any:
        exports = getattr(self.orchestrator, "formats", None)  # quantize_and_save
        return self.orchestrator.compress_context.output_dir if exports else None
