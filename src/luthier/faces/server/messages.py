"""/v1/messages and /v1/messages/count_tokens, as Anthropic's API has them"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, JsonValue

from luthier.faces.server.answered import check_blocks
from luthier.faces.server.answering import TextEvents, event, new_id, stream_events, while_here
from luthier.faces.server.blocks import CountRequest, MessagesRequest, question_of
from luthier.faces.server.chat import form_of
from luthier.faces.server.direct import writer_of
from luthier.faces.server.refusals import MESSAGES_RESPONSES, STREAMED
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.shelf import Served
from luthier.faces.server.writing import write, write_pieces
from luthier.text.called import CallReader, Part, read_calls
from luthier.text.calls import CallForm

routes = APIRouter(tags=["messages"], responses=MESSAGES_RESPONSES)


class SaidText(BaseModel):
    type: Literal["text"] = "text"
    text: str
    citations: None = None


class MadeCall(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, JsonValue]


class MessageUsage(BaseModel):
    """Tokens: `input_tokens` are those of the prompt that had to be read."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MessageBody(BaseModel):
    """What /v1/messages answers."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Annotated[SaidText | MadeCall, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class Count(BaseModel):
    input_tokens: int


@routes.post("/v1/messages", response_model=MessageBody, responses=STREAMED)
async def answer_messages(
    body: MessagesRequest, request: Request, server: TheServer, key: TheKey
) -> Response | MessageBody:
    """Answer a conversation; with `stream`, as server-sent events."""
    served = server.shelf.find(body.model)
    check_blocks(body.messages)
    user = body.metadata.user_id if body.metadata is not None else None
    asked = {
        **question_of(body), "sampling": body.sampling(), "stream": body.stream, "tenant": key.name,
        "salt": f"{key.name} {user or ''}",
    }  # fmt: skip
    form = form_of(served.process, bool(body.tools) and asked["choice"] != "none")
    if body.stream:
        return await stream_events(request, _events(request, served, asked, form), server.settings.timeout)
    found = await while_here(request, write(request, served, asked), server.settings.timeout)
    (answer,) = found["answers"]
    text, calls = read_calls(form, answer["text"], asked.get("tools", ()))
    content: list[SaidText | MadeCall] = [SaidText(text=text)] if text else []
    for at, call in enumerate(calls):
        # The last one may be cut where the tokens were at their end.
        if at < len(calls) - 1 or answer["finish"] == "stop":
            content.append(MadeCall(id=new_id("toolu"), name=call["name"], input=json.loads(call["arguments"])))
    return MessageBody(
        id=new_id("msg"), model=served.name, content=content, usage=_usage(found["usage"]), **_stop(answer, bool(calls))
    )


@routes.post("/v1/messages/count_tokens", response_model=Count)
async def count_tokens(body: CountRequest, server: TheServer) -> Count:
    """How many tokens the model would read of this, and nothing is written."""
    check_blocks(body.messages)
    asked = question_of(body)
    wanted = {name: asked[name] for name in ("messages", "tools") if name in asked}
    found = await server.shelf.find(body.model).ask("tokenize", **wanted)
    return Count(input_tokens=len(found["ids"]))


def _stop(part: dict[str, Any], called: bool) -> dict[str, Any]:
    """Why an answer ended."""
    stopped = part.get("stopped")
    if part["finish"] == "length":
        reason = "max_tokens"
    elif stopped is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": stopped}


def _usage(usage: dict[str, int]) -> MessageUsage:
    return MessageUsage(
        input_tokens=usage["prompt"] - usage["reused"], cache_read_input_tokens=usage["reused"],
        output_tokens=usage["written"],
    )  # fmt: skip


async def _events(
    request: Request, served: Served, asked: dict[str, Any], form: CallForm | None
) -> AsyncIterator[bytes]:
    """Server-sent events of an answer."""
    reader, blocks = CallReader(form, asked.get("tools", ())) if form is not None else None, _Blocks()
    begun, stop = False, dict[str, Any]()
    write = writer_of(request)

    def pass_on(_: int, text: str) -> bool:
        return write is not None and bool(text) and blocks.speaks and write(PLAIN.tell(text))

    async for kind, part in write_pieces(request, served, asked, pass_on if reader is None else None):
        if kind == "end":
            for one in blocks.end():
                yield _tell(one)
            yield _tell({"type": "message_delta", "delta": stop, "usage": _usage(part["usage"]).model_dump()})
            yield _tell({"type": "message_stop"})
            return
        if not begun:
            begun = True
            empty = MessageBody(
                id=new_id("msg"), model=served.name, content=[], stop_reason=None, stop_sequence=None,
                usage=_usage(part["usage"]),
            )  # fmt: skip
            yield _tell({"type": "message_start", "message": empty.model_dump()})
        last = "finish" in part
        if reader is None:
            parts = [Part("text", part["text"])] if part["text"] else []
        else:
            parts = reader.feed(part["text"]) + (reader.end() if last else [])
        for one in (told for said in parts for told in blocks.take(said)):
            yield _tell(one)
        if last:
            stop = _stop(part, reader is not None and reader.calls > 0)


class _Blocks:
    """The blocks of an answer as it comes, and the events that tell of them."""

    def __init__(self) -> None:
        self._count, self._open = 0, ""

    @property
    def speaks(self) -> bool:
        """Whether a block of text is open."""
        return self._open == "text"

    def take(self, part: Part) -> list[dict[str, Any]]:
        """What a part comes to."""
        if part.kind == "name":
            call = {"type": "tool_use", "id": new_id("toolu"), "name": part.text, "input": {}}
            return [*self.end(), self._begin("call", call)]
        if part.kind == "arguments":
            return [self._more({"type": "input_json_delta", "partial_json": part.text})]
        begun = [] if self.speaks else [*self.end(), self._begin("text", {"type": "text", "text": ""})]
        return [*begun, self._more(_said(part.text))]

    def end(self) -> list[dict[str, Any]]:
        """The block that is open ends."""
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._count - 1}]

    def _begin(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._open, self._count = kind, self._count + 1
        return {"type": "content_block_start", "index": self._count - 1, "content_block": block}

    def _more(self, delta: dict[str, Any]) -> dict[str, Any]:
        return _delta(self._count - 1, delta)


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _said(text: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": text}


def _tell(content: dict[str, Any]) -> bytes:
    return event(content, content["type"])


# Where no call may come, all is one block of text.
PLAIN = TextEvents(_delta(0, _said(TextEvents.HERE)), "content_block_delta")
