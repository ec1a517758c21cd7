"""What a server keeps of files, jobs, batches, tuned models and responses: one SQLite file in the runs directory."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from luthier.core.errors import LuthierError, RunError
from luthier.core.run import runs_root
from luthier.faces.server.keys import Key
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.server import Server

Kind: TypeAlias = Literal["file", "job", "batch", "model", "response"]
Level: TypeAlias = Literal["info", "warn", "error"]
VERSION = 1
SCHEMA = """
CREATE TABLE things (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL,
    content TEXT NOT NULL, UNIQUE (kind, id)
);
CREATE TABLE said (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, time REAL NOT NULL, level TEXT NOT NULL,
    message TEXT NOT NULL
);
CREATE INDEX said_of ON said (job);
"""
NAMES: dict[Kind, str] = {
    "file": "file",
    "job": "fine-tuning job",
    "batch": "batch",
    "model": "tuned model",
    "response": "response",
}


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that is kept, and whose it is."""

    id: str
    owner: str
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence of the server about a job."""

    number: int
    time: float
    level: Level
    message: str


class Turned(LuthierError):
    """The status of something is another one by now: that of `thing`."""

    def __init__(self, thing: Thing):
        super().__init__(f"{thing.id} is {thing.content['status']} by now")
        self.thing = thing


class Store:
    """Things by kind and id. Its calls are short, and made on the thread of the server's loop alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(folder / "server.sqlite3", isolation_level=None, timeout=10)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            # What is dropped is written over.
            self._base.execute("PRAGMA secure_delete = ON")
            self._prepare()
        except (OSError, sqlite3.Error) as err:
            raise RunError(
                f"{folder}: what the server keeps cannot be opened ({err}); set LUTHIER_RUNS to a writable place"
            ) from None

    def _prepare(self) -> None:
        found = self._base.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise RunError(
                f"{self.folder / 'server.sqlite3'}: a newer Luthier made this file (form {found}, here {VERSION}); update Luthier"
            )
        if found == 0:
            # Of two servers that begin at once one finds the tables made.
            self._base.executescript(
                f"BEGIN IMMEDIATE; {SCHEMA.replace('CREATE TABLE', 'CREATE TABLE IF NOT EXISTS')}"
                f"PRAGMA user_version = {VERSION}; COMMIT;".replace("CREATE INDEX", "CREATE INDEX IF NOT EXISTS")
            )

        self._base.execute("CREATE INDEX IF NOT EXISTS things_of ON things (kind, owner, number)")

    def close(self) -> None:
        """Write all into one file."""
        self._base.close()

    def put(self, kind: Kind, id: str, owner: str, content: dict[str, Any]) -> Thing:
        """Keep something new."""
        with _writing():
            self._base.execute(
                "INSERT INTO things (kind, id, owner, content) VALUES (?, ?, ?, ?)",
                (kind, id, owner, json.dumps(content)),
            )
        return Thing(id, owner, content)

    def get(self, kind: Kind, id: str) -> Thing | None:
        """One of them, if it is there."""
        row = self._base.execute(
            "SELECT id, owner, content FROM things WHERE kind = ? AND id = ?", (kind, id)
        ).fetchone()
        return None if row is None else Thing(row[0], row[1], json.loads(row[2]))

    def change(self, kind: Kind, id: str, *, was: Collection[str] | None = None, **content: Any) -> Thing:
        """Replace some of the content. Raises Refusal where it is not there, and Turned where its status is none of `was`:
        another server may change it too, so it is looked at and written at once."""
        with _writing(), self._alone():
            found = self.get(kind, id)
            if found is None:
                raise _absent(kind, id)
            if was is not None and found.content["status"] not in was:
                raise Turned(found)
            new = {**found.content, **content}
            self._base.execute("UPDATE things SET content = ? WHERE kind = ? AND id = ?", (json.dumps(new), kind, id))
        return Thing(id, found.owner, new)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What is read and written inside is read and written before or after all that others do."""
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def all(self, kind: Kind) -> list[Thing]:
        """Every one of a kind, oldest first."""
        rows = self._base.execute("SELECT id, owner, content FROM things WHERE kind = ? ORDER BY number", (kind,))
        return [Thing(id, owner, json.loads(content)) for id, owner, content in rows]

    def count(self, kind: Kind, owner: str) -> int:
        """How many of a kind somebody has."""
        row = self._base.execute("SELECT COUNT(*) FROM things WHERE kind = ? AND owner = ?", (kind, owner)).fetchone()
        return int(row[0])

    def first(self, kind: Kind, owner: str | None = None) -> Thing | None:
        """The oldest of a kind, of somebody or of all."""
        whose, names = ("", (kind,)) if owner is None else (" AND owner = ?", (kind, owner))
        row = self._base.execute(
            "SELECT id, owner, content FROM things WHERE number = "
            f"(SELECT MIN(number) FROM things WHERE kind = ?{whose})", names,
        ).fetchone()  # fmt: skip
        return None if row is None else Thing(row[0], row[1], json.loads(row[2]))

    def drop(self, kind: Kind, id: str) -> None:
        """Keep it no longer."""
        with _writing():
            self._base.execute("DELETE FROM things WHERE kind = ? AND id = ?", (kind, id))

    @property
    def version(self) -> int:
        """Another number whenever somebody else wrote something."""
        return int(self._base.execute("PRAGMA data_version").fetchone()[0])

    def say(self, job: str, message: str, level: Level = "info") -> None:
        """Note a sentence about a job."""
        with _writing():
            self._base.execute(
                "INSERT INTO said (job, time, level, message) VALUES (?, ?, ?, ?)", (job, time.time(), level, message)
            )

    def said(self, job: str) -> list[Said]:
        """What was said of a job, oldest first."""
        rows = self._base.execute("SELECT number, time, level, message FROM said WHERE job = ? ORDER BY number", (job,))
        return [Said(*row) for row in rows]

    def path_of(self, file: str) -> Path:
        """Where the content of a file lies. Its name is made here, never by who sent it."""
        return self.folder / "files" / file


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as err:
        if err.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise Refusal(
                503, "another server is writing what both keep, so this was not noted; ask again", code="busy", wait=2.0
            ) from None
        raise Refusal(507, f"the server could not note this ({err}); make room on its disk", code="disk_full") from None


def store_of(server: Server) -> Store:
    """Of a server; opened when something of it is first needed. Raises Refusal where it cannot be."""
    if "store" not in server.parts:
        try:
            server.parts["store"] = Store(runs_root().absolute() / "server")
        except RunError as err:
            raise Refusal(503, str(err)) from None
    found: Store = server.parts["store"]
    return found


def refuse_elsewhere(server: Server) -> None:
    """Raises Refusal where another server holds the queue: it would carry out what is asked for here with its own models."""
    if "elsewhere" in server.parts:
        raise Refusal(
            503, "another server works in the same runs directory and holds the queue of jobs and batches; ask that one",
            code="queue_elsewhere",
        )  # fmt: skip


def owns(key: Key, thing: Thing) -> bool:
    """Whether a key may see something."""
    return thing.owner == key.name or "admin" in key.scopes


def mine(store: Store, key: Key, kind: Kind, id: str, param: str | None = None) -> Thing:
    """Something of the owner of `key`. Raises Refusal where there is none, and for what is somebody else's alike."""
    found = store.get(kind, id)
    if found is None or not owns(key, found):
        raise _absent(kind, id, param)
    return found


def _absent(kind: Kind, id: str, param: str | None = None) -> Refusal:
    where = f"{param}: " if param else ""
    return Refusal(
        404 if param is None else 400, f"{where}there is no {NAMES[kind]} {id!r}", param=param, code="not_found"
    )
