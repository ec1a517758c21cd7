"""/v1/fine_tuning/jobs"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, JsonValue

from luthier.core.events import Event
from luthier.faces.server.answering import new_id
from luthier.faces.server.asking import check_settings
from luthier.faces.server.following import events_of, last_step, record_of, steps_of
from luthier.faces.server.orders import JobRequest, settings_of, source_of
from luthier.faces.server.pages import page_of
from luthier.faces.server.refusals import RESPONSES, Refusal
from luthier.faces.server.server import Server, TheKey, TheServer
from luthier.faces.server.store import Thing, Turned, mine, owns, refuse_elsewhere, store_of

routes = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], responses=RESPONSES)
Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused"]
OVER = ("succeeded", "failed", "cancelled")
Limit = Annotated[int, Query(ge=1, le=1000)]


class JobError(BaseModel):
    """Why a job failed: the run's own sentence."""

    code: str
    message: str
    param: str | None = None


class JobInfo(BaseModel):
    """A fine-tuning job. It is the run of the same name."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    model: str
    fine_tuned_model: str | None = None
    """The name under which the tuned model is served."""
    organization_id: str
    """The name of the key that made it."""
    status: Status
    """Files are checked when they are uploaded, so a job is queued at once."""
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = []
    trained_tokens: int | None = None
    error: JobError | None = None
    seed: int
    hyperparameters: dict[str, JsonValue]
    method: dict[str, JsonValue]
    metadata: dict[str, str] | None = None
    integrations: list[JsonValue] = []
    luthier: dict[str, JsonValue] | None = None


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobInfo]
    has_more: bool


class JobEvent(BaseModel):
    """Something that happened: a sentence, and numbers where something was measured."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue] = {}


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool


class Checkpoint(BaseModel):
    """Where a run can go on, or what it ended as."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str | None
    """The model that is served with these weights; None for those that only let the run go on."""
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


@routes.post("", response_model=JobInfo)
async def create_job(body: JobRequest, server: TheServer, key: TheKey) -> JobInfo:
    """Tune a model on an uploaded file. One job runs at a time, in order."""
    refuse_elsewhere(server)
    if body.integrations:
        kind = body.integrations[0].get("type", "?")
        raise Refusal(
            400, f"integrations: {kind!r} is not supported, this server reports to nobody; the job's events and its result "
            "file hold what was measured", param="integrations",
        )  # fmt: skip
    store = store_of(server)
    source = source_of(server, store, key, body.model)
    training = mine(store, key, "file", body.training_file, "training_file")
    validation = (
        None if body.validation_file is None else mine(store, key, "file", body.validation_file, "validation_file")
    )
    settings = settings_of(body, key, source, store, (training, validation))
    if body.luthier:
        await check_settings(settings)
    method = body.asked_method
    shown = {"type": method.type, method.type: {"hyperparameters": method.hyperparameters.model_dump()}}
    id = new_id("ftjob")
    made = store.put(
        "job", id, key.name,
        {
            "created_at": int(time.time()), "model": body.model, "training_file": body.training_file,
            "validation_file": body.validation_file, "suffix": body.suffix, "seed": body.seed, "method": shown,
            "metadata": body.metadata, "luthier": body.luthier, "settings": settings, "status": "queued",
            "result_files": [],
        },
    )  # fmt: skip
    store.say(id, f"Created fine-tuning job: {id}")
    _poke(server)
    return _info(made)


@routes.get("", response_model=JobList)
async def list_jobs(server: TheServer, key: TheKey, after: str | None = None, limit: Limit = 20) -> JobList:
    """Jobs, newest first."""
    found = [one for one in reversed(store_of(server).all("job")) if owns(key, one)]
    data, more = page_of(found, lambda one: one.id, after, limit)
    return JobList(data=[_info(one) for one in data], has_more=more)


@routes.get("/{id}", response_model=JobInfo)
async def read_job(id: str, server: TheServer, key: TheKey) -> JobInfo:
    """One of them."""
    return _info(mine(store_of(server), key, "job", id))


@routes.post("/{id}/cancel", response_model=JobInfo)
async def cancel_job(id: str, server: TheServer, key: TheKey) -> JobInfo:
    """End a job. Its run stays, with the newest checkpoint."""
    return _turn(server, mine(store_of(server), key, "job", id), ("queued", "running", "paused"), "cancelled")


@routes.post("/{id}/pause", response_model=JobInfo)
async def pause_job(id: str, server: TheServer, key: TheKey) -> JobInfo:
    """Let a job write a checkpoint and make room for others."""
    return _turn(server, mine(store_of(server), key, "job", id), ("queued", "running"), "paused")


@routes.post("/{id}/resume", response_model=JobInfo)
async def resume_job(id: str, server: TheServer, key: TheKey) -> JobInfo:
    """Let a paused job go on when its turn comes."""
    return _turn(server, mine(store_of(server), key, "job", id), ("paused",), "queued")


@routes.get("/{id}/events", response_model=EventList)
async def list_events(
    id: str, server: TheServer, key: TheKey, after: str | None = None, limit: Limit = 20
) -> EventList:
    """What happened, newest first."""
    store = store_of(server)
    mine(store, key, "job", id)
    said = [
        (one.time, JobEvent(id=f"ftevent-s{one.number}", created_at=int(one.time), level=one.level, message=one.message,
                            type="message"))
        for one in store.said(id)
    ]  # fmt: skip
    happened = await asyncio.to_thread(_happened, id)
    found = [event for _, event in sorted([*said, *happened], key=lambda one: one[0])]
    data, more = page_of(found[::-1], lambda one: one.id, after, limit)
    return EventList(data=data, has_more=more)


@routes.get("/{id}/checkpoints", response_model=CheckpointList)
async def list_checkpoints(
    id: str, server: TheServer, key: TheKey, after: str | None = None, limit: Limit = 10
) -> CheckpointList:
    """Where the run wrote its weights, newest first; the last one is the model that is served, once the job has succeeded."""
    job = mine(store_of(server), key, "job", id)
    found = await asyncio.to_thread(_checkpoints, job)
    data, more = page_of(found[::-1], lambda one: one.id, after, limit)
    return CheckpointList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


def _turn(server: Server, job: Thing, possible: tuple[str, ...], status: Status) -> JobInfo:
    over = {"finished_at": int(time.time())} if status in OVER else {}
    store = store_of(server)
    try:
        changed = store.change("job", job.id, was=possible, status=status, **over)
    except Turned as err:
        now = err.thing.content["status"]
        raise Refusal(
            400, f"{job.id}: the job is {now}, and one that is {' or '.join(possible)} can be {status}"
        ) from None
    store.say(job.id, f"The job is {status}")
    _poke(server)
    return _info(changed)


def _poke(server: Server) -> None:
    if "tuning" in server.parts:
        server.parts["tuning"].poke()


def _info(job: Thing) -> JobInfo:
    content = {name: value for name, value in job.content.items() if name in JobInfo.model_fields}
    step = last_step(job.id) if content["status"] == "running" else None
    method = content["method"]
    return JobInfo(
        id=job.id,
        organization_id=job.owner,
        hyperparameters=method[method["type"]]["hyperparameters"],
        estimated_finish=None if step is None else int(step["time"] + step["seconds_left"]),
        **content,
    )


def _happened(id: str) -> list[tuple[float, JobEvent]]:
    """The run's own events, with their times."""
    found = []
    for number, event in enumerate(events_of(id)):
        told = _tell(event)
        if told is not None:
            level, message, data = told
            kind: Any = "metrics" if data else "message"
            made = JobEvent(
                id=f"ftevent-r{number}",
                created_at=int(event["time"]),
                level=level,
                message=message,
                type=kind,
                data=data,
            )
            found.append((event["time"], made))
    return found


def _tell(event: Event) -> tuple[Any, str, dict[str, Any]] | None:
    """(level, sentence, numbers) of an event of a run."""
    kind = event["event"]
    if kind == "step":
        data = {"step": event["step"], "total_steps": event["steps"], "train_loss": event["loss"]}
        data |= {name: event[name] for name in ("epoch", "learning_rate", "grad_norm", "tokens_per_second")}
        return "info", f"Step {event['step']}/{event['steps']}: training loss={event['loss']:.4f}", data
    if kind == "validate":
        (data,) = steps_of([event]).values()
        return "info", f"Step {event['step']}: validation loss={event['loss']:.4f}", {"step": event["step"], **data}
    if kind == "warning":
        return "warn", str(event["message"]), {}
    if kind == "choice":
        return "info", f"{event['name']}: {event['value']} ({event['why']})", {}
    if kind == "stage":
        return "info", str(event["name"]), {}
    if kind == "checkpoint":
        return "info", f"Checkpoint written at step {event['step']}", {}
    return None


def _checkpoints(job: Thing) -> list[Checkpoint]:
    events = events_of(job.id)
    steps = steps_of(events)
    times = {event["step"]: event["time"] for event in events if event["event"] == "checkpoint"}
    best, name = None, job.content.get("fine_tuned_model")
    record = record_of(job.id)
    if name is not None and record is not None:
        best = record.numbers.get("best_step")
        times.setdefault(best, job.content["finished_at"])
    return [
        Checkpoint(
            id=f"ftckpt-{job.id[-8:]}-{step}",
            created_at=int(times[step]),
            fine_tuned_model_checkpoint=name if step == best else None,
            fine_tuning_job_id=job.id,
            step_number=step,
            metrics={"step": step, **steps.get(step, {})},
        )
        for step in sorted(times)
    ]
