"""Plans: which rows a step learns from, in every order and mixture."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from luthier.data.batches import plan_steps
from luthier.data.plans import Plan, Shares, competence

LENGTHS = [int(one) for one in np.random.default_rng(0).integers(3, 60, 97)]
SOURCES = ["a"] * 60 + ["b"] * 30 + ["c"] * 7
EVEN = {"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 1.0)}
MOVING = {"a": (1.0, 0.0), "b": (1.0, 1.0), "c": (0.0, 3.0)}
PLANS = {
    "shuffled": Plan(LENGTHS, 8, 60, 1),
    "apart": Plan(LENGTHS, 8, 60, 1, by_length=False),
    "given": Plan(LENGTHS, 8, 60, 1, "given"),
    "short_first": Plan(LENGTHS, 8, 60, 1, "short_first"),
    "competence": Plan(LENGTHS, 8, 60, 1, "competence"),
    "mixed": Plan(LENGTHS, 8, 130, 1, sources=SOURCES, weights=EVEN),
    "moving": Plan(LENGTHS, 8, 130, 1, sources=SOURCES, weights=MOVING),
    "mixed and given": Plan(LENGTHS, 8, 60, 1, "given", sources=SOURCES, weights=EVEN),
    "mixed and short first": Plan(LENGTHS, 8, 60, 1, "short_first", sources=SOURCES, weights=EVEN),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_the_same_from_every_step(name):
    plan = PLANS[name]
    whole = list(plan.steps_from(0))
    assert len(whole) == plan.steps
    for first in (1, 7, 13, 49, 50, 51, plan.steps - 1, plan.steps):
        assert list(plan.steps_from(first)) == whole[first:]


def test_shuffled_is_what_it_was():
    steps = [step for epoch in range(5) for step in plan_steps(LENGTHS, 8, seed=1, epoch=epoch, by_length=True)]
    assert list(PLANS["shuffled"].steps_from(0)) == steps[:60]


def test_given_is_the_order_of_the_data_each_pass():
    rows = [row for step in islice(PLANS["given"].steps_from(0), 13) for row in step]
    assert rows == list(range(97))
    assert list(PLANS["given"].steps_from(13))[:13] == list(PLANS["given"].steps_from(0))[:13]


def test_short_first_goes_through_ten_stages_and_then_shuffles():
    plan = Plan(list(range(400, 0, -1)), 4, 200, 0, "short_first")
    steps = list(plan.steps_from(0))
    first = [row for step in steps[:100] for row in step]
    assert sorted(first) == list(range(400)), "each row once"
    for stage in range(10):
        lengths = [plan.lengths[row] for row in first[40 * stage : 40 * stage + 40]]
        assert sorted(lengths) == list(range(40 * stage + 1, 40 * stage + 41))
        assert lengths != sorted(lengths)
    assert steps[100:] == plan_steps(plan.lengths, 4, seed=0, epoch=1, by_length=True)


def test_competence_by_hand():
    # c(t) = sqrt(t (1 - 0.01^2) / T + 0.01^2): 0.01 at first, 0.5001 at a quarter, 1 at the end.
    assert competence(0, 100) == pytest.approx(0.01)
    assert competence(25, 100) == pytest.approx((0.25 * 0.9999 + 0.0001) ** 0.5)
    assert competence(100, 100) == pytest.approx(1.0)


def test_competence_draws_from_the_shortest_rows_and_then_from_all():
    plan = Plan(list(range(1, 1001)), 10, 300, 0, "competence")
    steps = list(plan.steps_from(0))
    for step in range(150):
        assert len(set(steps[step])) == 10
        assert max(plan.lengths[row] for row in steps[step]) <= max(10, np.ceil(1000 * competence(step, 150)))
    assert sorted(row for step in steps[150:250] for row in step) == list(range(1000)), "then each row once a pass"
    # At step 75 of 150 the bound is sqrt(1/2): rows above 500 must be drawn by then.
    assert max(plan.lengths[row] for step in steps[70:80] for row in step) > 500


def test_each_source_has_its_exact_share():
    drawn = [SOURCES[row] for step in PLANS["mixed"].steps_from(0) for row in step]
    assert len(drawn) == 130 * 8
    for window in (50, 100, 130):
        counts = Counter(drawn[: window * 8])
        assert all(abs(counts[name] - window * 8 / 3) < 1 for name in "abc"), "in spite of 60, 30 and 7 rows"
    uneven = Plan(LENGTHS, 8, 50, 0, sources=SOURCES, weights={"a": (3.0, 3.0), "b": (1.0, 1.0)})
    assert Counter(SOURCES[row] for step in uneven.steps_from(0) for row in step) == {"a": 300, "b": 100}


def test_nothing_of_a_source_comes_twice_before_all_of_it_came():
    drawn = [row for step in Plan(LENGTHS, 8, 50, 0, sources=SOURCES, weights=EVEN).steps_from(0) for row in step]
    for name, size in (("a", 60), ("b", 30), ("c", 7)):
        times = Counter(row for row in drawn if SOURCES[row] == name)
        assert len(times) == size and max(times.values()) - min(times.values()) <= 1


def test_weights_move_over_the_run():
    drawn = [
        Counter(SOURCES[row] for row in step)
        for step in Plan(
            LENGTHS, 8, 1001, 0, by_length=False, sources=SOURCES, weights={"a": (1.0, 0.0), "b": (0.0, 1.0)}
        ).steps_from(0)
    ]
    assert drawn[0] == {"a": 8} and drawn[-1] == {"b": 8}
    assert abs(sum(step["b"] for step in drawn[450:550]) - 400) <= 2, "half at half time"
    assert abs(sum(step["b"] for step in drawn) - 1001 * 4) <= 1
    # A quarter of the run in: the share of b is t, so its rows so far are 8 x sum of t.
    assert abs(sum(step["b"] for step in drawn[:251]) - 8 * sum(t / 1000 for t in range(251))) < 1


def test_a_mixture_in_the_given_order():
    drawn = [row for step in PLANS["mixed and given"].steps_from(0) for row in step]
    assert [row for row in drawn if SOURCES[row] == "c"][:15] == [*range(90, 97), *range(90, 97), 90]


def test_shares_never_run_ahead_nor_fall_behind():
    random = np.random.default_rng(0)
    for _ in range(20):
        weight = random.random(2) + 0.01
        shares = Shares([(one, one) for one in weight])
        counts = np.zeros(2)
        for done in range(1, 400):
            counts[shares.draw(1, 0.0)[0]] += 1
            assert (abs(counts - done * weight / weight.sum()) < 1).all()
        again = Shares([(one, one) for one in weight], shares.owed)
        assert again.draw(50, 0.0) == shares.draw(50, 0.0)
