# SPDX-License-Identifier: Apache-2.0
"""What hears of a run hears all of it, and costs nothing without listeners."""

import pytest
import torch
from auto_round import AutoRound

import tiny
from test_autoround import padded
from test_lone_blocks import OWN, tune
from vsraq import VSRAQConfig
from vsraq.callbacks import (
    BlockResult,
    Callback,
    RunInfo,
    RunResult,
    Step,
    TensorBoard,
    WandB,
    check_callbacks,
)
from vsraq.run_record.loss_curves import LossCurves

FAMILY = "solar_open"
ITERS = 3


class Everything(Callback):
    """A callback that keeps what it hears."""

    def __init__(self):
        self.heard = []

    def on_run_start(self, run):
        self.heard.append(run)

    def on_block_start(self, block):
        self.heard.append(block)

    def on_step(self, step):
        self.heard.append(step)

    def on_block_end(self, block):
        self.heard.append(block)

    def on_run_end(self, run):
        self.heard.append(run)

    def of(self, kind):
        return [event for event in self.heard if isinstance(event, kind)]


class BlocksOnly(Callback):
    def __init__(self):
        self.results = []

    def on_block_end(self, block):
        self.results.append(block)


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    return TensorBoard(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def heard(tensorboard):
    """One default run, and what was heard of it."""
    everything = Everything()
    run(VSRAQConfig(iters=ITERS, callbacks=[everything, tensorboard]))
    return everything


def run(config, model=None, **kwargs):
    model = tiny.tiny_model(FAMILY) if model is None else model
    arguments = {"dataset": tiny.calibration(), **tiny.RUN, **kwargs}
    autoround = AutoRound(
        model,
        tokenizer=tiny.tiny_tokenizer(),
        scheme="W4A16",
        group_size=32,
        alg_configs=config,
        **arguments,
    )
    return autoround.quantize()[0]


def test_the_order_of_events(heard):
    kinds = [type(event).__name__ for event in heard.heard]
    block = ["BlockInfo", *["Step"] * ITERS, "BlockResult"]
    assert kinds == ["RunInfo", *block, *block, "RunResult"]


def test_the_run(heard):
    (info,) = heard.of(RunInfo)
    assert info == RunInfo("SolarOpenForCausalLM", "W4A16", 2, 0, ITERS)
    (end,) = heard.of(RunResult)
    assert end.error is None
    assert end.seconds > sum(r.seconds for r in heard.of(BlockResult)) > 0


def test_the_blocks(heard):
    first, second = heard.of(BlockResult)
    assert [r.block.name for r in (first, second)] == [
        "model.layers.0",
        "model.layers.1",
    ]
    assert [(r.block.index, r.block.blocks) for r in (first, second)] == [
        (0, 2),
        (1, 2),
    ]
    labels = {"reconstruction", "router", "next router"}
    assert first.losses.keys() == labels
    assert first.weights.keys() == labels - {"reconstruction"}
    assert second.losses.keys() == labels - {"next router"}  # nothing comes next
    for result in (first, second):
        assert result.iterations == ITERS
        assert 0 <= result.best_iteration < ITERS
        assert all(len(curve) == ITERS for curve in result.losses.values())
        assert all(weight > 0 for weight in result.weights.values())
        (router,) = result.routers
        assert router.name == f"{result.block.name}.mlp.gate"
        before, after = router.logit_error
        assert router.refit == (after < before)
        assert all(0 < value <= 1 for value in router.jaccard)


def test_steps_and_curves_are_the_same(heard):
    for result in heard.of(BlockResult):
        steps = [s for s in heard.of(Step) if s.block == result.block]
        assert [s.iteration for s in steps] == list(range(ITERS))
        for label, curve in result.losses.items():
            assert [s.losses[label] for s in steps] == list(curve)


def test_the_log_says_the_same(vsraq_log):
    blocks = BlocksOnly()
    run(VSRAQConfig(iters=ITERS, callbacks=[blocks]))
    lines = tiny.block_lines(vsraq_log)
    for line, result in zip(lines, blocks.results, strict=True):
        best = result.best_iteration
        assert int(line["best"]) == best
        for key, label in (("r", "reconstruction"), ("z", "router")):
            curve = result.losses[label]
            assert line[f"{key}0"] == f"{curve[0]:.3e}"
            assert line[f"{key}1"] == f"{curve[best]:.3e}"
        assert line["weight"] == f"{result.weights['router']:.4g}"


def test_callbacks_do_not_change_the_tuning():
    tuned = [
        run(VSRAQConfig(iters=ITERS, router_weight=1.0, callbacks=callbacks))
        for callbacks in ([], [Everything()])
    ]
    first, second = (model.state_dict() for model in tuned)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_plain_autoround_is_heard_too():
    everything = Everything()
    plain = VSRAQConfig(iters=ITERS, callbacks=[everything], **tiny.PLAIN)
    model = run(plain).state_dict()
    for result in everything.of(BlockResult):
        assert result.losses.keys() == {"reconstruction"}
        assert len(result.losses["reconstruction"]) == ITERS
        assert not result.weights
        assert not result.routers
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    own = run(SignRoundConfig(iters=ITERS)).state_dict()
    assert all(torch.equal(own[name], model[name]) for name in own)


def test_gradient_accumulation_is_one_step():
    """The mean, as without it; AutoRound sums over the elements there."""
    results = []
    for split in ({}, {"gradient_accumulate_steps": 2}):
        everything = Everything()
        config = VSRAQConfig(
            iters=2, router_weight=1.0, callbacks=[everything], **split
        )
        batch = 4 // split.get("gradient_accumulate_steps", 1)
        run(config, dataset=padded(0), batch_size=batch)
        assert len(everything.of(Step)) == 4
        results.append(everything.of(BlockResult)[0].losses)
    whole, split = (losses["reconstruction"][0] for losses in results)
    assert split == pytest.approx(whole, rel=0.05)


def test_an_early_stop_is_heard():
    everything = Everything()
    config = VSRAQConfig(
        iters=40, dynamic_max_gap=1, router_weight=1.0, callbacks=[everything]
    )
    run(config, to_quant_block_names="model.layers.0")
    (result,) = everything.of(BlockResult)
    assert result.iterations < 40
    assert len(everything.of(Step)) == result.iterations


def test_several_blocks_at_once():
    blocks = BlocksOnly()
    config = VSRAQConfig(iters=1, router_weight=1.0, nblocks=2, callbacks=[blocks])
    run(config)
    (result,) = blocks.results
    assert result.block.name == "model.layers.0+model.layers.1"
    assert result.block.blocks == 1


class Failing(Everything):
    """Fails in one method."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def __getattribute__(self, name):
        if name == super().__getattribute__("method"):
            return super().__getattribute__("fail")
        return super().__getattribute__(name)

    def fail(self, _event):
        raise LookupError("the tracker is gone")


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize(
    "method", ["on_run_start", "on_block_start", "on_step", "on_block_end"]
)
def test_an_exception_ends_the_run(method):
    model = tiny.tiny_model(FAMILY)
    failing, other = Failing(method), Everything()
    with pytest.raises(LookupError, match="the tracker is gone"):
        run(VSRAQConfig(iters=1, callbacks=[failing, other]), model)
    assert not hooks(model)
    for callback in (failing, other):
        (end,) = callback.of(RunResult)
        assert isinstance(end.error, LookupError)


def test_the_end_of_a_run_cannot_be_spoilt(vsraq_log):
    other = Everything()
    run(VSRAQConfig(iters=1, callbacks=[Failing("on_run_end"), other]))
    assert other.of(RunResult)[0].error is None
    assert any("on_run_end of " in line for line in vsraq_log)


def test_a_run_that_is_refused_is_not_heard_of():
    everything = Everything()
    config = VSRAQConfig(iters=1, callbacks=[everything])
    with pytest.raises(ValueError, match="it has no MoE router"):
        run(config, tiny.tiny_model("llama"))
    assert not everything.heard


def test_a_lone_block_has_no_run():
    everything = Everything()
    tune("qwen3_moe", VSRAQConfig(**OWN, callbacks=[everything]))
    kinds = [type(event).__name__ for event in everything.heard]
    assert kinds == ["BlockInfo", "Step", "BlockResult"]


def test_what_is_no_callback_is_refused():
    for given, message in [
        ("tensorboard", r"allowed is a list of vsraq\.callbacks\.Callback"),
        ([Everything], "it is a class; allowed is an object"),
        ([print], "it has no on_run_start, on_block_start, on_step"),
    ]:
        with pytest.raises(ValueError, match=message):
            VSRAQConfig(callbacks=given)
    assert check_callbacks([]) == ()


# ── losses stay on their device ──────────────────────────────────────────────


class Scalar(torch.Tensor):
    """A tensor that counts how often its value is read."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__):
            cls.reads += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_losses_are_read_once_at_the_end():
    Scalar.reads = 0
    curves = LossCurves(keep_best=True)
    for iteration in range(20):
        for _ in range(2):
            loss = torch.tensor(abs(iteration - 7.0)).as_subclass(Scalar)
            curves.add("reconstruction", loss)
            curves.add("router", 2 * loss)
            curves.end_batch(loss, torch.tensor(4).as_subclass(Scalar))
        assert curves.end_iteration()
    assert Scalar.reads == 0
    found = curves.curves()
    assert Scalar.reads <= 4  # two curves, what is minimised, and counts
    assert found.best_iteration == 7
    assert found.losses["router"] == [2 * abs(i - 7.0) for i in range(20)]
    assert not curves.end_iteration()
    assert curves.curves().iterations == 20


def test_the_last_iteration_is_kept_if_autoround_keeps_it():
    curves = LossCurves(keep_best=False)
    for value in (1.0, 0.5, 2.0):
        curves.add("reconstruction", torch.tensor(value))
        curves.end_batch(torch.tensor(value))
        curves.end_iteration()
    assert curves.curves().best_iteration == 2


# ── trackers ─────────────────────────────────────────────────────────────────


def test_tensorboard_holds_what_was_heard(heard, tensorboard):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard.folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for result in heard.of(BlockResult):
        for label, curve in result.losses.items():
            tag = f"{result.block.name}/{label}"
            tags.remove(tag)
            points = events.Scalars(tag)
            assert [p.step for p in points] == list(range(ITERS))
            values = [p.value for p in points]
            assert values == pytest.approx(list(curve), rel=1e-6)
    kept = events.Scalars("kept/reconstruction")
    assert [p.step for p in kept] == [0, 1]
    assert tags == {
        "kept/reconstruction",
        "kept/router",
        "kept/next router",
        "weight/router",
        "weight/next router",
        "re-fit/kept",
        "re-fit/logit error before",
        "re-fit/logit error after",
        "re-fit/Jaccard before",
        "re-fit/Jaccard after",
        "seconds",
    }


def test_wandb_writes_offline(heard, tmp_path, monkeypatch):
    """What one run has told is told again to wandb, which needs seconds to start."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandB("tests", offline=True, folder=tmp_path)
    tracker.on_run_start(heard.of(RunInfo)[0])
    summary = tracker._run.summary
    for result in heard.of(BlockResult):
        tracker.on_block_start(result.block)
        tracker.on_block_end(result)
    for result in heard.of(BlockResult):
        name, curve = result.block.name, result.losses["reconstruction"]
        assert summary[f"{name}/reconstruction"] == pytest.approx(curve[-1])
    assert summary["block"] == 1
    tracker.on_run_end(heard.of(RunResult)[0])
    wandb.teardown()  # its own process writes the file; only this waits for it
    (file,) = tmp_path.rglob("*.wandb")
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("tracker", "package"), [(TensorBoard, "tensorboard"), (WandB, "wandb")]
)
def test_a_tracker_names_the_package_that_it_needs(tracker, package, monkeypatch):
    monkeypatch.setattr(f"{tracker.__module__}.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        tracker("runs")
