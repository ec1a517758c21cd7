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
