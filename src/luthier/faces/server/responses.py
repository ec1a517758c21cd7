"""/v1/responses"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, JsonValue, model_validator

from luthier.core.errors import LuthierError
from luthier.faces.server.answering import event, new_id, stream_events, while_here
from luthier.faces.server.chat import form_of
from luthier.faces.server.drawing import Body
from luthier.faces.server.refusals import RESPONSES, STREAMED, Refusal, body_of, refusal_of
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.shelf import Served
from luthier.faces.server.writing import write, write_pieces
from luthier.text.calls import CallForm, CallReader, Part, read_calls

routes = APIRouter(tags=["responses"], responses=RESPONSES)


class InputText(Body):
    """A part of a turn."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    logprobs: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class InputMessage(Body):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: None = None


class InputCall(Body):
    """A call that was made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Body):
    """What a function that was called gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    """What /v1/responses takes. Nothing is kept here: send the whole conversation each time."""

    model: str
    input: str | Annotated[list[InputMessage | InputCall | InputCallOutput], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool = True
    stream: bool = False
    user: str | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # What other servers may do more: taken where it asks for nothing.
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonValue] = []
    logprobs: list[JsonValue] = []


class OutputMessage(BaseModel):
    """What the assistant says."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call that it makes."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(BaseModel):
    code: str
    message: str


class ResponseBody(BaseModel):
    """What /v1/responses answers."""

    id: str
    object: Literal["response"] = "response"
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    top_p: float
    text: dict[str, JsonValue] = {}
    tool_choice: JsonValue = "auto"
    tools: list[JsonValue] = []
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str] = {}


@routes.post("/v1/responses", response_model=ResponseBody, responses=STREAMED)
async def respond(body: ResponsesRequest, request: Request, server: TheServer, key: TheKey) -> Response | ResponseBody:
    """Answer a conversation of items; with `stream`, as server-sent events."""
    served = server.shelf.find(body.model)
    asked = _question(body, key.name)
    form = form_of(served.process, bool(body.tools) and body.tool_choice != "none")
    empty = _empty(body, served.name)
    seconds = server.settings.timeout
    if body.stream:
        return await stream_events(request, _events(request, served, asked, form, empty), seconds)
    found = await while_here(request, write(request, served, asked), seconds)
    answer = found["answers"][0]
    text, calls = read_calls(form, answer["text"])
    status = _status(answer["finish"])
    output: list[OutputMessage | OutputCall] = []
    if text or not calls:
        output.append(OutputMessage(id=new_id("msg"), status=status, content=[OutputText(text=text)]))
    output += [OutputCall(id=new_id("fc"), call_id=new_id("call"), status=status, **call) for call in calls]
    return _whole(empty, output, answer["finish"], found["usage"])


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
        "messages": _turns(body), "sampling": sampling, "stream": body.stream, "tenant": tenant,
        "salt": f"{tenant} {body.user or ''}",
    }  # fmt: skip
    if body.tools:
        choice = body.tool_choice
        asked["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type", "strict"})}
            for tool in body.tools
        ]
        asked["choice"] = choice.name if isinstance(choice, NamedFunction) else choice or "auto"
        asked["parallel"] = body.parallel_tool_calls
    return asked


def _turns(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The items as turns of a chat: calls belong to the turn of the assistant before them."""
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, InputMessage):
            content = item.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            turns.append({"role": item.role, "content": text})
        elif isinstance(item, InputCallOutput):
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        else:
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            turns[-1].setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
    return turns


def _empty(body: ResponsesRequest, name: str) -> ResponseBody:
    choice = body.tool_choice
    return ResponseBody(
        id=new_id("resp"), created_at=int(time.time()), status="in_progress", instructions=body.instructions,
        max_output_tokens=body.max_output_tokens, model=name, output=[], parallel_tool_calls=body.parallel_tool_calls,
        temperature=body.temperature, top_p=1.0 if body.top_p is None else body.top_p,
        text={"format": {"type": "text"}} if body.text is None else body.text.model_dump(exclude_none=True, by_alias=True),
        tool_choice=choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        tools=[tool.model_dump() for tool in body.tools or ()],
    )  # fmt: skip


def _whole(
    empty: ResponseBody, output: list[OutputMessage | OutputCall], finish: str, usage: dict[str, int]
) -> ResponseBody:
    counted = ResponseUsage(
        input_tokens=usage["prompt"],
        input_tokens_details=InputDetails(cached_tokens=usage["reused"]),
        output_tokens=usage["written"],
        total_tokens=usage["prompt"] + usage["written"],
    )
    cut = Incomplete() if finish == "length" else None
    return empty.model_copy(
        update={"status": _status(finish), "output": output, "usage": counted, "incomplete_details": cut}
    )


def _status(finish: str) -> Literal["completed", "incomplete"]:
    return "incomplete" if finish == "length" else "completed"


class _Items:
    """The items of an answer as they come, and the events that tell of them."""

    def __init__(self) -> None:
        self.output: list[OutputMessage | OutputCall] = []

    def take(self, part: Part) -> list[dict[str, Any]]:
        """Events of a part of the answer."""
        last = self.output[-1] if self.output else None
        if part.kind == "text":
            found = [] if isinstance(last, OutputMessage) else self._open_text()
            last = self.output[-1]
            assert isinstance(last, OutputMessage)
            last.content[0].text += part.text
            return [*found, self._event("response.output_text.delta", content_index=0, delta=part.text, logprobs=[])]
        if part.kind == "name":
            found = self.close("completed")
            made = OutputCall(
                id=new_id("fc"), call_id=new_id("call"), name=part.text, arguments="", status="in_progress"
            )
            self.output.append(made)
            return [*found, self._item("response.output_item.added")]
        assert isinstance(last, OutputCall)
        last.arguments += part.text
        return [self._event("response.function_call_arguments.delta", delta=part.text)]

    def close(self, status: Literal["completed", "incomplete"]) -> list[dict[str, Any]]:
        """Events of the end of the last item."""
        if not self.output:
            return []
        last = self.output[-1]
        if last.status != "in_progress":
            return []
        last.status = status
        if isinstance(last, OutputCall):
            done = self._event("response.function_call_arguments.done", name=last.name, arguments=last.arguments)
            return [done, self._item("response.output_item.done")]
        part = last.content[0]
        return [
            self._event("response.output_text.done", content_index=0, text=part.text, logprobs=[]),
            self._event("response.content_part.done", content_index=0, part=part.model_dump()),
            self._item("response.output_item.done"),
        ]

    def _open_text(self) -> list[dict[str, Any]]:
        found = self.close("completed")
        made = OutputMessage(id=new_id("msg"), status="in_progress", content=[])
        self.output.append(made)
        added = self._item("response.output_item.added")
        made.content.append(OutputText(text=""))
        part = self._event("response.content_part.added", content_index=0, part=made.content[0].model_dump())
        return [*found, added, part]

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.output[-1].id, "output_index": len(self.output) - 1, **fields}

    def _item(self, name: str) -> dict[str, Any]:
        return {"type": name, "output_index": len(self.output) - 1, "item": self.output[-1].model_dump()}


async def _events(
    request: Request, served: Served, asked: dict[str, Any], form: CallForm | None, empty: ResponseBody
) -> AsyncIterator[bytes]:
    reader = CallReader(form) if form is not None else None
    items, number = _Items(), 0

    def tell(content: dict[str, Any]) -> bytes:
        nonlocal number
        number += 1
        return event({**content, "sequence_number": number - 1}, content["type"])

    finish = "stop"
    try:
        async for kind, part in write_pieces(request, served, asked):
            if number == 0:
                yield tell({"type": "response.created", "response": empty.model_dump()})
                yield tell({"type": "response.in_progress", "response": empty.model_dump()})
            if kind == "end":
                opened = [] if items.output else items.take(Part("text", ""))
                for one in [*opened, *items.close(_status(finish))]:
                    yield tell(one)
                whole = _whole(empty, items.output, finish, part["usage"])
                yield tell({"type": f"response.{whole.status}", "response": whole.model_dump()})
                return
            finish = part.get("finish") or finish
            text = part["text"]
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
