"""The runner of fine-tuning jobs: one after another, each a `luthier tune` in a process of its own that outlives the server."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from luthier.core.errors import LuthierError
from luthier.core.run import write_atomically
from luthier.faces.server.answering import new_id
from luthier.faces.server.engines import Gone
from luthier.faces.server.files import keep_file
from luthier.faces.server.following import as_table, events_of, record_of, run_path, sentence_in, steps_of
from luthier.faces.server.processes import born, tell
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.server import Server
from luthier.faces.server.store import Store, Thing, Turned, store_of

# Seconds between two looks at a process.
LOOK = 0.2
# Seconds between two looks for what another server was asked for.
IDLE = 5.0
# Seconds that a run which is cancelled has for its end.
GRACE = 30.0
# How often a run is started again after it died without a word, and got no further.
AGAIN = 2


# Statuses of a job that is to run.
RUNS = ("queued", "running")


class Tuning:
    """Carries out what the store says: the status of a job is what somebody wants of it, and its process follows."""

    def __init__(self, server: Server):
        self._server, self._store = server, store_of(server)
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._own: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self) -> None:
        """Go on with what an earlier server left, and with what comes."""
        (self._store.folder / "jobs").mkdir(exist_ok=True)
        self._task = asyncio.create_task(self._run())

    def poke(self) -> None:
        """Something about a job changed."""
        self._poked.set()

    async def end(self) -> None:
        """Let the run that goes on write a checkpoint and end; the next server goes on with it."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for job in self._store.all("job"):
            if job.content["status"] == "running" and _lives(job):
                self._store.change("job", job.id, told=True)
                tell(job.content["pid"], signal.SIGTERM)

    async def _run(self) -> None:
        for left in self._store.all("job"):
            # Cancelled or paused when nobody was there to tell its process.
            if left.content["status"] != "running" and _lives(left):
                await self._stop(left)
        while True:
            self._poked.clear()
            job = self._next()
            if job is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._poked.wait(), IDLE)
                continue
            try:
                await self._carry(job)
            except Exception as err:
                # One job that cannot be carried out must not keep the others from it.
                sentence = str(err) if isinstance(err, LuthierError) else f"{type(err).__name__}: {err}"
                with suppress(LuthierError):
                    self._fail(job.id, sentence, "server_error")

    def _next(self) -> Thing | None:
        jobs = self._store.all("job")
        running = [one for one in jobs if one.content["status"] == "running"]
        return next(iter([*running, *(one for one in jobs if one.content["status"] == "queued")]), None)

    async def _carry(self, job: Thing) -> None:
        try:
            job = self._store.change("job", job.id, was=RUNS, status="running")
        except Turned:
            # Cancelled or paused at another server in the meantime.
            return
        record = record_of(job.id)
        if record is None or record.state != "finished":
            if not _lives(job):
                job = self._start(job, resume=record is not None)
            await self._follow(job)
        await self._conclude(job.id)

    def _start(self, job: Thing, *, resume: bool) -> Thing:
        folder = self._store.folder / "jobs"
        command = [sys.executable, "-m", "luthier", "tune"]
        if resume:
            command += ["--resume", f"run:{job.id}"]
        else:
            import yaml

            # Of a run that was killed before it had a record.
            shutil.rmtree(run_path(job.id), ignore_errors=True)
            path = folder / f"{job.id}.yaml"
            write_atomically(path, yaml.safe_dump({**job.content["settings"], "name": job.id}, sort_keys=False))
            command.append(str(path))
        environment = {**os.environ, "LUTHIER_LANG": "en", "LUTHIER_RUNS": str(run_path(job.id).parent)}
        with open(folder / f"{job.id}.log", "wb") as log:
            # A session of its own, and a file for what it says: it goes on when this server does not.
            # asyncio's own processes are killed with their loop, so it is not one of those.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._own[job.id] = process
        self._store.say(job.id, "The job goes on from its newest checkpoint" if resume else "The job has started")
        return self._store.change("job", job.id, pid=process.pid, born=born(process.pid), told=False)

    async def _follow(self, job: Thing) -> None:
        """Until its process has ended; it is told to when the job is not to run any more."""
        while _lives(job):
            if self._status(job.id) != "running":
                await self._stop(job)
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), LOOK)
            self._poked.clear()

    async def _stop(self, job: Thing) -> None:
        tell(job.content["pid"], signal.SIGTERM)
        until = time.monotonic() + GRACE
        while _lives(job):
            await asyncio.sleep(LOOK)
            # A run that is paused keeps what it learned, however long its step takes.
            if time.monotonic() > until and self._status(job.id) == "cancelled":
                tell(job.content["pid"], signal.SIGKILL)

    async def _conclude(self, id: str) -> None:
        """Note what became of a run that ended."""
        process = self._own.pop(id, None)
        code = None if process is None else process.wait()
        if self._status(id) != "running":
            return
        record, sentence = record_of(id), sentence_in(self._store.folder / "jobs" / f"{id}.log")
        if record is not None and record.state == "finished":
            await self._succeed(id)
        elif record is not None and record.state == "failed":
            self._fail(id, record.error or "the run failed", "training_failed")
        elif record is None and sentence is not None:
            # Refused before anything was learned: nothing of the run was kept.
            self._fail(id, sentence, "invalid_job", param="training_file" if ".jsonl" in sentence else None)
        else:
            self._try_again(id, code, stopped=record is not None and record.state == "interrupted")

    def _try_again(self, id: str, code: int | None, *, stopped: bool) -> None:
        job = self._store.get("job", id)
        assert job is not None
        how = f"signal {-code}" if code is not None and code < 0 else "no word" if code is None else f"exit code {code}"
        reached = max((one.name for one in (run_path(id) / "checkpoints").glob("step-*")), default="")
        before = job.content.get("deaths", 0) if reached == job.content.get("reached", "") else 0
        told = stopped or job.content.get("told")
        deaths = before if told else before + 1
        if deaths > AGAIN:
            self._fail(
                id,
                f"the run's process ended {deaths} times at the same place without saying why (last with {how})",
                "died",
            )
            return
        why = "told to stop" if told else f"killed ({how})"
        self._store.say(id, f"The run's process was {why}; it is started again", "warn")
        self._store.change("job", id, deaths=deaths, reached=reached)

    def _fail(self, id: str, sentence: str, code: str, param: str | None = None) -> None:
        error = {"code": code, "message": sentence, "param": param}
        with suppress(Turned):
            self._store.change("job", id, was=RUNS, status="failed", error=error, finished_at=int(time.time()))
            self._store.say(id, f"The job failed: {sentence}", "error")

    async def _succeed(self, id: str) -> None:
        record, job = record_of(id), self._store.get("job", id)
        assert record is not None and job is not None
        if not job.content["result_files"]:
            job = await self._keep_results(job)
        name = name_of(job)
        served = await self._serve(name, job)
        self._store.say(id, f"New fine-tuned model created: {name}" if served else f"The model is at run:{id}")
        self._store.change(
            "job", id, status="succeeded", finished_at=int(time.time()), error=None,
            fine_tuned_model=name if served else f"run:{id}", trained_tokens=record.numbers.get("tokens"),
        )  # fmt: skip
        self._store.say(id, "The job has successfully completed")

    async def _keep_results(self, job: Thing) -> Thing:
        """The table of what was measured, as a file."""
        try:
            id, path, rows = await asyncio.to_thread(write_results, self._store, job.id)
            content = {"filename": f"{job.id}.csv", "purpose": "fine-tune-results", "rows": rows, "shape": "csv"}
            kept = keep_file(self._store, id, job.owner, path, ".csv", content)
            return self._store.change("job", job.id, result_files=[kept.id])
        except (LuthierError, OSError) as err:
            self._store.say(job.id, f"The result file was not written: {err}", "warn")
            return job

    async def _serve(self, name: str, job: Thing) -> bool:
        """Serve what was tuned, now and by the next server."""
        shelf = self._server.shelf
        try:
            served = shelf.models.get(name) or await shelf.load(f"run:{job.id}", name, rests=True)
        except (LuthierError, OSError) as err:
            self._store.say(job.id, f"The model is not served: {err}", "warn")
            return False
        if self._store.get("model", name) is None:
            content = {"source": f"run:{job.id}", "created": served.created, "facts": served.process.facts}
            self._store.put("model", name, job.owner, content)
        tuned_of(self._server).add(name)
        return True

    def _status(self, id: str) -> str:
        job = self._store.get("job", id)
        return "cancelled" if job is None else str(job.content["status"])


async def serve_tuned(server: Server) -> None:
    """Serve what was tuned, here or by another server: each is loaded when it is first asked for. One that was served so and is
    kept no longer is let go; one that was unloaded here stays away. Raises the first error of those that cannot be served, after
    all others are."""
    shelf, kept = server.shelf, {one.id: one for one in store_of(server).all("model")}
    known, trouble = tuned_of(server), None
    for name in known - kept.keys():
        known.discard(name)
        # It may have gone away here already.
        with suppress(Refusal):
            await shelf.unload(name)
    for name, model in kept.items():
        if name in known:
            continue
        try:
            if name not in shelf.models:
                facts = model.content["facts"]
                served = await shelf.load(model.content["source"], name, rests=True, facts=facts)
                served.created = model.content["created"]
        except (LuthierError, OSError) as err:
            trouble = trouble or err
            if isinstance(err, Gone):
                # Its base is being started again.
                continue
        known.add(name)
    if trouble is not None:
        raise trouble


def tuned_of(server: Server) -> set[str]:
    """The names of tuned models that were served here."""
    found: set[str] = server.parts.setdefault("tuned", set())
    return found


def write_results(store: Store, job: str) -> tuple[str, Path, int]:
    """(a new file's id, where the table of a run's measurements lies, its rows)."""
    steps, id = steps_of(events_of(job)), new_id("file")
    path = store.folder / "files" / f".{id}.part"
    write_atomically(path, as_table(steps))
    return id, path, len(steps)


def name_of(job: Thing) -> str:
    """The name of the tuned model: ft:BASE:SUFFIX:ID."""
    base = job.content["model"]
    base = base.split(":")[1] if base.startswith("ft:") else base.replace(":", "-")
    return f"ft:{base}:{job.content['suffix'] or ''}:{job.id[-8:]}"


def _lives(job: Thing) -> bool:
    """Whether the process of a job runs, and is the one that was started for it."""
    pid = job.content.get("pid")
    return pid is not None and born(pid) == job.content["born"] is not None
