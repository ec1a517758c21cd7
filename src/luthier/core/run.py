"""A run is a directory: what was asked, what happened, what came out. Nothing in it is ever half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from luthier.core.config import Config, Resolved
from luthier.core.errors import LuthierError, RunError, did_you_mean
from luthier.core.events import Events, Sink
from luthier.core.record import Record, collect_versions, describe_machine, measure_peak_memory, now

C = TypeVar("C", bound=Config)


def runs_root() -> Path:
    """Where runs live: $LUTHIER_RUNS, else ./runs."""
    return Path(os.environ.get("LUTHIER_RUNS", "runs"))


class Run:
    """One run directory, open for work.

    Holds `config.yaml` (as asked), `resolved.yaml` (every value and its origin), `events.jsonl`, `record.json`,
    `artefacts/` and, while tuning, `checkpoints/`.
    """

    def __init__(self, path: Path, record: Record, sinks: Sequence[Sink] = ()):
        self.path, self.record = path, record
        self.events = Events(path / "events.jsonl", sinks)
        self.discarded = False
        self._started = time.monotonic()
        self._seconds_before = record.seconds

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def artefacts(self) -> Path:
        return self.path / "artefacts"

    @classmethod
    def create(
        cls, verb: str, asked: Resolved[C] | None = None, *, name: str | None = None, sinks: Sequence[Sink] = ()
    ) -> Run:
        """Make a new run directory. Raises RunError when `name` is taken or the place cannot be written."""
        root = runs_root()
        if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
            raise RunError(f"the run name {name!r} may hold letters, digits, '.', '-' and '_' only, and no path")
        stem = name or f"{verb}-{datetime.now():%m%d-%H%M%S}"
        path, attempt = root / stem, 1
        while True:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                if name is not None:
                    raise RunError(
                        f"{path}: this run exists; choose another --name, go on with --resume run:{name}, or remove the directory"
                    ) from None
                attempt += 1
                path = root / f"{stem}-{attempt}"
            except OSError as err:
                raise RunError(
                    f"{path}: the run directory cannot be made ({err.strerror}); set LUTHIER_RUNS to a writable place"
                ) from None
        (path / "artefacts").mkdir()
        record = Record(id=path.name, verb=verb, created=now(), versions=collect_versions(), machine=describe_machine())
        run = cls(path, record, sinks)
        if asked is not None:
            run.write_config(asked)
        run.save()
        return run

    @classmethod
    def open(cls, reference: str | Path, sinks: Sequence[Sink] = ()) -> Run:
        """Open an existing run given as `run:<id>`, `<id>` or a path. Raises RunError."""
        path = find_run(reference)
        return cls(path, read_record(path), sinks)

    def write_config(self, asked: Resolved[C]) -> None:
        """Write what was asked (`config.yaml`, only what somebody chose) and `resolved.yaml` (all, with origins)."""
        rows = list(asked.rows())
        chosen: dict[str, Any] = {}
        for path, value, origin in rows:
            if origin in ("file", "override"):
                _put(chosen, path, value)
        write_atomically(self.path / "config.yaml", _as_yaml(chosen))
        table = {path: {"value": value, "origin": origin} for path, value, origin in rows}
        write_atomically(self.path / "resolved.yaml", _as_yaml(table))

    def update(self, **fields: Any) -> None:
        """Replace fields of the record and write it."""
        self.record = self.record.model_copy(update=fields)
        self.save()

    def save(self) -> None:
        """Write the record as it stands, with the time, warnings and choices so far."""
        if self.discarded:
            return
        warnings = dict(self.record.warnings)
        for message, count in self.events.warnings.items():
            warnings[message] = max(warnings.get(message, 0), count)
        self.record = self.record.model_copy(
            update={
                "seconds": self._seconds_before + time.monotonic() - self._started,
                "warnings": warnings,
                "choices": {**self.record.choices, **self.events.choices},
                "peak_memory_bytes": measure_peak_memory(),
            }
        )
        write_atomically(self.path / "record.json", self.record.model_dump_json(indent=2))

    @contextmanager
    def working(self) -> Iterator[Run]:
        """Hold the run for this process while work goes on, and leave its end in the record: finished, interrupted or failed."""
        with hold_lock(self.path / "lock"):
            self.update(state="running", error=None)
            try:
                yield self
            except KeyboardInterrupt:
                self.update(state="interrupted")
                raise
            except BaseException as err:
                text = str(err) if isinstance(err, LuthierError) else f"{type(err).__name__}: {err}"
                self._save_if_possible(state="failed", error=text)
                raise
            else:
                self.update(state="finished")
            finally:
                self.events.close()

    def _save_if_possible(self, **fields: Any) -> None:
        try:
            self.update(**fields)
        except OSError:
            # A full disk must not hide the error that is being reported.
            return


def find_run(reference: str | Path, fits: Callable[[Path], bool] = lambda _: True) -> Path:
    """The directory of `run:<id>`, `run:last` (the newest that `fits`), `<id>` or a path to one. Raises RunError with the
    nearest names."""
    name = str(reference).removeprefix("run:")
    if name == "last":
        runs = [path for path in list_runs() if fits(path)]
        if not runs:
            if list_runs():
                raise RunError(
                    f"{runs_root()}: none of the runs holds what is asked for; name one, or start with `luthier tune`"
                )
            raise RunError(f"{runs_root()}: no runs yet; `luthier tune` makes the first")
        return runs[-1]
    for path in (runs_root() / name, Path(name)):
        # Unlike Path.is_file this says no to a name that is too long.
        if os.path.isfile(path / "record.json"):
            return path
    known = [path.name for path in list_runs()]
    hint = did_you_mean(name, known) if known else "there are no runs yet"
    raise RunError(f"run:{name}: no such run in {runs_root()}; {hint}")


def list_runs() -> list[Path]:
    """Every run directory, oldest first."""
    root = runs_root()
    found = [path for path in root.iterdir() if (path / "record.json").is_file()] if root.is_dir() else []
    return sorted(found, key=lambda path: (read_record(path).created, path.stat().st_ctime, path.name))


def read_record(path: Path) -> Record:
    """The record in a run directory. Raises RunError when it is damaged."""
    try:
        return Record.model_validate_json((path / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError) as err:
        raise RunError(f"{path / 'record.json'}: cannot be read as a run's record ({type(err).__name__})") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to the side, flush to the disk, rename: a reader sees the old file or the new one, never a part."""
    side = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(side, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(side, path)
    except OSError as err:
        side.unlink(missing_ok=True)
        raise RunError(
            f"{path}: cannot be written ({err.strerror}); the earlier version, if any, is untouched"
        ) from err


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold `path` as a lock; raises RunError when another process has it. The kernel frees it if we are killed."""
    try:
        import fcntl
    except ImportError:
        yield  # no advisory locks on this system
        return
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{path.parent}: another process is working on this run; wait for it or stop it") from None
        yield


def discard(run: Run) -> None:
    """Remove a run whose request was refused before any work was done, so that its name is free and nothing is left."""
    shutil.rmtree(run.path, ignore_errors=True)
    run.discarded = True


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Dataclass rows to `path`, one JSON object a line."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    write_atomically(path, "".join(line + "\n" for line in lines))


def _as_yaml(table: dict[str, Any]) -> str:
    import yaml

    # The one in C takes a quarter of the time, and escapes what it could write: characters that take four bytes.
    fast = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(table, Dumper=fast, allow_unicode=True, sort_keys=False)
    if "\\U" in text:
        text = yaml.safe_dump(table, allow_unicode=True, sort_keys=False)
    return text


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value
