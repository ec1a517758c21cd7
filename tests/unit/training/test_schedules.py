"""Learning-rate factors at the points where one can say what they must be."""

import pytest

from luthier.training.schedules import SCHEDULES


@pytest.mark.parametrize("kind", SCHEDULES.names())
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 0.1, 5])
def test_every_schedule_stays_between_zero_and_one(kind, steps, warmup):
    schedule = SCHEDULES.parse({"kind": kind, "warmup": warmup})
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0


def test_warmup_rises_in_a_line_and_never_starts_at_zero():
    schedule = SCHEDULES.parse({"kind": "constant", "warmup": 4})
    assert [schedule.factor(step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_linear_and_cosine_halve_in_the_middle_and_end_at_their_floor():
    for kind in ("linear", "cosine"):
        schedule = SCHEDULES.parse({"kind": kind, "warmup": 0})
        assert schedule.factor(50, 100) == pytest.approx(0.5)
        floored = SCHEDULES.parse({"kind": kind, "warmup": 0, "floor": 0.2})
        assert floored.after(100, 100) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_falls():
    schedule = SCHEDULES.parse({"kind": "wsd", "warmup": 0, "decay": 0.2})
    factors = [schedule.factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([1] * 9 + [0.5])


def test_cosine_starts_again():
    schedule = SCHEDULES.parse({"kind": "cosine", "warmup": 0, "restarts": 1})
    factors = [schedule.factor(step, 8) for step in range(8)]
    half = [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]
    assert factors == pytest.approx(half * 2)


def test_inverse_square_root_is_that_of_the_transformer():
    schedule = SCHEDULES.parse({"kind": "inverse_sqrt", "warmup": 4})
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    # rate(t) is proportional to min(t^-0.5, t warmup^-1.5), t from 1; its peak is warmup^-0.5.
    assert factors == pytest.approx([min(t**-0.5, t * 4**-1.5) * 2 for t in range(1, 101)])


def test_polynomial_is_a_power_of_the_line():
    schedule = SCHEDULES.parse({"kind": "polynomial", "warmup": 0, "power": 2, "floor": 0.2})
    assert [schedule.after(step, 4) for step in range(5)] == pytest.approx([1, 0.65, 0.4, 0.25, 0.2])
