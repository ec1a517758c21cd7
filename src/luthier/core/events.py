"""What happens while a run goes on: one JSON line an event, and the same events to whoever listens."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

Event: TypeAlias = dict[str, Any]
"""`event` (its kind), `time` (seconds since the epoch), and the kind's own fields:

- stage: `name` ("loading the model"), announces what comes next
- step: `step`, `steps`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens`, `tokens_per_second`, `seconds_left`;
  `tally` (names and numbers) where the objective counts something; with several sources `drawn`, the rows of each so
  far; `epoch` is null for a stream
- validate: `step`, `loss`, metric names and values, `best`; with several sources `loss/<source>` of each
- checkpoint: `step`, `path`
- progress: `name`, `done`, `total`, `seconds_left`
- choice: `name`, `value`, `why`
- warning: `message`, `count`
- sample: anything worth showing, as it is
"""
Sink: TypeAlias = Callable[[Event], None]


class Events:
    """Appends events to `path` (if given), hands them to the sinks, and counts warnings."""

    def __init__(self, path: Path | None = None, sinks: Sequence[Sink] = ()):
        self._path = path
        self._file: TextIO | None = None
        self._sinks = list(sinks)
        self.warnings: Counter[str] = Counter()
        self.choices: dict[str, str] = {}

    def emit(self, kind: str, **fields: Any) -> None:
        """Record one event of `kind` and hand it to the sinks."""
        event = {"event": kind, "time": round(time.time(), 3), **fields}
        if self._path is not None:
            if self._file is None:
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink(event)

    def stage(self, name: str) -> None:
        """Announce the next stage of the work."""
        self.emit("stage", name=name)

    def warn(self, message: str, count: int = 1) -> None:
        """Record a warning; `count` is how many rows, texts or times it stands for."""
        self.warnings[message] += count
        self.emit("warning", message=message, count=count)

    def choose(self, name: str, value: Any, why: str) -> None:
        """Record what was decided for the user, and why."""
        self.choices[name] = f"{value}: {why}"
        self.emit("choice", name=name, value=value, why=why)

    def close(self) -> None:
        """Close the file (a later event opens it again); sinks stay with their owners."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(path: Path) -> Iterator[Event]:
    """The events of a run; a last line cut short by a crash is left out."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
