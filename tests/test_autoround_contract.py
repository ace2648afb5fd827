# SPDX-License-Identifier: Apache-2.0
"""What this package relies on inside AutoRound; a failure here says what has moved."""

import inspect

import pytest
from auto_round import calib_dataset
from auto_round.algorithms import composer
from auto_round.algorithms.base import BaseAlgorithm
from auto_round.algorithms.block_runner import BlockForwardRunner
from auto_round.algorithms.quantization.adam_round.adam import AdamRoundQuantizer
from auto_round.algorithms.quantization.base import BaseQuantizer
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.algorithms.quantization.sign_roundv2.quantizer import (
    SignRoundV2Quantizer,
)
from auto_round.algorithms.registry import (
    list_registered_algorithms,
    resolve_alg_config,
    resolve_pipeline_member,
)
from auto_round.autoround import _normalize_alg_configs
from auto_round.calibration.inputs import preprocess_block_inputs
from auto_round.calibration.utils import _update_inputs
from auto_round.compressors.base import BaseOrchestrator
from auto_round.compressors.orchestrator import CompressionOrchestrator
from auto_round.compressors.utils import block_forward
from auto_round.data_type.utils import update_block_global_scale_if_needed
from auto_round.modeling.fused_moe.replace_modules import ReplacementModuleBase
from auto_round.utils.offload import OffloadManager, load_block_from_model_files

from vsraq import VSRAQConfig
from vsraq.autoround import VSRAQQuantizer

QUANTIZERS = [SignRoundQuantizer, SignRoundV2Quantizer, AdamRoundQuantizer]


def parameters(function):
    return [p for p in inspect.signature(function).parameters if p != "self"]


def test_importing_registers_the_algorithm():
    assert "vsraq" in list_registered_algorithms()
    assert type(resolve_alg_config("vsraq")) is VSRAQConfig
    assert resolve_pipeline_member(VSRAQConfig()) is VSRAQQuantizer


@pytest.mark.parametrize(
    ("kwargs", "base"),
    [
        ({}, SignRoundQuantizer),
        ({"enable_adam": True}, AdamRoundQuantizer),
        ({"enable_alg_ext": True}, SignRoundV2Quantizer),
    ],
)
def test_the_configs_switch_chooses_the_quantizer(kwargs, base):
    quantizer = VSRAQQuantizer(VSRAQConfig(**kwargs))
    assert isinstance(quantizer, base)
    assert isinstance(quantizer, VSRAQQuantizer)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_get_loss_by_position(quantizer):
    expected = ["pred_output", "ref_output", "indices", "loss_func", "device"]
    own = parameters(quantizer._get_loss)
    own[3] = "loss_func"  # SignRoundV2 calls it mse_loss
    assert own[:6] == [*expected, "valid_token_mask"]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_other_seams(quantizer):
    assert parameters(quantizer.prepare_run) == ["composer"]
    assert parameters(quantizer.finalize_run) == []
    assert parameters(quantizer.register_fp_input_forward_hooks) == ["block"]
    assert parameters(quantizer._step) == ["scaler", "optimizer", "lr_schedule"]
    assert parameters(quantizer._get_non_zero_cnt) == ["tensor", "indices"]
    assert parameters(quantizer._compute_valid_token_mask) == ["input_ids"]
    assert parameters(quantizer._scale_loss_and_backward) == ["scaler", "loss"]
    assert parameters(quantizer.bind_block_forward_runner) == ["block_forward_runner"]
    assert parameters(quantizer.quantize_block)[:7] == [
        "block",
        "fp_inputs",
        "input_others",
        "fp_outputs",
        "q_inputs",
        "block_ctx",
        "input_ids",
    ]
    assert parameters(BaseAlgorithm.bind) == ["orchestrator"]


def test_the_loop_calls_the_seams():
    loop = inspect.getsource(SignRoundQuantizer.quantize_block)
    assert "self._get_loss(pred_output, ref_output, indices, mse_loss" in loop
    assert "self._step(scaler, optimizer, lr_schedule)" in loop
    assert 'mse_reduction = "sum"' in loop
    assert "total_loss += loss.item() / num_elm" in loop
    assert "if total_loss < best_loss:" in loop
    step = inspect.getsource(composer.AlgorithmComposer.compress_block)
    assert step.index("_get_fp_act_hooks(block)") < step.index(
        "reference_output = block_forward_fn(block, fp_inputs, input_others)"
    )


def test_the_reference_forward_is_not_guarded():
    """AutoRound removes hooks only after success, so none of ours is among them."""
    step = inspect.getsource(composer.AlgorithmComposer.compress_block)
    assert "finally" not in step


def test_the_runner_and_the_calibration_of_a_run_can_be_wrapped():
    call = inspect.getsource(BlockForwardRunner.__call__)
    assert "return self.forward(*args, **kwargs)" in call
    bound = inspect.getsource(composer.AlgorithmComposer)
    assert "block_quantizer.bind_block_forward_runner(self.block_forward)" in bound
    assert "block_forward_fn = self.block_forward" in bound
    source = inspect.getsource(CompressionOrchestrator._quantize_data_driven)
    assert "self.cache_data(" in source
    source = inspect.getsource(CompressionOrchestrator.quantize)
    assert "return self._quantize_data_driven()" in source
    assert "self.orig_scheme = " in inspect.getsource(BaseOrchestrator.resolve_scheme)


def test_blocks_are_given_to_a_quantizer_by_position():
    """`watch_plain_run` takes the sixth argument for the block's context."""
    step = inspect.getsource(composer.AlgorithmComposer.compress_block)
    call = step.partition("self.block_quantizer.quantize_block(")[2]
    given = [argument.strip() for argument in call.split(",")][:6]
    assert given[0] == "block"
    assert given[5] == "block_ctx"


def test_data_sets_are_read_by_a_function_that_can_be_wrapped():
    """`calibration_data` wraps it; AutoRound's loader looks it up in its module."""
    read = inspect.unwrap(calib_dataset.get_dataset)
    expected = ["tokenizer", "seqlen", "dataset_name", "seed", "nsamples"]
    assert parameters(read) == expected
    source = inspect.getsource(calib_dataset.get_dataloader)
    assert "= get_dataset(tokenizer, seqlen, dataset_name, seed, nsamples)" in source


def test_the_run_context_has_what_we_read():
    for name in ("model", "compress_context", "calibration_context", "block_forward"):
        assert isinstance(inspect.getattr_static(BaseQuantizer, name), property)


def test_the_config_has_what_we_check():
    names = parameters(SignRoundConfig.__init__)
    for name in ("iters", "nblocks", "enable_adam", "enable_alg_ext", "enable_lfq"):
        assert name in names


def test_zero_iterations_at_autoround_replace_our_config():
    """AutoRound(..., iters=0) drops any SignRound config before a plug-in sees it.

    Nothing of ours runs then, so nothing of ours can refuse it; docs/limits.md says so.
    """
    (config,) = _normalize_alg_configs(VSRAQConfig(), {"iters": 0})
    assert not isinstance(config, SignRoundConfig)


def test_nblocks_of_a_config_is_not_read():
    """The reason why our `bind` passes it on."""
    source = inspect.getsource(CompressionOrchestrator._quantize_data_driven)
    assert "nblocks=self.nblocks" in source
    assert "config.nblocks" not in inspect.getsource(CompressionOrchestrator)


def test_layers_are_wrapped_before_the_loop_builds_a_graph():
    """Automatic weights are balanced in between; see `after_wrapping`."""
    loop = inspect.getsource(SignRoundQuantizer.quantize_block)
    masks, wrapping = "self._cached_valid_token_mask = ", "self.wrapper_block("
    assert loop.index(masks) < loop.index(wrapping) < loop.index("self.optimizer(")
    assert loop.count(wrapping) == 1


def test_the_tuned_block_feeds_the_next_one_after_quantize_block():
    """So a router that is re-fitted at its end takes part."""
    step = inspect.getsource(composer.AlgorithmComposer.compress_block)
    assert step.index("self.block_quantizer.quantize_block(") < step.index(
        "new_q_input = block_forward_fn(block, effective_input, input_others)"
    )


def test_what_the_look_ahead_calls():
    assert parameters(BlockForwardRunner.select_batch) == [
        "inputs",
        "input_others",
        "indices",
    ]
    assert parameters(block_forward) == [
        "block",
        "input_ids",
        "input_others",
        "amp",
        "amp_dtype",
        "device",
        "output_return_id",
    ]
    assert parameters(load_block_from_model_files) == [
        "model_dir",
        "block_name",
        "block",
    ]
    offloader = OffloadManager()
    assert offloader._saved == {}
    assert offloader.model_dir is None
    save = inspect.getsource(OffloadManager._save_to_disk)
    assert 'self._saved[name] = {"save_path": save_path}' in save
    for name in ("batch_size", "device", "amp", "amp_dtype", "last_output_dict"):
        assert hasattr(BlockForwardRunner(), name)


def test_the_cached_arguments_can_be_adapted_before_the_first_block():
    """Hybrids: the mask that every block will get is changed in `prepare_run`."""
    run = inspect.getsource(CompressionOrchestrator._quantize_data_driven)
    cached, prepare = "self.inputs = all_inputs", "self.alg_composer.prepare_run()"
    assert run.index(cached) < run.index(prepare) < run.index("_quantize_blocks(")
    assert "has_variable_block_shape" in run
    assert isinstance(composer.AlgorithmComposer.has_layerwise_rotation, property)


def test_what_the_token_selection_calls():
    assert parameters(preprocess_block_inputs) == [
        "inputs",
        "model_context",
        "compress_context",
        "first_input_name",
    ]
    assert parameters(_update_inputs) == ["inputs", "q_inputs"]
    assert parameters(update_block_global_scale_if_needed)[1:] == [
        "data_type",
        "group_size",
    ]
    composed = composer.AlgorithmComposer
    assert parameters(composed._register_act_max_hooks) == ["block"]
    assert parameters(composed.dispatch_block) == ["block", "input_ids", "input_others"]
    assert parameters(ReplacementModuleBase.materialize_weights) == []
    # the order that the copy of a block is rounded in, and how a layer is
    block = inspect.getsource(composed.compress_block)
    ranges, scales, tuned = (
        block.index(call)
        for call in (
            "set_amax_for_all_moe_layers(block",
            "update_block_global_scale_if_needed(block",
            "self.block_quantizer.quantize_block(",
        )
    )
    assert ranges < scales < tuned
    rounding = inspect.getsource(BaseQuantizer._quantize_layer_via_rtn)
    for argument in (
        "enable_minmax_tuning=False",
        "enable_norm_bias_tuning=False",
        "enable_round_tuning=False",
        "iters=0",
    ):
        assert argument in rounding
    assert "layer.unwrapper({})" in rounding


def test_token_ids_are_not_handed_to_prepare_run():
    """Why a hook at the input embedding records them."""
    run = inspect.getsource(CompressionOrchestrator._quantize_data_driven)
    popped = run.index('input_ids_cache = all_inputs.pop("input_ids", None)')
    assert popped < run.index("self.alg_composer.prepare_run()")
