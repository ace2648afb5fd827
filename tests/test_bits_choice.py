# SPDX-License-Identifier: Apache-2.0
"""The choice of schemes against every choice there is."""

import ctypes
import itertools
import random

import pytest
from scipy.optimize import milp

from vsraq.bits.choice import Offer, choose


def best(units, limit, active_limit=None):
    """The least damage of all choices within the limits; None if there is none."""
    damages = []
    for choice in itertools.product(*(unit.values() for unit in units)):
        size = sum(offer.size for offer in choice)
        active = sum(offer.active for offer in choice)
        if size <= limit and (active_limit is None or active <= active_limit):
            damages.append(sum(offer.damage for offer in choice))
    return min(damages, default=None)


def totals(units, chosen):
    offers = [unit[name] for unit, name in zip(units, chosen, strict=True)]
    return [sum(column) for column in zip(*offers, strict=True)]


def problem(rng, scale, damage):
    """Units of 2 to 4 offers, sizes in bytes, some of them equal."""
    units = []
    for _ in range(rng.randint(1, 6)):
        sizes = sorted(rng.randint(1, scale) for _ in range(rng.randint(2, 4)))
        read = rng.choice([1.0, 0.25, 2 / 8, 1 / 3])
        step = rng.choice([0.0, damage])  # ties
        units.append(
            {
                f"s{i}": Offer(size, size * read, rng.random() * damage + step)
                for i, size in enumerate(sizes)
            }
        )
    return units


@pytest.mark.parametrize("scale", [10, 10**6, 10**11])
@pytest.mark.parametrize("damage", [1.0, 1e-9, 1e6])
def test_no_choice_is_better(scale, damage):
    rng = random.Random(f"{scale} {damage}")
    found = 0
    for _ in range(40):
        units = problem(rng, scale, damage)
        smallest = sum(min(o.size for o in unit.values()) for unit in units)
        largest = sum(max(o.size for o in unit.values()) for unit in units)
        limit = rng.randint(smallest, largest)
        active_limit = rng.choice([None, rng.uniform(0.2, 1.0) * largest])
        expected = best(units, limit, active_limit)
        if expected is None:
            with pytest.raises(ValueError, match="budget"):
                choose(units, limit, active_limit)
            continue
        found += 1
        size, active, actual = totals(units, choose(units, limit, active_limit))
        assert size <= limit  # not by a byte
        assert active_limit is None or active <= active_limit
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9 * damage)
    assert found > 20


@pytest.mark.parametrize("bad", [1e3, 1e6, 1e9])
def test_one_bad_offer_does_not_hide_the_others(bad):
    """Two bits may do a million times what eight bits do."""
    rng = random.Random(bad)
    for _ in range(40):
        units = problem(rng, 10**6, 1.0)
        spoilt = rng.choice(units)
        name = min(spoilt, key=lambda n: spoilt[n].size)
        spoilt[name] = spoilt[name]._replace(damage=bad)
        least = sum(min(o.size for o in unit.values()) for unit in units)
        least += sorted(o.size for o in spoilt.values())[1] - spoilt[name].size
        limit = rng.randint(least, 2 * least)
        expected = best(units, limit, None)
        _, _, actual = totals(units, choose(units, limit, None))
        assert actual == pytest.approx(expected, rel=1e-6)


def test_a_byte_counts_in_a_terabyte():
    """HiGHS itself takes a limit to be kept if it is exceeded by a millionth."""
    units = [
        {"small": Offer(10**11 - 1, 0, 1.0), "large": Offer(10**11, 0, 0.0)}
        for _ in range(10)
    ]
    for spare in range(11):
        chosen = choose(units, 10 * (10**11 - 1) + spare)
        assert chosen.count("large") == spare


def test_many_units_are_quick():
    rng = random.Random(0)
    units = [
        {
            f"W{bits}": Offer(
                bits * size, bits * size / 16, rng.random() * 2.0 ** (-2 * bits)
            )
            for bits in (2, 3, 4, 5, 6, 8)
        }
        for size in (rng.randint(10**6, 10**8) for _ in range(500))
    ]
    limit = sum(unit["W4"].size for unit in units)
    size, _, damage = totals(units, choose(units, limit))
    assert size <= limit
    assert damage < sum(unit["W4"].damage for unit in units)


def test_free_and_equal_offers():
    """No damage at all, and units with one scheme only."""
    units = [{"a": Offer(5, 5, 0.0)}, {"a": Offer(3, 3, 0.0), "b": Offer(1, 1, 0.0)}]
    assert choose(units, 6) == ["a", "b"]
    with pytest.raises(ValueError, match=r"budget: 5 is less than .* take, 6;"):
        choose(units, 5)


def test_what_is_read_now_may_be_read():
    """A limit that is a sum of fractions, in another order than that of the sizes."""
    rng = random.Random(0)
    sizes = [rng.randint(10**8, 10**9) for _ in range(200)]
    units = [{"a": Offer(n, n / 3, 1.0), "b": Offer(n // 2, n / 6, 2.0)} for n in sizes]
    limit = sum(n / 3 for n in reversed(sizes)) + 7e10 - 7e10
    assert choose(units, sum(sizes), limit) == ["a"] * 200


def test_a_limit_on_what_is_read_that_nothing_keeps():
    units = [{"a": Offer(5, 5, 0.0), "b": Offer(1, 4, 0.0)}]
    with pytest.raises(
        ValueError, match=r"no choice of schemes is within the budgets .* -1 beyond"
    ):
        choose(units, 100, 3)


def test_what_the_solver_prints_is_not_seen(monkeypatch, capfd):
    """HiGHS has lines for debugging that it prints now and then."""

    def printing(*args, **kwargs):
        ctypes.CDLL(None).printf(b"HighsMipSolverData::planted\n")
        return milp(*args, **kwargs)

    monkeypatch.setattr("vsraq.bits.choice.milp", printing)
    assert choose([{"a": Offer(1, 1, 0.0)}], 1) == ["a"]
    print("afterwards")
    assert capfd.readouterr() == ("afterwards\n", "")
