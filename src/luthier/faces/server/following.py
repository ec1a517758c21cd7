"""What a job's run says of itself: its events, figures and end, read from its directory."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from luthier.core.errors import RunError
from luthier.core.events import Event, read_events
from luthier.core.record import Record
from luthier.core.run import read_record, runs_root

# Bytes at the end of a file of events in which the last step stands.
TAIL = 2**16


def run_path(job: str) -> Path:
    """The directory of a job's run, which has its name."""
    return runs_root().absolute() / job


def record_of(job: str) -> Record | None:
    """The run's record, once there is one."""
    try:
        return read_record(run_path(job))
    except RunError:
        return None


def events_of(job: str) -> list[Event]:
    """What happened so far."""
    path = run_path(job) / "events.jsonl"
    return list(read_events(path)) if path.is_file() else []


def last_step(job: str) -> Event | None:
    """The newest step."""
    try:
        with open(run_path(job) / "events.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            # The first may be cut off where reading begins, and the last is being written.
            continue
        if event["event"] == "step":
            return dict(event)
    return None


def steps_of(events: Sequence[Event]) -> dict[int, dict[str, float]]:
    """What was measured at each step. A step that was done again after a stop counts as it was the last time."""
    found: dict[int, dict[str, float]] = {}
    for event in events:
        if event["event"] == "step":
            found[event["step"]] = {"train_loss": event["loss"]}
        elif event["event"] == "validate":
            found.setdefault(event["step"], {}).update(_validated(event))
    return dict(sorted(found.items()))


def _validated(event: Event) -> dict[str, float]:
    skipped = ("event", "time", "step", "best")
    numbers = {name: value for name, value in event.items() if name not in skipped and isinstance(value, int | float)}
    return {f"valid_{name}": float(value) for name, value in numbers.items()}


def as_table(steps: dict[int, dict[str, float]]) -> str:
    """The steps as CSV, with a column for whatever was measured at any of them."""
    names = list(dict.fromkeys(["train_loss", *(name for one in steps.values() for name in one)]))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["step", *names])
    for step, found in steps.items():
        table.writerow([step, *(f"{found[name]:.6g}" if name in found else "" for name in names)])
    return out.getvalue()


def sentence_in(log: Path) -> str | None:
    """The error that a command ended with, out of what it wrote."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    _, found, sentence = ("\n" + text).rpartition("\nluthier: ")
    return sentence.strip() if found else None
