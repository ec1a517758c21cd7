"""When checkpoints are written."""

import json

from luthier.core.config import resolve
from luthier.training.pace import LEAST, TIMES, Pace
from luthier.verbs.tune import Tune, tune


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_where_nobody_says_writing_takes_a_small_share_of_the_time():
    clock = Clock()
    pace = Pace(None, clock)
    assert not pace.due(1)
    clock.now += LEAST
    assert pace.due(2)
    with pace.writing():
        clock.now += 10
    clock.now += LEAST + 1
    assert not pace.due(3)
    clock.now += 10 * TIMES
    assert pace.due(4)


def test_steps_that_are_given_are_kept_to():
    clock = Clock()
    assert [step for step in range(1, 8) if Pace(3, clock).due(step)] == [3, 6]
    clock.now += 10 * LEAST
    assert not any(Pace(0, clock).due(step) for step in range(1, 8))


def test_a_short_run_writes_one_checkpoint_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path / "runs"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {at} of all"}) + "\n" for at in range(20)))
    written = []

    def note(event):
        if event["event"] == "checkpoint":
            written.append(event["step"])

    values = {"model": "mini", "data": str(rows), "steps": 6, "batch_size": 2, "validate_every": 2, "baselines": False}
    tune(resolve(Tune, values=values), sinks=[note])
    assert written == [6]
