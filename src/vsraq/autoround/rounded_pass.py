# SPDX-License-Identifier: Apache-2.0
"""Run a prepared model twice: in full precision, and rounded to nearest.

Blocks, layers, rounding and calibration inputs are AutoRound's own. The full-precision
model and the same model rounded (the run's scheme, no tuning) go through the
calibration samples block by block, one block in memory at a time: copy the block, run
it in full precision, round the copy, run it again on the rounded path, drop it. So
every block is run twice, the model is not touched, and no random number is drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from auto_round.algorithms.composer import AlgorithmComposer
from auto_round.calibration.inputs import preprocess_block_inputs
from auto_round.calibration.utils import _update_inputs
from auto_round.data_type.utils import update_block_global_scale_if_needed
from auto_round.utils import (
    SUPPORTED_LAYER_TYPES,
    check_to_quantized,
    convert_module_to_hp_if_necessary,
    get_block_names,
    set_amax_for_all_moe_layers,
    set_module,
)
from auto_round.utils.device_manager import device_manager
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from vsraq.autoround.activation_ranges import needs_activation_ranges
from vsraq.autoround.block_copy import copy_block, split_experts
from vsraq.autoround.rounded_layer import copy_layer, copy_weight, rounded_layer
from vsraq.capture import RouterCapture
from vsraq.routers import BoundRouter, Router, declared_router_classes, find_routers
from vsraq.tokens import Sampling
from vsraq.tokens.output_head import OutputHead
from vsraq.tokens.shift import MeanRoutingShift


@dataclass(frozen=True)
class Streams:
    """The hidden states after the last block, on both paths.

    Attributes:
        fp_states: In full precision, what AutoRound hands from block to block.
        q_states: Of the rounded model.
        shift: The mean routing shift of each token, if it was asked for.
        returns_tuple: Whether the last block returns a tuple.
    """

    fp_states: Any
    q_states: Any
    shift: MeanRoutingShift | None
    returns_tuple: bool


@dataclass(frozen=True)
class RoundedPass:
    """Both passes through the blocks of a run that AutoRound has prepared.

    Attributes:
        orchestrator: AutoRound's.
        composer: AutoRound's.
        model: The model that is quantized.
        runner: AutoRound's, for its batches, precision and device.
        blocks: Names, from the first that is quantized to the last of its stack.
        router_classes: Of the model's own code, for `find_routers`.
        router_pattern: The run's option.
    """

    orchestrator: Any
    composer: AlgorithmComposer
    model: nn.Module
    runner: BlockForwardRunner
    blocks: list[str]
    router_classes: tuple[type, ...]
    router_pattern: str | None

    @classmethod
    def of(cls, orchestrator: Any, composer: AlgorithmComposer) -> "RoundedPass":
        """Return the passes of a run.

        Raises:
            NotImplementedError: The model has several stacks of blocks.
        """
        model = composer.block_quantizer.model
        groups = orchestrator.quant_block_list or get_block_names(model)
        if len(groups) != 1:
            raise NotImplementedError(
                f"model={type(model).__name__}: it has {len(groups)} stacks of blocks "
                f"to quantize ({', '.join(g[0] for g in groups)}); allowed is one, the "
                "decoder of a language model, so name it with to_quant_block_names"
            )
        first = groups[0][0]
        # the whole stack: blocks after the quantized ones change the output too
        stack = next((g for g in get_block_names(model) if first in g), groups[0])
        return cls(
            orchestrator,
            composer,
            model,
            composer.block_forward,
            stack[stack.index(first) :],
            declared_router_classes(model),
            getattr(composer.block_quantizer.config, "router_pattern", None),
        )

    def run(self, num_samples: int, *, with_routing: bool) -> Streams:
        """Run all blocks on both paths.

        Args:
            num_samples: Samples whose token ids are known.
            with_routing: Whether the routing of the two paths is compared.

        Raises:
            ValueError: AutoRound has cached another number of samples.
            RuntimeError: A tensor is neither in memory nor on disk.
        """
        fp_states, others = self.inputs(self.blocks[0])
        if num_samples != len(fp_states):
            raise ValueError(
                f"token_ids of {num_samples} samples: AutoRound has cached "
                f"{len(fp_states)}; allowed are the ids of exactly these"
            )
        shift = MeanRoutingShift() if with_routing else None
        q_states = fp_states
        returns_tuple = False
        for name in tqdm(self.blocks, desc="Selecting tokens"):
            if self.orchestrator.has_variable_block_shape:
                _, others = self.inputs(name)
            block = self.load(name, fp_states, others)
            routers = self.routers_of(block) if with_routing else ()
            with self.activation_ranges(block), _output_kind(block) as kinds:
                fp_states, fp_chosen = self.forward(block, fp_states, others, routers)
            returns_tuple = kinds[-1] is not Tensor and issubclass(kinds[-1], tuple)
            self.round_to_nearest(name, block)
            q_states, q_chosen = self.forward(block, q_states, others, routers)
            if shift is not None:
                shift.update(q_chosen, fp_chosen)
            # free its tensors now; a reference cycle may keep the module itself
            block.to("meta")
        return Streams(fp_states, q_states, shift, returns_tuple)

    @property
    def model_name(self) -> str:
        """What the model was loaded from, or its class."""
        config = getattr(self.model, "config", None)
        return getattr(config, "_name_or_path", "") or type(self.model).__name__

    def sampling(self) -> Sampling:
        """Return the model's own; AutoRound does not load it when it streams."""
        context = self.composer.block_quantizer.model_context
        folder = context.disk_stream_model_dir
        if folder is not None and Path(folder, GENERATION_CONFIG_NAME).is_file():
            return Sampling.of_config(GenerationConfig.from_pretrained(folder))
        return Sampling.of(self.model)

    def inputs(self, name: str) -> tuple[Any, dict[str, Any]]:
        """Return hidden states and arguments of a block; cached ones do not change."""
        cached = {
            # AutoRound's function takes the mapping and its lists apart
            key: list(value) if isinstance(value, list) else value
            for key, value in self.orchestrator.inputs[name].items()
        }
        cached, _ = _update_inputs(cached, None)
        quantizer = self.composer.block_quantizer
        return preprocess_block_inputs(
            cached,
            model_context=quantizer.model_context,
            compress_context=quantizer.compress_context,
        )

    def load(self, name: str, states: Any, others: dict[str, Any]) -> nn.Module:
        """Load a copy of a block in full precision, on its device."""
        split_experts(self.model.get_submodule(name))
        block = copy_block(
            self.model,
            name,
            self.orchestrator._offloader,
            "tokens cannot be selected; load the model into memory before AutoRound "
            "gets it, or pass a mask made elsewhere",
        )
        dtype = self.composer.block_quantizer.model_context.amp_dtype
        convert_module_to_hp_if_necessary(block, dtype, device_manager.device)
        return self.composer.dispatch_block(block, states, others).eval()

    def routers_of(self, block: nn.Module) -> tuple[Router, ...]:
        """Find the routers of a block."""
        return find_routers(
            block,
            router_classes=self.router_classes,
            router_pattern=self.router_pattern,
        )

    def forward(
        self,
        block: nn.Module,
        states: Any,
        others: dict[str, Any],
        routers: Sequence[Router],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run all samples; return the next inputs, and experts by router, (T, K)."""

        def choose(router: BoundRouter, logits: Tensor) -> Tensor:
            return router.select(logits).to(self.runner.cache_device, torch.int16)

        chosen = {}
        with ExitStack() as stack:
            capture = None
            if routers:
                capture = RouterCapture(block, routers, choose)
                stack.enter_context(capture)
            output = self.runner.forward(block, states, others)
            # blocks that hand on more than their hidden states
            output = self.runner.last_output_dict or output
            if capture is not None:
                chosen = {n: torch.cat(calls) for n, calls in capture.take().items()}
        return output, chosen

    @contextmanager
    def activation_ranges(self, block: nn.Module) -> Iterator[None]:
        """Collect what static activation scales need, as AutoRound's RTN does."""
        handles = self.composer._register_act_max_hooks(block)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def round_to_nearest(self, name: str, block: nn.Module) -> None:
        """Turn the copy into what AutoRound's RTN makes of the block."""
        scheme = self.composer.scheme
        needs_ranges = needs_activation_ranges(scheme)
        if scheme.act_data_type is not None or needs_ranges:
            if needs_ranges:
                set_amax_for_all_moe_layers(block, attr_name="act_max")
            update_block_global_scale_if_needed(
                block, scheme.data_type, scheme.group_size
            )
        shared = {p.data_ptr() for p in self.model.get_submodule(name).parameters()}
        for layer_name, layer in list(block.named_modules()):
            if isinstance(layer, SUPPORTED_LAYER_TYPES) and check_to_quantized(layer):
                if layer.weight.data_ptr() in shared:
                    layer.weight = copy_weight(layer.weight)
                set_module(block, layer_name, rounded_layer(layer, self.runner.device))

    @contextmanager
    def rounded_head(self, head: OutputHead) -> Iterator[OutputHead]:
        """Give the output head, its layers rounded where the run quantizes them."""
        inside = {
            id(m)
            for name in self.blocks
            for m in self.model.get_submodule(name).modules()
        }
        rounded: dict[str, tuple[nn.Module, nn.Module]] = {}
        for name, layer in self.model.named_modules():
            if (
                id(layer) not in inside
                and isinstance(layer, SUPPORTED_LAYER_TYPES)
                and check_to_quantized(layer)
            ):
                copied = copy_layer(layer)
                rounded[name] = (layer, rounded_layer(copied, self.runner.device))
        if not rounded:
            yield head
            return
        if needs_activation_ranges(self.composer.scheme):
            raise NotImplementedError(
                f"{', '.join(rounded)}: quantized outside of the blocks, with an "
                "activation scale that depends on all tokens; allowed with "
                "token selection is quant_lm_head=False"
            )

        def q_head(hidden_states: Tensor) -> Tensor:
            try:
                for name, (_, layer) in rounded.items():
                    set_module(self.model, name, layer)
                return head(hidden_states)
            finally:
                for name, (layer, _) in rounded.items():
                    set_module(self.model, name, layer)

        yield q_head


@contextmanager
def _output_kind(block: nn.Module) -> Iterator[list[type]]:
    """Record whether a block returns its hidden states or a tuple with them."""
    kinds: list[type] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kinds[:] = [type(output)]

    handle = block.register_forward_hook(keep)
    try:
        yield kinds
    finally:
        handle.remove()
