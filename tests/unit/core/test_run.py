"""Run directories: never half-written, never shared, always accounted for."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from luthier.core.config import Config, resolve
from luthier.core.errors import ConfigError, RunError
from luthier.core.events import Events, read_events
from luthier.core.run import Run, find_run, list_runs, read_record, write_atomically


class Asked(Config):
    model: str = "mini"
    """Which."""
    steps: int = 3
    """How many."""


def test_a_run_from_start_to_end(runs):
    asked = resolve(Asked, values={"steps": 5}).advise(model="other")
    run = Run.create("tune", asked, name="first")
    with run.working():
        assert read_record(run.path).state == "running"
        run.events.warn("a row was cut", 2)
        run.events.warn("a row was cut", 1)
        run.events.choose("rate", 0.1, "because")
        run.update(numbers={"steps": 5})
    record = read_record(runs / "first")
    assert record.state == "finished" and record.warnings == {"a row was cut": 3}
    assert record.choices == {"rate": "0.1: because"} and record.numbers == {"steps": 5}
    assert record.versions["python"] and record.machine["cores"] >= 1 and record.seconds > 0
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"steps": 5}
    table = yaml.safe_load((run.path / "resolved.yaml").read_text())
    assert table == {"model": {"value": "other", "origin": "advised"}, "steps": {"value": 5, "origin": "override"}}
    assert [event["event"] for event in read_events(run.path / "events.jsonl")] == ["warning", "warning", "choice"]


@pytest.mark.parametrize("said", ["房间 🎻 " * 20, "a: b\nc", "\\Users", "1e-3", "x" * 200])
def test_what_was_asked_is_written_to_be_read(said):
    run = Run.create("tune", resolve(Asked, values={"model": said}))
    text = (run.path / "config.yaml").read_text(encoding="utf-8")
    assert text == yaml.safe_dump({"model": said}, allow_unicode=True, sort_keys=False)
    assert yaml.safe_load(text) == {"model": said}


def test_the_end_is_recorded_whatever_it_was():
    for error, state in (
        (KeyboardInterrupt(), "interrupted"),
        (ConfigError("no"), "failed"),
        (ZeroDivisionError("x"), "failed"),
    ):
        run = Run.create("tune")
        with pytest.raises(type(error)), run.working():
            raise error
        assert read_record(run.path).state == state
    assert read_record(run.path).error == "ZeroDivisionError: x"


def test_a_taken_name_is_refused_and_a_default_one_is_not(runs):
    Run.create("tune", name="mine")
    with pytest.raises(RunError, match="this run exists"):
        Run.create("tune", name="mine")
    first, second = Run.create("tune"), Run.create("tune")
    assert first.path != second.path
    with pytest.raises(RunError, match="no path"):
        Run.create("tune", name="../out")


def test_finding_runs(runs):
    run = Run.create("tune", name="alpha")
    assert find_run("run:alpha") == find_run("alpha") == find_run(run.path) == find_run("run:last") == runs / "alpha"
    with pytest.raises(RunError, match="did you mean 'alpha'"):
        find_run("run:alhpa")
    assert list_runs() == [runs / "alpha"]
    (runs / "alpha" / "record.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_record(runs / "alpha")


def test_two_processes_cannot_work_on_one_run(runs):
    run = Run.create("tune", name="busy")
    code = "from luthier.core.run import Run\nwith Run.open('busy').working(): pass"
    with run.working():
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode != 0 and "another process is working on this run" in other.stderr


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(runs):
    runs.mkdir()
    runs.chmod(0o500)
    with pytest.raises(RunError, match="cannot be made"):
        Run.create("tune")


def test_a_torn_last_event_is_left_out(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.emit("step", step=1)
    events.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "step"})[:-4])
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [1]
