# SPDX-License-Identifier: Apache-2.0
"""What rounding a unit does, against whole models that AutoRound itself has rounded."""

from dataclasses import replace

import pytest
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.utils.offload import OffloadManager
from auto_round.utils.weight_handler import check_and_mark_quantized_module

import tiny
from prepared import UNQUANTIZED, arguments, prepare
from test_capture import hook_count
from vsraq.autoround.planning import scheme_fields
from vsraq.autoround.unit_damage import Trial, measure_damage
from vsraq.bits.damage import Damage
from vsraq.bits.engines import get_engine
from vsraq.bits.units import find_units
from vsraq.capture import RouterCapture
from vsraq.checkpoint import load_model
from vsraq.routers import BoundRouter, find_routers

SAMPLES = tiny.calibration(samples=8)
BATCHES = [torch.cat(SAMPLES[:4]), torch.cat(SAMPLES[4:])]
L0, L1 = "model.layers.0", "model.layers.1"


def fields_of(scheme, group_size=None):
    fields = dict(scheme_fields(scheme))
    return fields if group_size is None else fields | {"group_size": group_size}


def trial_of(found, names, fields):
    """A trial of whole units, by the ends of their names."""
    routers = found.model.routers
    layers = list(found.all_layers)
    units = find_units(found.module, layers, routers, get_engine("vllm"))
    chosen = [u for u in units if u.name.endswith(names)]
    assert chosen
    return Trial({layer: fields for unit in chosen for layer in unit.layers})


@torch.no_grad()
def run_whole(model):
    """Logits, and the experts that each router chose, (tokens, K)."""
    routers = find_routers(model)
    logits, chosen = [], {r.name: [] for r in routers}
    for batch in BATCHES:
        with RouterCapture(model, routers, BoundRouter.select) as capture:
            logits.append(model(batch, use_cache=False).logits.flatten(0, 1))
            for name, experts in capture.take().items():
                chosen[name] += experts
    return torch.cat(logits), {n: torch.cat(x) for n, x in chosen.items()}


def oracle(model, rounded):
    """The damage by its definition, in double precision."""
    fp_logits, fp_chosen = run_whole(model)
    q_logits, q_chosen = run_whole(rounded)
    fp_log, q_log = (x.double().log_softmax(-1) for x in (fp_logits, q_logits))
    kl = (fp_log.exp() * (fp_log - q_log)).sum(-1).mean().item()
    changed = []
    for name, experts in fp_chosen.items():
        pairs = zip(experts.tolist(), q_chosen[name].tolist(), strict=True)
        overlaps = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in pairs]
        changed.append(1 - sum(overlaps) / len(overlaps))
    return Damage(kl, sum(changed) / len(changed))


def rounded_by_autoround(family, scheme, found, trial, **kwargs):
    """Of a whole run of AutoRound's rounding, all other layers left as they are."""
    others = [n for n in found.all_layers if n not in trial.schemes]
    config = dict.fromkeys(others, UNQUANTIZED) | {
        n: dict(f) for n, f in trial.schemes.items()
    }
    run = AutoRound(
        tiny.tiny_model(family),
        scheme=scheme,
        alg_configs=RTNConfig(disable_opt_rtn=True),
        layer_config=config,
        dataset=SAMPLES,
        **arguments(amp=False, **kwargs),
    )
    model, _ = run.quantize()
    return model.float().eval()


def approx(damage, rel=1e-3):
    return pytest.approx((damage.kl, damage.routing), rel=rel, abs=1e-6)


ALL = ("experts", "_proj")
CASES = [
    ("solar_open", "W4A16", 32, "1.mlp.experts"),
    ("solar_open", "W8A16", 32, ("0.mlp.experts", "1.self_attn.o_proj")),
    ("glm4_moe", "W3A16", 32, ALL),
    ("gpt_oss", "W4A16", 32, "0.mlp.experts"),
    ("solar_open", "MXFP4", None, ALL),
    ("solar_open", "NVFP4", None, "0.mlp.experts"),
    ("qwen2_moe", "NVFP4", None, "0.self_attn.o_proj"),
]
MORE = [
    ("solar_open", "W4A16", 32, "0.self_attn.qkv_proj"),
    ("nemotron_h", "W4A16", 32, "0.mixer.out_proj"),
    ("qwen2_moe", "W2A16", 32, "0.mlp.shared_expert.gate_up_proj"),
    ("solar_open", "MXFP4", None, "0.self_attn.qkv_proj"),
    ("solar_open", "MXFP8", None, "0.mlp.experts"),
    ("solar_open", "NVFP4", None, "1.self_attn.qkv_proj"),
    ("solar_open", "NVFP4", None, ALL),
]


def pytest_generate_tests(metafunc):
    if "unit" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        cases = CASES + MORE if full else CASES
        metafunc.parametrize(("family", "scheme", "group", "unit"), cases)


def test_equals_whole_models(family, scheme, group, unit):
    options = {} if group is None else {"group_size": group}
    found = prepare(tiny.tiny_model(family), scheme, **options)
    trial = trial_of(found, unit, fields_of(scheme, group))
    rounded = rounded_by_autoround(family, scheme, found, trial, **options)
    expected = oracle(tiny.tiny_model(family), rounded)
    (actual,) = measure_damage(found.model, [trial], BATCHES)
    assert actual.kl > 1e-7
    assert (actual.kl, actual.routing) == approx(expected)


@pytest.mark.parametrize("family", ["solar_open", "nemotron_h"])
def test_models_in_bfloat16_are_measured_in_float32(family):
    with tiny.bfloat16():
        model = tiny.tiny_model(family).bfloat16()
        found = prepare(model, group_size=32)
        assert next(found.module.parameters()).dtype == torch.bfloat16
        trials = [trial_of(found, n, fields_of("W8A16", 32)) for n in ("experts", ALL)]
        trials += [Trial({"lm_head": fields_of("W8A16", 32)})]
        actual = measure_damage(found.model, trials, BATCHES)
    assert next(found.module.parameters()).dtype == torch.bfloat16
    same = prepare(tiny.tiny_model(family).bfloat16().float(), group_size=32)
    expected = measure_damage(same.model, trials, BATCHES)
    # the model itself rounds its positions' sines to bfloat16
    for damage, in_float32 in zip(actual, expected, strict=True):
        assert (damage.kl, damage.routing) == approx(in_float32, rel=0.05)


def test_weights_of_fp8_checkpoints():
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    layer = found.module.get_submodule(f"{L0}.self_attn.o_proj")
    weight = layer.weight.detach()
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    stored = (weight / scale).to(torch.float8_e4m3fn)
    in_bfloat16 = stored.bfloat16() * scale.bfloat16()  # what AutoRound reads
    trials = [Trial({f"{L0}.self_attn.o_proj": fields_of("W4A16", 32)})]
    layer.weight = torch.nn.Parameter(in_bfloat16.float(), requires_grad=False)
    expected = measure_damage(found.model, trials, BATCHES)
    layer.weight = torch.nn.Parameter(stored, requires_grad=False)
    layer.weight_scale_inv = scale.reshape(1, 1)
    layer.block_size = stored.shape
    check_and_mark_quantized_module(found.module)
    assert measure_damage(found.model, trials, BATCHES) == expected
    assert layer.weight.dtype == torch.float8_e4m3fn


def test_the_output_projection():
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    trial = Trial({"lm_head": fields_of("W4A16", 32)})
    rounded = rounded_by_autoround("solar_open", "W4A16", found, trial, group_size=32)
    expected = oracle(tiny.tiny_model("solar_open"), rounded)
    (actual,) = measure_damage(found.model, [trial], BATCHES)
    assert actual.routing == expected.routing == 0
    assert actual.kl == pytest.approx(expected.kl, rel=1e-3)
    assert actual.kl > 1e-4


def test_trials_do_not_touch_each_other():
    """Side by side they give what each gives alone, and nothing gives nothing."""
    found = prepare(tiny.tiny_model("glm4_moe"), group_size=32)
    w3, w8 = fields_of("W3A16", 32), fields_of("W8A16", 32)
    trials = [
        Trial({}),
        trial_of(found, "0.self_attn.o_proj", w3),
        trial_of(found, "1.mlp.experts", w3),
        trial_of(found, "1.mlp.experts", w8),
        Trial({"lm_head": w3}),
        trial_of(found, ("experts", "proj"), w3),
        Trial({}),
    ]
    together = measure_damage(found.model, trials, BATCHES)
    assert together[0] == together[-1] == Damage(0.0, 0.0)
    for trial, damage in zip(trials, together, strict=True):
        assert [damage] == measure_damage(found.model, [trial], BATCHES)
    assert together[2].kl > together[3].kl > 0
    assert together[5].kl > max(d.kl for d in together[:5])


def test_schemes_of_one_layer_do_not_touch_each_other():
    """NVFP4 has scales that are fixed beforehand, from the inputs; MXFP8 has none."""
    found = prepare(tiny.tiny_model("solar_open"), "NVFP4", "llm_compressor")
    nvfp4, mxfp8 = (
        trial_of(found, ("self_attn", "experts"), fields_of(name))
        for name in ("NVFP4", "MXFP8")
    )
    for trials in ([nvfp4, mxfp8], [mxfp8, nvfp4]):
        together = measure_damage(found.model, trials, BATCHES)
        for trial, damage in zip(trials, together, strict=True):
            (alone,) = measure_damage(found.model, [trial], BATCHES)
            assert (damage.kl, damage.routing) == approx(alone)


def test_batches_of_several_lengths():
    """Every token counts the same, and a batch of one is a batch."""
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    trial = trial_of(found, "0.mlp.experts", fields_of("W3A16", 32))
    short, long = BATCHES[0][:1, :8], BATCHES[1][:, :24]
    parts = [measure_damage(found.model, [trial], [ids])[0] for ids in (short, long)]
    (both,) = measure_damage(found.model, [trial], [short, long])
    n, m = short.numel(), long.numel()
    assert both.kl == pytest.approx((n * parts[0].kl + m * parts[1].kl) / (n + m))
    routing = (n * parts[0].routing + m * parts[1].routing) / (n + m)
    assert both.routing == pytest.approx(routing)


# ── what it leaves alone ──────────────────────────────────────────────────────


def state(model):
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    places = {n: t.data_ptr() for n, t in model.state_dict(keep_vars=True).items()}
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
    classes = {n: type(m) for n, m in model.named_modules()}
    return tensors, places, attributes, classes, hook_count(model)


def same_state(before, after):
    tensors, *others = before
    assert all(torch.equal(t, after[0][n]) for n, t in tensors.items())
    assert others == list(after[1:])


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_model_is_as_before(scheme):
    group = 32 if scheme == "W4A16" else None
    options = {} if group is None else {"group_size": group}
    found = prepare(tiny.tiny_model("solar_open"), scheme, **options)
    fields = fields_of(scheme, group)
    trial = trial_of(found, ("experts", "_proj"), fields)
    head = Trial({"lm_head": fields_of("W4A16", 32)})
    before = state(found.module)
    random_state = torch.get_rng_state()
    first = measure_damage(found.model, [trial, head], BATCHES)
    same_state(before, state(found.module))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert measure_damage(found.model, [trial, head], BATCHES) == first

    wrong = fields | {"data_type": "planted"}
    for layer in ("lm_head", f"{L1}.self_attn.o_proj"):
        with pytest.raises(Exception, match="planted"):
            measure_damage(found.model, [trial, Trial({layer: wrong})], BATCHES)
        same_state(before, state(found.module))
    assert measure_damage(found.model, [trial, head], BATCHES) == first


# ── where the model is ────────────────────────────────────────────────────────


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_a_streamed_model_gives_the_same(scheme, tmp_path):
    source = tiny.save("solar_open", tmp_path / "model")
    group = 32 if scheme == "W4A16" else None
    options = {} if group is None else {"group_size": group}
    kept = prepare(load_model(source, dtype=torch.bfloat16), scheme, **options)
    streamed = prepare(str(source), scheme, **options)
    blocks = [streamed.module.get_submodule(b) for b in streamed.model.blocks]
    fields = fields_of(scheme, group)
    trials = [
        trial_of(kept, "0.mlp.experts", fields),
        trial_of(kept, "1.self_attn.qkv_proj", fields),
        trial_of(kept, ("experts", "_proj"), fields),
    ]
    trials += [Trial({"lm_head": fields_of("W4A16", 32)})]
    expected = measure_damage(kept.model, trials, BATCHES)
    assert all(p.is_meta for block in blocks for p in block.parameters())
    assert measure_damage(streamed.model, trials, BATCHES) == expected
    assert all(p.is_meta for block in blocks for p in block.parameters())


def test_an_offloaded_model_gives_the_same():
    """AutoRound may have put its blocks on disk, in files of its own."""
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    trial = trial_of(found, ("experts", "_proj"), fields_of("W4A16", 32))
    expected = measure_damage(found.model, [trial], BATCHES)
    offloader = OffloadManager()
    for name in found.model.blocks:
        offloader.offload(found.module, name)
    layer = found.module.get_submodule(f"{L0}.self_attn.q_proj")
    assert layer.weight.numel() == 0
    offloaded = replace(found.model, offloader=offloader)
    offloaded.check(BATCHES[0])
    assert measure_damage(offloaded, [trial], BATCHES) == expected
    assert layer.weight.numel() == 0
    offloader.cleanup()


def test_weights_that_are_nowhere():
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    nowhere = replace(found.model, offloader=OffloadManager())
    found.module.model.layers[1].to("meta")
    with pytest.raises(RuntimeError, match=f"block {L1}: .* neither in memory nor on"):
        measure_damage(nowhere, [Trial({})], BATCHES)


# ── models whose blocks cannot be run alone ───────────────────────────────────


def test_blocks_that_pass_on_more_than_hidden_states():
    """What the first block leaves somewhere for the second."""
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    found.model.check(BATCHES[0])
    left = []

    def leave(_module, _args, output):
        left[:] = [output]

    def take(_module, args):
        return (args[0] + 0.5 * left[0].roll(1, dims=1), *args[1:])

    found.module.model.layers[0].register_forward_hook(leave)
    found.module.model.layers[1].register_forward_pre_hook(take)
    with pytest.raises(NotImplementedError, match="SolarOpenForCausalLM: its blocks"):
        found.model.check(BATCHES[0])


def test_blocks_that_fail_alone():
    found = prepare(tiny.tiny_model("solar_open"), group_size=32)
    passes = []

    def fail_again(_module, _args):
        passes.append(1)
        if len(passes) > 1:
            raise KeyError("planted")

    found.module.model.layers[1].register_forward_pre_hook(fail_again)
    with pytest.raises(NotImplementedError, match=r"one by one.* KeyError: 'planted'"):
        found.model.check(BATCHES[0])
