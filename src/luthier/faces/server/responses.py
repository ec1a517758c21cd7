"""/v1/responses"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from luthier.core.errors import LuthierError
from luthier.faces.server.answered import check_items
from luthier.faces.server.answering import TextEvents, event, new_id, stream_events, while_here
from luthier.faces.server.chat import call_id, form_of
from luthier.faces.server.citing import (
    Citing,
    Ground,
    attributes_of,
    find_ground,
    write_grounded,
    write_grounded_pieces,
)  # fmt: skip
from luthier.faces.server.direct import writer_of
from luthier.faces.server.drawing import Body
from luthier.faces.server.inputs import NamedFunction, ResponsesRequest, turns_of
from luthier.faces.server.items import (
    Items,
    Output,
    OutputCall,
    OutputMessage,
    OutputText,
    SearchCall,
    SearchHit,
    status_of,
)  # fmt: skip
from luthier.faces.server.kept import continued, items_of, keep, keeps
from luthier.faces.server.refusals import RESPONSES, STREAMED, Refusal, body_of, refusal_of
from luthier.faces.server.response import Incomplete, InputDetails, ResponseBody, ResponseError, ResponseUsage
from luthier.faces.server.server import TheKey, TheServer, key_of, server_of
from luthier.faces.server.shelf import Served
from luthier.text.called import CallReader, Part, read_calls
from luthier.text.calls import CallForm

routes = APIRouter(tags=["responses"], responses=RESPONSES)


@routes.post("/v1/responses", response_model=ResponseBody, responses=STREAMED)
async def respond(body: ResponsesRequest, request: Request, server: TheServer, key: TheKey) -> Response | ResponseBody:
    """Answer a conversation of items; with `stream`, as server-sent events."""
    served = server.shelf.find(body.model)
    sent = items_of(body)
    kept, body = keeps(server, body), continued(server, key, body)
    check_items(items_of(body), len(items_of(body)) - len(sent))
    asked = _question(body, key.name)
    form = form_of(served.process, bool(body.functions) and body.tool_choice != "none")
    empty = _empty(body, served.name, kept)
    seconds, ground = server.settings.timeout, None
    if body.search is not None:
        server.indexes.check_names(body.search.vector_store_ids, "tools.vector_store_ids")
        names = list(dict.fromkeys(body.search.vector_store_ids))
        looking = find_ground(request, served, asked, names, body.search.max_num_results)
        ground = await while_here(request, looking, seconds)
    if body.stream:
        return await stream_events(request, _events(request, served, asked, form, empty, body, ground), seconds)
    found = await while_here(request, write_grounded(request, served, asked, ground), seconds)
    answer = found["answers"][0]
    text, calls = read_calls(form, answer["text"], asked.get("tools", ()))
    status = status_of(answer["finish"])
    output: list[Output] = []
    said = OutputText(text=text)
    if ground is not None:
        output.append(_search_call(body, ground))
        citing = Citing(request, served, ground)
        said.text, cited = citing.feed(text, last=True)
        said.annotations, said.removed_citations = [one.annotation() for one in cited], citing.removed
    if text or not calls:
        output.append(OutputMessage(id=new_id("msg"), status=status, content=[said]))
    output += [OutputCall(id=new_id("fc"), call_id=call_id(form), status=status, **call) for call in calls]
    whole = _whole(empty, output, answer["finish"], found["usage"])
    if kept:
        keep(server, key, body, whole)
    return whole


def _question(body: ResponsesRequest, tenant: str) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": body.temperature}
    if body.temperature > 0:
        sampling |= {} if body.top_p in (None, 1) else {"top_p": body.top_p}
        sampling |= {} if body.seed is None else {"seed": body.seed}
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
    wanted = body.text.format if body.text is not None else None
    if wanted is not None and wanted.type != "text":
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise Refusal(400, "text.format.schema: is required", param="text.format.schema")
        sampling["structure"] = {"json_schema": wanted.schema_ or {"type": "object"}}
    asked: dict[str, Any] = {
        "messages": turns_of(body), "sampling": sampling, "stream": body.stream, "tenant": tenant,
        "salt": f"{tenant} {body.user or ''}",
    }  # fmt: skip
    if body.functions:
        choice = body.tool_choice
        asked["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type", "strict"})}
            for tool in body.functions
        ]
        asked["choice"] = choice.name if isinstance(choice, NamedFunction) else choice or "auto"
        asked["parallel"] = body.parallel_tool_calls
    return asked


def _empty(body: ResponsesRequest, name: str, kept: bool) -> ResponseBody:
    choice = body.tool_choice
    return ResponseBody(
        id=new_id("resp"), created_at=int(time.time()), status="in_progress", instructions=body.instructions,
        max_output_tokens=body.max_output_tokens, model=name, output=[], parallel_tool_calls=body.parallel_tool_calls,
        temperature=body.temperature, top_p=1.0 if body.top_p is None else body.top_p,
        text={"format": {"type": "text"}} if body.text is None else body.text.model_dump(exclude_none=True, by_alias=True),
        tool_choice=choice.model_dump() if isinstance(choice, Body) else choice or "auto",
        tools=[tool.model_dump() for tool in body.tools or ()], previous_response_id=body.previous_response_id, store=kept,
    )  # fmt: skip


def _whole(empty: ResponseBody, output: list[Output], finish: str, usage: dict[str, int]) -> ResponseBody:
    counted = ResponseUsage(
        input_tokens=usage["prompt"],
        input_tokens_details=InputDetails(cached_tokens=usage["reused"]),
        output_tokens=usage["written"],
        total_tokens=usage["prompt"] + usage["written"],
    )
    cut = Incomplete() if finish == "length" else None
    return empty.model_copy(
        update={"status": status_of(finish), "output": output, "usage": counted, "incomplete_details": cut}
    )


def _search_call(body: ResponsesRequest, ground: Ground) -> SearchCall:
    results = None
    if body.include:
        results = [
            SearchHit(
                file_id=one.hit.passage.file, filename=one.hit.passage.file, score=one.hit.score, text=one.hit.passage.shown,
                attributes=attributes_of(one),
            )
            for one in ground.found
        ]  # fmt: skip
    return SearchCall(id=new_id("fs"), queries=[ground.question], results=results, known=ground.known, read=ground.read)


async def _events(
    request: Request,
    served: Served,
    asked: dict[str, Any],
    form: CallForm | None,
    empty: ResponseBody,
    body: ResponsesRequest,
    ground: Ground | None,
) -> AsyncIterator[bytes]:
    reader = CallReader(form, asked.get("tools", ())) if form is not None else None
    citing = Citing(request, served, ground) if ground is not None else None
    items, number = Items(partial(call_id, form)), 0

    def tell(content: dict[str, Any]) -> bytes:
        nonlocal number
        number += 1
        return event({**content, "sequence_number": number - 1}, content["type"])

    write, plain = writer_of(request), None

    def pass_on(_: int, text: str) -> bool:
        nonlocal number, plain
        if write is None or not text or not items.speaks:
            return False
        if plain is None:
            content = items.text_delta(TextEvents.HERE)
            plain = TextEvents({**content, "sequence_number": TextEvents.NUMBER}, content["type"])
        if not write(plain.tell(text, number)):
            return False
        items.say(text)
        number += 1
        return True

    finish, tap = "stop", pass_on if reader is None and citing is None else None
    try:
        async for kind, part in write_grounded_pieces(request, served, asked, ground, tap):
            if number == 0:
                yield tell({"type": "response.created", "response": empty.model_dump()})
                yield tell({"type": "response.in_progress", "response": empty.model_dump()})
                for one in items.search(_search_call(body, ground)) if ground is not None else ():
                    yield tell(one)
            if kind == "end":
                opened = [] if items.said else items.take(Part("text", ""))
                if citing is not None:
                    items.cite((), citing.removed)
                for one in [*opened, *items.close(status_of(finish))]:
                    yield tell(one)
                whole = _whole(empty, items.output, finish, part["usage"])
                if empty.store:
                    keep(server_of(request), key_of(request), body, whole)
                yield tell({"type": f"response.{whole.status}", "response": whole.model_dump()})
                return
            finish = part.get("finish") or finish
            text = part["text"]
            if citing is not None:
                text, cited = citing.feed(text, "finish" in part)
                for one in items.take(Part("text", text)) if text else ():
                    yield tell(one)
                for one in items.cite(cited, citing.removed):
                    yield tell(one)
                continue
            if reader is None:
                parts = [Part("text", text)] if text else []
            else:
                parts = reader.feed(text) + (reader.end() if "finish" in part else [])
            for one in (told for piece in parts for told in items.take(piece)):
                yield tell(one)
    except LuthierError as err:
        if not number:
            raise
        fault = body_of(refusal_of(err))["error"]
        failed = ResponseError(code="server_error", message=fault["message"])
        broken = empty.model_copy(update={"status": "failed", "output": items.output, "error": failed})
        yield tell({"type": "response.failed", "response": broken.model_dump()})
