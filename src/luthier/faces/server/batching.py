"""The runner of batches: their requests after all that people wait for, and what came of them in files."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from luthier.core.errors import LuthierError
from luthier.faces.server.answering import new_id
from luthier.faces.server.files import keep_file
from luthier.faces.server.keys import Key
from luthier.faces.server.rows import read_lines
from luthier.faces.server.server import Server
from luthier.faces.server.store import Thing, Turned, store_of
from luthier.faces.server.within import Within

# Requests of a batch that are asked at once.
AT_ONCE = 16
# After whoever waits for an answer.
PRIORITY = -100
# Seconds between two looks for what another server was asked for.
LOOK = 5.0
# Statuses that mean "later", and the seconds until then.
LATER, WAIT = (429, 503), 1.0


@dataclass
class Counts:
    """Requests of a batch, and what came of them."""

    total: int
    completed: int = 0
    failed: int = 0


class Batching:
    """Carries out one batch after another. What is answered is on the disk at once, and is not asked again by a later server."""

    def __init__(self, server: Server):
        self._store, self._within = store_of(server), Within(server)
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.counts: dict[str, Counts] = {}

    def begin(self) -> None:
        """Go on with what an earlier server left, and with what comes."""
        (self._store.folder / "batches").mkdir(exist_ok=True)
        self._task = asyncio.create_task(self._run())

    def poke(self) -> None:
        """Something about a batch changed."""
        self._poked.set()

    async def end(self) -> None:
        """Leave off where it is."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        going = ("cancelling", "finalizing", "in_progress", "validating")
        while True:
            self._poked.clear()
            batch = next((one for one in self._store.all("batch") if one.content["status"] in going), None)
            if batch is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._poked.wait(), LOOK)
                continue
            try:
                await self._carry(batch)
            except Exception as err:
                # One batch that cannot be carried out must not keep the others from it.
                while isinstance(err, ExceptionGroup):
                    err = err.exceptions[0]
                sentence = str(err) if isinstance(err, LuthierError | OSError) else f"{type(err).__name__}: {err}"
                self._store.change("batch", batch.id, status="failed", failed_at=int(time.time()), trouble=sentence)

    async def _carry(self, batch: Thing) -> None:
        id = batch.id
        if batch.content["status"] == "validating":
            # Unless another server was told to cancel it just now.
            with suppress(Turned):
                self._store.change(
                    "batch", id, was=("validating",), status="in_progress", in_progress_at=int(time.time())
                )
        answers = Answers(self._store.folder / "batches", id)
        try:
            counts = self.counts[id] = Counts(batch.content["total"], *answers.counts)
            working = asyncio.create_task(self._ask_all(batch, answers, counts))
            try:
                while not working.done() and self._status(id) in ("in_progress", "validating"):
                    left = batch.content["expires_at"] - time.time()
                    if left <= 0:
                        break
                    poked = asyncio.create_task(self._poked.wait())
                    # Another server may be told to cancel it.
                    await asyncio.wait({working, poked}, timeout=min(left, LOOK), return_when=asyncio.FIRST_COMPLETED)
                    poked.cancel()
                    self._poked.clear()
            finally:
                if not working.done():
                    working.cancel()
                with suppress(asyncio.CancelledError):
                    await working
            if self._status(id) != "cancelling":
                for row in self._rows(batch):
                    if row["custom_id"] not in answers.done:
                        answers.expire(row["custom_id"])
        finally:
            answers.close()
        self._finish(batch, answers, counts)

    async def _ask_all(self, batch: Thing, answers: Answers, counts: Counts) -> None:
        rows = self._rows(batch)
        key = Key(name=batch.owner, sha256="")
        # Each worker takes the next row; between two rows of one nothing else is touched.
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._ask_some(rows, key, answers, counts))

    def _rows(self, batch: Thing) -> Iterator[dict[str, Any]]:
        stored = self._store.get("file", batch.content["input_file_id"])
        if stored is None:
            raise LuthierError("the input file is not there any more")
        return (row for _, row in read_lines(self._store.path_of(stored.content["stored"])) if isinstance(row, dict))

    async def _ask_some(self, rows: Iterator[dict[str, Any]], key: Key, answers: Answers, counts: Counts) -> None:
        for row in rows:
            if row["custom_id"] in answers.done:
                continue
            body = row["body"]
            # Null says nothing; what is no integer is for the address to refuse.
            asked = 0 if body.get("priority") is None else body["priority"]
            if row["url"] != "/v1/embeddings" and type(asked) is int:
                body = {**body, "priority": min(PRIORITY, asked)}
            while True:
                status, found = await self._within.post(row["url"], body, key)
                if status not in LATER:
                    break
                await asyncio.sleep(WAIT)
            answers.add(row["custom_id"], status, found)
            if status == 200:
                counts.completed += 1
            else:
                counts.failed += 1

    def _finish(self, batch: Thing, answers: Answers, counts: Counts) -> None:
        status = self._status(batch.id)
        if counts.completed + counts.failed >= counts.total:
            end = "completed" if status != "cancelling" else "cancelled"
        else:
            end = "cancelled" if status == "cancelling" else "expired"
        ended: dict[str, Any] = {}
        for what, path in (("output_file_id", answers.good), ("error_file_id", answers.bad)):
            if path.stat().st_size:
                content = {"filename": f"{batch.id}_{path.name.rpartition('.')[0].rpartition('.')[2]}.jsonl",
                           "purpose": "batch_output", "rows": None, "shape": "batch_output"}  # fmt: skip
                ended[what] = keep_file(self._store, new_id("file"), batch.owner, path, ".jsonl", content).id
        ended["finalizing_at"] = ended[f"{end}_at"] = int(time.time())
        self._store.change("batch", batch.id, status=end, completed=counts.completed, failed=counts.failed, **ended)
        for path in (answers.good, answers.bad):
            path.unlink(missing_ok=True)

    def _status(self, id: str) -> str:
        batch = self._store.get("batch", id)
        return "cancelling" if batch is None else str(batch.content["status"])


class Answers:
    """What came of a batch's requests so far: a file of answers, and one of errors."""

    def __init__(self, folder: Path, id: str):
        self.good, self.bad = folder / f"{id}.output.jsonl", folder / f"{id}.error.jsonl"
        self.done: set[str] = set()
        counts, self._files = [], list[BinaryIO]()
        for path in (self.good, self.bad):
            known = _read_whole(path)
            counts.append(len(known))
            self.done.update(known)
            self._files.append(open(path, "ab"))  # noqa: SIM115
        self.counts = (counts[0], counts[1])

    def add(self, custom_id: str, status: int, body: dict[str, Any]) -> None:
        """Note an answer."""
        row = {
            "id": new_id("batch_req"), "custom_id": custom_id,
            "response": {"status_code": status, "request_id": new_id("req"), "body": body}, "error": None,
        }  # fmt: skip
        self._write(0 if status == 200 else 1, row)

    def expire(self, custom_id: str) -> None:
        """Note that there was no time for an answer."""
        error = {"code": "batch_expired", "message": "this request was not answered before the batch expired"}
        self._write(1, {"id": new_id("batch_req"), "custom_id": custom_id, "response": None, "error": error})

    def _write(self, which: int, row: dict[str, Any]) -> None:
        file = self._files[which]
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        file.flush()
        self.done.add(row["custom_id"])

    def close(self) -> None:
        """All of it on the disk."""
        for file in self._files:
            with suppress(OSError):
                file.flush()
                os.fsync(file.fileno())
            file.close()


def _read_whole(path: Path) -> list[str]:
    """The requests that a file answers; a last line that was cut short is taken away."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line)["custom_id"] for line in whole.splitlines()]
