"""/v1/models, and /admin/models: which are served, and serving others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from luthier.faces.server.drawing import Body
from luthier.faces.server.refusals import RESPONSES, FaultBody, Refusal
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.shelf import Served
from luthier.faces.server.store import owns, store_of

routes = APIRouter(tags=["models"], responses=RESPONSES)


TAKEN: dict[int | str, dict[str, Any]] = {
    409: {"model": FaultBody, "description": "A model is served under this name, or beside it."}
}


class ModelInfo(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "luthier"
    root: str
    """What it was loaded from."""
    parent: str | None = None
    """The model beside which it is an adapter."""
    state: str
    """loading, ready, broken (and started again), or asleep: tuned, and loaded when it is asked."""
    max_model_len: int | None = None
    """Most tokens of a prompt and its answer."""
    task: str | None = None
    """What it does: causal, classify ..."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Deleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class LoadRequest(Body):
    """A model to serve from now on."""

    source: Annotated[str, Field(min_length=1)]
    """A shipped name, run:<id>, a directory or a hub id."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """The name under which it is asked for; by default its source."""


def _info(served: Served) -> ModelInfo:
    facts: dict[str, Any] = served.process.facts
    return ModelInfo(
        id=served.name,
        created=served.created,
        root=served.source,
        parent=served.parent,
        state=served.process.state,
        max_model_len=facts.get("context"),
        task=facts.get("task"),
    )


@routes.get("/v1/models", response_model=ModelList)
async def list_models(server: TheServer) -> ModelList:
    """Every model that is served."""
    return ModelList(data=[_info(one) for one in server.shelf.models.values()])


@routes.get("/v1/models/{name:path}", response_model=ModelInfo)
async def read_model(name: str, server: TheServer) -> ModelInfo:
    """One of them."""
    return _info(server.shelf.find(name))


@routes.delete("/v1/models/{name:path}", response_model=Deleted, responses=TAKEN)
async def delete_model(name: str, server: TheServer, key: TheKey) -> Deleted:
    """Serve a model that a fine-tuning job made no longer. Its run stays, with the weights."""
    store = store_of(server)
    kept = store.get("model", name)
    if kept is None or not owns(key, kept):
        raise Refusal(404, f"model: {name!r} is no model that a job of this key made", param="model")
    store.drop("model", name)
    server.parts.get("tuned", set()).discard(name)
    if name in server.shelf.models:
        await server.shelf.unload(name)
    return Deleted(id=name)


@routes.post("/admin/models", response_model=ModelInfo, status_code=201, tags=["admin"], responses=TAKEN)
async def load_model(body: LoadRequest, server: TheServer) -> ModelInfo:
    """Serve one more model; returns when it is loaded."""
    return _info(await server.shelf.load(body.source, body.name))


@routes.delete("/admin/models/{name:path}", response_model=Deleted, tags=["admin"], responses=TAKEN)
async def unload_model(name: str, server: TheServer) -> Deleted:
    """Serve a model no longer."""
    await server.shelf.unload(name)
    return Deleted(id=name)
