"""/v1/batches"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from luthier.faces.server.answering import new_id
from luthier.faces.server.drawing import Body
from luthier.faces.server.orders import Metadata
from luthier.faces.server.pages import page_of
from luthier.faces.server.refusals import RESPONSES, Refusal
from luthier.faces.server.server import Server, TheKey, TheServer
from luthier.faces.server.store import Thing, Turned, mine, owns, refuse_elsewhere, store_of

routes = APIRouter(prefix="/v1/batches", tags=["batches"], responses=RESPONSES)
WINDOW = 24 * 3600


class BatchRequest(Body):
    """What POST /v1/batches takes."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchFault(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchFaults(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchFault]


class BatchInfo(BaseModel):
    """A batch of requests."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchFaults | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool


@routes.post("", response_model=BatchInfo)
async def create_batch(body: BatchRequest, server: TheServer, key: TheKey) -> BatchInfo:
    """Answer the requests of an uploaded file, when nobody waits for other answers."""
    refuse_elsewhere(server)
    store = store_of(server)
    file = mine(store, key, "file", body.input_file_id, "input_file_id")
    if file.content["purpose"] != "batch":
        raise Refusal(
            400,
            f"input_file_id: {file.id} was uploaded for {file.content['purpose']!r}, not 'batch'",
            param="input_file_id",
        )
    if file.content["shape"] != body.endpoint:
        raise Refusal(
            400, f"endpoint: the requests of {file.id} are for {file.content['shape']!r}, not {body.endpoint!r}",
            param="endpoint",
        )  # fmt: skip
    now = int(time.time())
    made = store.put(
        "batch", new_id("batch"), key.name,
        {
            "created_at": now, "expires_at": now + WINDOW, "endpoint": body.endpoint, "input_file_id": file.id,
            "metadata": body.metadata, "status": "validating", "total": file.content["rows"],
        },
    )  # fmt: skip
    _poke(server)
    return _info(server, made)


@routes.get("", response_model=BatchList)
async def list_batches(
    server: TheServer, key: TheKey, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> BatchList:
    """Batches, newest first."""
    found = [one for one in reversed(store_of(server).all("batch")) if owns(key, one)]
    data, more = page_of(found, lambda one: one.id, after, limit)
    return BatchList(
        data=[_info(server, one) for one in data],
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=more,
    )


@routes.get("/{id}", response_model=BatchInfo)
async def read_batch(id: str, server: TheServer, key: TheKey) -> BatchInfo:
    """One of them."""
    return _info(server, mine(store_of(server), key, "batch", id))


@routes.post("/{id}/cancel", response_model=BatchInfo)
async def cancel_batch(id: str, server: TheServer, key: TheKey) -> BatchInfo:
    """End a batch. What is answered by then is in its file."""
    store = store_of(server)
    mine(store, key, "batch", id)
    try:
        changed = store.change(
            "batch", id, was=("validating", "in_progress"), status="cancelling", cancelling_at=int(time.time())
        )
    except Turned as err:
        now = err.thing.content["status"]
        raise Refusal(
            400, f"{id}: the batch is {now}, and one that is validating or in_progress can be cancelled"
        ) from None
    _poke(server)
    return _info(server, changed)


def _poke(server: Server) -> None:
    if "batching" in server.parts:
        server.parts["batching"].poke()


def _info(server: Server, batch: Thing) -> BatchInfo:
    content = {name: value for name, value in batch.content.items() if name in BatchInfo.model_fields}
    batching, counts = server.parts.get("batching"), None
    if batching is not None:
        counts = batching.counts.get(batch.id)
    completed = batch.content.get("completed", 0) if counts is None else counts.completed
    failed = batch.content.get("failed", 0) if counts is None else counts.failed
    trouble = batch.content.get("trouble")
    return BatchInfo(
        id=batch.id,
        request_counts=RequestCounts(total=batch.content["total"], completed=completed, failed=failed),
        errors=None if trouble is None else BatchFaults(data=[BatchFault(code="failed", message=trouble)]),
        **content,
    )
