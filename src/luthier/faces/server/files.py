"""/v1/files"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel

from luthier.faces.server.answering import new_id
from luthier.faces.server.pages import page_of
from luthier.faces.server.refusals import RESPONSES, Refusal
from luthier.faces.server.rows import check_rows
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.store import Store, Thing, mine, owns, store_of
from luthier.faces.server.uploads import read_form

routes = APIRouter(tags=["files"], responses=RESPONSES)
PURPOSES = ("fine-tune", "batch")
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "Rows of JSON, one a line."},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


class FileInfo(BaseModel):
    """A file that is kept."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    """As it was called where it came from."""
    purpose: str
    status: Literal["processed"] = "processed"
    rows: int | None = None
    """Lines that hold something."""


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


@routes.post("/v1/files", response_model=FileInfo, openapi_extra=FORM, responses={507: RESPONSES[503]})
async def upload_file(request: Request, server: TheServer, key: TheKey) -> FileInfo:
    """Keep a file: its rows are read first, and the answer says with their lines what is wrong with them."""
    store = store_of(server)
    id = new_id("file")
    side = store.folder / "files" / f".{id}.part"
    try:
        form = await read_form(request, side)
        strange = sorted(form.fields.keys() - {"purpose", "file"})
        if strange:
            raise Refusal(400, f"{strange[0]}: this server does not support this field; leave it out", param=strange[0])
        purpose = form.fields.get("purpose")
        if purpose not in PURPOSES:
            raise Refusal(400, f"purpose: is {purpose!r}, expected one of {', '.join(PURPOSES)}", param="purpose")
        if form.filename is None:
            why = "has no filename, so it is no file" if "file" in form.fields else "is required"
            raise Refusal(400, f"file: {why}", param="file")
        checked = await asyncio.to_thread(check_rows, side, purpose)
        content = {"filename": form.filename, "purpose": purpose, "rows": checked.rows, "shape": checked.shape}
        return _info(keep_file(store, id, key.name, side, ".jsonl", content))
    finally:
        side.unlink(missing_ok=True)


def keep_file(store: Store, id: str, owner: str, side: Any, suffix: str, content: dict[str, Any]) -> Thing:
    """Put the file at `side` among those that are kept, under a name made from its id."""
    stored = f"{id}{suffix}"
    content = {**content, "stored": stored, "bytes": side.stat().st_size, "created_at": int(time.time())}
    os.replace(side, store.path_of(stored))
    try:
        return store.put("file", id, owner, content)
    except Refusal:
        store.path_of(stored).unlink(missing_ok=True)
        raise


@routes.get("/v1/files", response_model=FileList)
async def list_files(
    server: TheServer,
    key: TheKey,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """Files, newest first."""
    found = [one for one in store_of(server).all("file") if owns(key, one)]
    found = [one for one in found if purpose is None or one.content["purpose"] == purpose]
    data, more = page_of(found if order == "asc" else found[::-1], lambda one: one.id, after, limit)
    return FileList(
        data=[_info(one) for one in data],
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=more,
    )


@routes.get("/v1/files/{id}", response_model=FileInfo)
async def read_file(id: str, server: TheServer, key: TheKey) -> FileInfo:
    """One of them."""
    return _info(mine(store_of(server), key, "file", id))


@routes.get("/v1/files/{id}/content", response_class=FileResponse)
async def read_content(id: str, server: TheServer, key: TheKey) -> FileResponse:
    """What a file holds."""
    store = store_of(server)
    path = store.path_of(mine(store, key, "file", id).content["stored"])
    if not path.is_file():
        raise Refusal(404, f"the content of {id} is not there any more")
    return FileResponse(path, media_type="application/octet-stream")


@routes.delete("/v1/files/{id}", response_model=DeletedFile, responses={409: RESPONSES[400]})
async def delete_file(id: str, server: TheServer, key: TheKey) -> DeletedFile:
    """Keep a file no longer. One that an unfinished job or batch reads stays."""
    store = store_of(server)
    found = mine(store, key, "file", id)
    user = _reader(store, id)
    if user is not None:
        raise Refusal(409, f"{id}: {user} reads this file and is not over; cancel it first", code="in_use")
    # On a disk that is full nothing can be noted until there is room.
    store.path_of(found.content["stored"]).unlink(missing_ok=True)
    store.drop("file", id)
    return DeletedFile(id=id)


def _reader(store: Store, id: str) -> str | None:
    jobs = [
        one.id
        for one in store.all("job")
        if one.content["status"] in ("queued", "running", "paused")
        and id in (one.content["training_file"], one.content["validation_file"])
    ]
    batches = [
        one.id
        for one in store.all("batch")
        if one.content["status"] in ("validating", "in_progress") and one.content["input_file_id"] == id
    ]
    return next(iter([*jobs, *batches]), None)


def _info(one: Thing) -> FileInfo:
    return FileInfo(
        id=one.id, **{name: one.content.get(name) for name in ("bytes", "created_at", "filename", "purpose", "rows")}
    )
