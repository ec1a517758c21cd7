"""/v1/vector_stores: the indexes that are served, in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from luthier.faces.server.answering import while_here
from luthier.faces.server.citing import attributes_of
from luthier.faces.server.drawing import Body
from luthier.faces.server.indexes import Found
from luthier.faces.server.refusals import RESPONSES
from luthier.faces.server.server import TheServer

routes = APIRouter(tags=["indexes"], responses=RESPONSES)
Query = Annotated[str, Field(min_length=1)]


class FileCounts(BaseModel):
    cancelled: int = 0
    completed: int
    failed: int = 0
    in_progress: int = 0
    total: int


class Store(BaseModel):
    """An index that is served."""

    id: str
    object: Literal["vector_store"] = "vector_store"
    name: str
    created_at: int
    """When it was made or last brought up to date."""
    status: Literal["completed", "expired"] = "completed"
    """`expired`: it is not there any more."""
    file_counts: FileCounts
    usage_bytes: int
    metadata: dict[str, str] = {}
    passages: int
    encoder: str | None
    """What compares by meaning; null: words alone are compared."""
    trouble: str | None = None
    """Why it is not there any more."""


class StoreList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Store]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False
    """All are listed at once."""


class SearchRequest(Body):
    """What is looked for in an index."""

    query: Query | Annotated[list[Query], Field(min_length=1, max_length=16)]
    """A question, or several in place of one."""
    max_num_results: Annotated[int, Field(ge=1, le=50)] = 10


class Content(BaseModel):
    type: Literal["text"] = "text"
    text: str


class StoreHit(BaseModel):
    """A passage that was found."""

    file_id: str
    filename: str
    score: float
    """How it ranks, from 0 to 1: 1 is the first by words and, where an encoder compares it, by meaning."""
    attributes: dict[str, str | float]
    """Where it stands, and its scores by words (bm25) and by meaning (cosine)."""
    content: list[Content]


class SearchPage(BaseModel):
    """What was found, the best first."""

    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[StoreHit]
    has_more: Literal[False] = False
    next_page: None = None
    known: bool
    """Whether it is enough to answer from; below that an answer would be that it is not known."""


@routes.get("/v1/vector_stores", response_model=StoreList)
async def list_stores(server: TheServer) -> StoreList:
    """Every index that is served."""
    found = [_store(name, facts) for name, facts in (await server.indexes.describe()).items()]
    ids = [one.id for one in found]
    return StoreList(data=found, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


@routes.get("/v1/vector_stores/{name}", response_model=Store)
async def read_store(name: str, server: TheServer) -> Store:
    """One of them."""
    server.indexes.check_names([name], "vector_store_id")
    return _store(name, (await server.indexes.describe())[name])


@routes.post("/v1/vector_stores/{name}/search", response_model=SearchPage)
async def search_store(name: str, body: SearchRequest, request: Request, server: TheServer) -> SearchPage:
    """The passages that fit a question best."""
    server.indexes.check_names([name], "vector_store_id")
    queries = [body.query] if isinstance(body.query, str) else body.query
    work = server.indexes.search([name], queries, body.max_num_results)
    found, known = await while_here(request, work, server.settings.timeout)
    return SearchPage(search_query=queries, data=[_hit(one) for one in found], known=known)


def _store(name: str, facts: dict[str, Any]) -> Store:
    if "trouble" in facts:
        counts = FileCounts(completed=0, total=0)
        return Store(
            id=name, name=name, created_at=0, status="expired", file_counts=counts, usage_bytes=0, passages=0, encoder=None,
            trouble=facts["trouble"],
        )  # fmt: skip
    counts = FileCounts(completed=facts["files"], total=facts["files"])
    return Store(
        id=name, name=name, created_at=facts["made"], file_counts=counts, usage_bytes=facts["bytes"],
        passages=facts["passages"], encoder=facts["encoder"],
    )  # fmt: skip


def _hit(one: Found) -> StoreHit:
    passage = one.hit.passage
    return StoreHit(
        file_id=passage.file, filename=passage.file, score=one.hit.score, attributes=attributes_of(one),
        content=[Content(text=passage.shown)],
    )  # fmt: skip
