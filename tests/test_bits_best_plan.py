# SPDX-License-Identifier: Apache-2.0
"""The plan that is kept is the best of those that were measured."""

import pytest

import tiny
from prepared import prepare
from vsraq.autoround import planning
from vsraq.autoround.export_sizes import ExportSizes
from vsraq.autoround.planning import choose, find_candidates, measure_units
from vsraq.autoround.unit_damage import measure_damage
from vsraq.bits.engines import get_engine
from vsraq.bits.units import find_units

BATCHES = tiny.calibration(samples=4)


@pytest.fixture(scope="module")
def found():
    """Everything that a plan is made from."""
    prepared = prepare(tiny.tiny_model("solar_open", seed=2), group_size=32)
    rules = get_engine(None)
    units = find_units(
        prepared.module, list(prepared.layers), prepared.model.routers, rules
    )
    options = ("W2A16", "W3A16", "W8A16")
    candidates = find_candidates(
        units, prepared.layers, "W4A16", options, rules, "auto_round"
    )
    export = ExportSizes.of(prepared, units, candidates, "auto_round")
    sizes = export.within("0%", None)
    measured = measure_units(prepared.model, units, candidates, BATCHES)
    return prepared.model, units, candidates, sizes, measured


@pytest.mark.parametrize("metric", [{"kl": 1.0}, {"routing": 1.0}])
def test_the_best_measured_choice_is_kept(found, metric, monkeypatch):
    model, units, candidates, sizes, measured = found
    routing = (0.0, 0.5, 1.0, 30.0)
    monkeypatch.setattr(planning, "MORE_ROUTING", routing)
    choices = [
        choose(
            units,
            candidates,
            measured,
            sizes,
            {**metric, "routing": metric.get("routing", 0.0) + more},
        )
        for more in routing
    ]
    if "kl" in metric:
        assert len({tuple(c.values()) for c in choices}) > 1
    damages = [
        measure_damage(model, [planning._trial_of(units, candidates, c)], BATCHES)[0]
        for c in choices
    ]
    planned = planning.make_plan(
        model, units, candidates, BATCHES, sizes, metric, measured
    )
    (name,) = metric
    least = min(getattr(damage, name) for damage in damages)
    good = [d for d in damages if getattr(d, name) <= least * 1.02]
    assert planned.together == min(good, key=lambda damage: damage.routing)
    assert planned.chosen in choices
    assert damages[choices.index(planned.chosen)] == planned.together
    assert sum(sizes.of[key] for key in planned.chosen.items()) <= sizes.limit
