# SPDX-License-Identifier: Apache-2.0
"""How damages add, and the choice of schemes on them."""

import itertools
import math
import random

import pytest

from vsraq.bits.allocation import Metric, Priced, allocate
from vsraq.bits.damage import Damage, DamageModel

KL, ROUTING = Metric(1.0, 0.0), Metric(0.0, 1.0)


def some_units(generator, count, schemes):
    units = []
    for _ in range(count):
        scale, flips = generator.uniform(0.1, 3), generator.random()
        units.append(
            {
                f"W{bits}": Priced(
                    bits * 100,
                    bits * 10,
                    Damage(
                        scale * (flips * 2.0**-bits + 4.0**-bits),
                        scale * flips * 2.0**-bits,
                    ),
                )
                for bits in schemes
            }
        )
    return units


def test_routing_adds_in_squares_and_the_rest_of_kl_just_adds():
    model = DamageModel(flip_kl=0.5)
    damages = [Damage(kl=0.5, routing=0.3), Damage(kl=0.2, routing=0.4)]
    together = model.together(damages)
    assert together.routing == pytest.approx(0.5)
    # 0.5 * 0.5, and 0.5 - 0.15 and 0.2 - 0.2 beside it
    assert together.kl == pytest.approx(0.25 + 0.35 + 0.0)
    assert model.together([]) == Damage(0.0, 0.0)
    one = model.together(damages[:1])
    assert (one.kl, one.routing) == pytest.approx((0.5, 0.3))


def test_a_fitted_model_gives_what_was_measured_together():
    generator = random.Random(0)
    for _ in range(20):
        truth = DamageModel(generator.uniform(0.1, 1.0))
        alone = []
        for _ in range(5):
            routing = generator.random()
            direct = generator.random()
            alone.append(Damage(truth.flip_kl * routing + direct, routing))
        fitted = DamageModel.fit(alone, truth.together(alone))
        assert fitted.flip_kl == pytest.approx(truth.flip_kl)


def test_without_changed_choices_kl_just_adds():
    alone = [Damage(0.1, 0.0), Damage(0.2, 0.0)]
    model = DamageModel.fit(alone, Damage(0.3, 0.0))
    assert model.flip_kl == 0
    assert model.together(alone).kl == pytest.approx(0.3)
    # a unit that was measured alone, and more damage together than the sum
    assert DamageModel.fit(alone[:1], alone[0]).flip_kl == 0
    assert DamageModel.fit([Damage(0.1, 0.1)] * 2, Damage(0.3, 0.2)).flip_kl == 0


@pytest.mark.parametrize("metric", [KL, ROUTING, Metric(1.0, 2.0)])
@pytest.mark.parametrize("active_share", [None, 0.8])
def test_no_choice_predicts_less_damage(metric, active_share, full):
    """Against every choice within the limits, of small problems."""
    generator = random.Random(1)
    gaps = []
    problems = 25 if full else 8
    for _ in range(problems):
        units = some_units(generator, 5, (2, 3, 4, 8))
        model = DamageModel(generator.uniform(0.0, 1.0))
        limit = generator.uniform(2.6, 7.8) * 100 * len(units)
        active = None if active_share is None else limit / 10 * active_share
        chosen = allocate(units, ["W4"] * 5, model, metric, limit, active)

        def cost(names, model=model, units=units):
            taken = [u[n] for u, n in zip(units, names, strict=True)]
            damage = metric.of(model.together([p.damage for p in taken]))
            return damage, sum(p.size for p in taken), sum(p.active for p in taken)

        possible = [
            cost(names) for names in itertools.product(*(list(u) for u in units))
        ]
        best = min(
            damage
            for damage, size, read in possible
            if size <= limit and (active is None or read <= active)
        )
        damage, size, read = cost(chosen)
        assert size <= limit
        assert active is None or read <= active
        gaps.append(damage / best - 1)
    # the lines that are tried need not hold the best one
    assert max(gaps) < 0.01
    assert sum(gap < 1e-9 for gap in gaps) >= problems - 2


def test_a_rough_choice_is_within_the_limit_and_nearly_as_good():
    generator = random.Random(2)
    for _ in range(5):
        units = some_units(generator, 12, (2, 3, 4, 8))
        model = DamageModel(generator.uniform(0.0, 1.0))
        limit = generator.uniform(3, 7) * 100 * len(units)

        def damage(model=model, units=units, limit=limit, **rough):
            names = allocate(units, ["W4"] * 12, model, KL, limit, **rough)
            taken = [u[n] for u, n in zip(units, names, strict=True)]
            assert sum(p.size for p in taken) <= limit
            return model.together([p.damage for p in taken]).kl

        assert damage(rough=True) <= 1.03 * damage()


def test_less_routing_is_bought_with_kl():
    units = [
        {
            "W8": Priced(8, 8, Damage(0.0, 0.0)),
            "W4": Priced(4, 4, Damage(0.5, 0.01)),
        },
        {
            "W8": Priced(8, 8, Damage(0.0, 0.0)),
            "W4": Priced(4, 4, Damage(0.1, 0.3)),
        },
    ]
    model = DamageModel(0.2)
    arguments = units, ["W4", "W4"], model
    assert allocate(*arguments, KL, 12) == ["W8", "W4"]
    assert allocate(*arguments, ROUTING, 12) == ["W4", "W8"]


def test_the_prediction_is_finite_where_nothing_is_damaged():
    units = [{"W8": Priced(8, 8, Damage(0.0, 0.0))}] * 2
    assert allocate(units, ["W8", "W8"], DamageModel(0.0), KL, 16) == ["W8", "W8"]
    assert not math.isnan(DamageModel(0.0).together([Damage(0.0, 0.0)]).kl)
