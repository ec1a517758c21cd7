"""Responses that are kept where that is asked for: GET and DELETE /v1/responses/ID, its input items, and going on from one."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, JsonValue, TypeAdapter

from luthier.faces.server.answering import new_id
from luthier.faces.server.inputs import InputCallOutput, InputItem, InputMessage, InputText, ResponsesRequest
from luthier.faces.server.keys import Key
from luthier.faces.server.pages import page_of
from luthier.faces.server.refusals import RESPONSES, Refusal
from luthier.faces.server.response import ResponseBody
from luthier.faces.server.server import Server, TheKey, TheServer
from luthier.faces.server.store import Store, Thing, store_of

routes = APIRouter(prefix="/v1/responses", tags=["responses"], responses=RESPONSES)
# Responses of one key; of more, the oldest go.
MOST = 10_000
DAY = 86_400
ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


class ItemList(BaseModel):
    """The items that a response answered, with those of the responses before it."""

    object: Literal["list"] = "list"
    data: list[dict[str, JsonValue]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


@routes.get("/{id}", response_model=ResponseBody)
async def read_response(id: str, server: TheServer, key: TheKey, stream: bool = False) -> Any:
    """A response that was kept."""
    if stream:
        raise Refusal(400, "stream: what was kept is not streamed again; ask without stream", param="stream")
    return find_kept(server, key, id).content["response"]


@routes.delete("/{id}", response_model=DeletedResponse)
async def delete_response(id: str, server: TheServer, key: TheKey) -> DeletedResponse:
    """Keep a response no longer. Later ones of its conversation hold what they answered themselves."""
    store_of(server).drop("response", find_kept(server, key, id).id)
    return DeletedResponse(id=id)


@routes.get("/{id}/input_items", response_model=ItemList)
async def list_items(
    id: str,
    server: TheServer,
    key: TheKey,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> ItemList:
    """What a response answered, the last item first."""
    items: list[dict[str, JsonValue]] = find_kept(server, key, id).content["input"]
    data, more = page_of(items if order == "asc" else items[::-1], lambda one: str(one["id"]), after, limit)
    ends = (str(data[0]["id"]), str(data[-1]["id"])) if data else (None, None)
    return ItemList(data=data, first_id=ends[0], last_id=ends[1], has_more=more)


def find_kept(server: Server, key: Key, id: str, param: str | None = None) -> Thing:
    """A response of this very key. Raises Refusal, the same for one that is somebody else's, has run out, or never was."""
    store = store_of(server)
    _let_go(store)
    found = store.get("response", id)
    if found is None or found.owner != key.name or found.content["expires_at"] <= time.time():
        where = f"{param}: " if param else ""
        raise Refusal(
            404, f"{where}there is no response {id!r} here: only what is sent with store: true is kept, for "
            f"{server.settings.response_days:g} days, and for the key that asked; send the whole conversation",
            param=param, code="not_found",
        )  # fmt: skip
    return found


def keeps(server: Server, body: ResponsesRequest) -> bool:
    """Whether the response is to be kept. Raises Refusal where that is asked for, and nothing can be kept here."""
    if not (server.settings.keep_responses if body.store is None else body.store):
        return False
    store_of(server)
    return True


def continued(server: Server, key: Key, body: ResponsesRequest) -> ResponsesRequest:
    """The request with the whole conversation that it goes on with. A call that was cut off was none where nobody answers it."""
    if body.previous_response_id is None:
        return body
    kept = find_kept(server, key, body.previous_response_id, "previous_response_id").content
    answered = {one.call_id for one in items_of(body) if isinstance(one, InputCallOutput)}
    output = [_as_input(one) for one in kept["response"]["output"] if not _cut_off(one) or one["call_id"] in answered]
    return body.model_copy(update={"input": ITEMS.validate_python([*kept["input"], *output]) + items_of(body)})


def keep(server: Server, key: Key, body: ResponsesRequest, whole: ResponseBody) -> None:
    """Keep a response with all that it answered (`body` is `continued`), until its time has come."""
    store = store_of(server)
    content = {
        "response": whole.model_dump(mode="json"),
        "input": [_shown(one) for one in items_of(body)],
        "expires_at": time.time() + server.settings.response_days * DAY,
    }
    store.put("response", whole.id, key.name, content)
    _let_go(store)
    while store.count("response", key.name) > MOST:
        oldest = store.first("response", key.name)
        assert oldest is not None
        store.drop("response", oldest.id)


def _let_go(store: Store) -> None:
    """Drop what has run out, from the oldest on."""
    while (oldest := store.first("response")) is not None and oldest.content["expires_at"] <= time.time():
        store.drop("response", oldest.id)


def items_of(body: ResponsesRequest) -> list[InputItem]:
    """What is asked, as items."""
    if isinstance(body.input, str):
        return [InputMessage(role="user", content=body.input)]
    return list(body.input)


def _shown(item: InputItem) -> dict[str, Any]:
    """An item as it is told of: with an id, and parts in place of a bare text."""
    if isinstance(item, InputMessage) and isinstance(item.content, str):
        kind: Literal["input_text", "output_text"] = "output_text" if item.role == "assistant" else "input_text"
        item = item.model_copy(update={"content": [InputText(type=kind, text=item.content)]})
    found = item.model_dump(mode="json", exclude_none=True)
    return {**found, "id": item.id or new_id("item")}


def _cut_off(item: dict[str, Any]) -> bool:
    return bool(item["type"] == "function_call" and item["status"] == "incomplete")


def _as_input(item: dict[str, Any]) -> dict[str, Any]:
    """An item of an answer as it is sent back."""
    return {name: value for name, value in item.items() if value is not None}
