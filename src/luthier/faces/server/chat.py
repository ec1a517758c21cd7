"""/v1/chat/completions"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, JsonValue, model_validator

from luthier.faces.server.answered import check_turns
from luthier.faces.server.answering import DONE, TextEvents, event, new_id, stream_events, while_here
from luthier.faces.server.citing import (
    PASSAGES,
    Citation,
    Citing,
    Ground,
    Passages,
    find_ground,
    write_grounded,
    write_grounded_pieces,
)  # fmt: skip
from luthier.faces.server.direct import writer_of
from luthier.faces.server.drawing import Body, Drawing, ResponseFormat, StreamOptions, Usage, usage_of
from luthier.faces.server.engines import EngineProcess
from luthier.faces.server.logprobs import ChatLogs, chat_logs
from luthier.faces.server.refusals import RESPONSES, STREAMED
from luthier.faces.server.server import TheKey, TheServer, server_of
from luthier.faces.server.shelf import Served
from luthier.text.called import CallReader, Part, read_calls
from luthier.text.calls import CallForm

routes = APIRouter(tags=["chat"], responses=RESPONSES)
# What a turn of the assistant holds beside its text, as it was answered.
SENT_BACK = {"refusal", "annotations", "citations", "removed_citations", "known"}


class TextPart(Body):
    """A part of a turn."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class Called(Body):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Turn(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    """As an answer holds it that is sent back."""
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    citations: list[JsonValue] | None = None
    removed_citations: int | None = None
    known: bool | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check(self) -> Turn:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a turn needs a content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not the {self.role}'s; leave them out")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id goes with role tool, not with {self.role}; leave it out")
        return self


class Prediction(Body):
    """What the answer is expected to be: guessed from, so that what is the same takes less time; nothing else changes."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(one.text for one in self.content)


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None
    """Arguments satisfy the schema, whether this is set or not."""


class Tool(Body):
    """A function that may be called."""

    type: Literal["function"] = "function"
    function: Function


class Named(Body):
    name: str


class ToolChoice(Body):
    """The function that is called."""

    type: Literal["function"] = "function"
    function: Named


class ChatRequest(Drawing):
    """What /v1/chat/completions takes."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=50)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    prediction: Prediction | None = None
    index: str | None = None
    """The last turn is looked up in this index, and answered from what it holds."""
    passages: Passages | None = None
    """Most passages that the model is given of it; 5 by default."""
    # What other servers may do more: taken where it asks for nothing.
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens; set one of the two")
        if self.structure is not None and self.response_format is not None:
            raise ValueError("structure and response_format say the same; set one of the two")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.prediction is not None and self.use_beam_search:
            raise ValueError("a beam search guesses nothing; leave prediction or use_beam_search out")
        if self.index is None:
            if self.passages is not None:
                raise ValueError("passages goes with index; name the index to answer from")
            return self
        form = self.response_format.structure() if self.response_format is not None else self.structure
        for name, given in (("structure", form), ("tools", self.tools), ("logprobs", self.logprobs or None)):
            if given is not None:
                raise ValueError(f"answers from an index are text with citations; leave {name} or index out")
        return self


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = None
    citations: list[Citation] | None = None
    """The citations in an answer from an index."""
    removed_citations: int | None = None
    """Citations that named no passage and were taken out."""
    known: bool | None = None
    """Whether the index holds enough; otherwise the model was not asked."""


class Choice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """What /v1/chat/completions answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str | None = None


@routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def complete_chat(
    body: ChatRequest, request: Request, server: TheServer, key: TheKey
) -> Response | ChatCompletion:
    """Answer a conversation; with `stream`, as server-sent events."""
    served = server.shelf.find(body.model)
    asked = question_of(body, key.name)
    form = form_of(served.process, bool(body.tools) and body.tool_choice != "none")
    seconds = server.settings.timeout
    ground = None
    if body.index is not None:
        ground = await while_here(request, ground_of(body, request, served, asked), seconds)
    if body.stream:
        return await stream_events(request, _chunks(request, served, body, asked, form, ground), seconds)
    found = await while_here(request, write_grounded(request, served, asked, ground), seconds)
    tools = asked.get("tools", ())
    choices = [_choice(at, one, form, tools) for at, one in enumerate(found["answers"])]
    if ground is not None:
        for choice in choices:
            _cite(choice.message, Citing(request, served, ground), ground)
    return ChatCompletion(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=served.name,
        choices=choices,
        usage=usage_of(found["usage"]),
    )


def turns_of(messages: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as the engine takes them."""
    return [turn.model_dump(exclude_none=True, exclude=SENT_BACK) for turn in messages]


def question_of(body: ChatRequest, tenant: str) -> dict[str, Any]:
    """What is asked of the engine. Raises Refusal for calls and answers that do not belong together."""
    sampling = body.sampling(body.max_completion_tokens or body.max_tokens)
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    structure = body.response_format.structure() if body.response_format is not None else None
    if structure is not None:
        sampling["structure"] = structure
    turns = turns_of(body.messages)
    check_turns(turns)
    asked: dict[str, Any] = {
        "messages": turns,
        "sampling": sampling,
        "stream": body.stream,
        "tenant": tenant,
        "salt": f"{tenant} {body.user or ''}",
        "priority": body.priority,
    }
    if body.prediction is not None:
        asked["expected"] = body.prediction.text
    if body.tools:
        choice = body.tool_choice
        asked["tools"] = [one.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for one in body.tools]
        asked["choice"] = choice.function.name if isinstance(choice, ToolChoice) else choice or "auto"
        asked["parallel"] = body.parallel_tool_calls
    return asked


async def ground_of(body: ChatRequest, request: Request, served: Served, asked: dict[str, Any]) -> Ground | None:
    """What of an index the answer is written from, and put before the question; None where no index is named."""
    if body.index is None:
        return None
    server_of(request).indexes.check_names([body.index], "index")
    return await find_ground(request, served, asked, [body.index], body.passages or PASSAGES)


def form_of(process: EngineProcess, callable: bool) -> CallForm | None:
    """How calls stand in an answer; None where nothing is `callable`."""
    calls = process.facts.get("calls") if callable else None
    return None if calls is None else CallForm(**calls)


def call_id(form: CallForm | None) -> str:
    """A name for a call; where the template writes them, one that it takes."""
    return secrets.token_hex(5)[:9] if form is not None and form.numbered else new_id("call")


def _choice(at: int, one: dict[str, Any], form: CallForm | None, tools: Sequence[dict[str, Any]]) -> Choice:
    text, calls = read_calls(form, one["text"], tools)
    made = [AnsweredCall(id=call_id(form), function=CalledFunction(**call)) for call in calls]
    return Choice(
        index=at,
        message=Answer(content=text if text or not made else None, tool_calls=made or None),
        logprobs=chat_logs(one.get("logs")),
        finish_reason="tool_calls" if made and one["finish"] == "stop" else one["finish"],
    )


def _cite(message: Answer, citing: Citing, ground: Ground) -> None:
    message.content, message.citations = citing.feed(message.content or "", last=True)
    message.removed_citations, message.known = citing.removed, ground.known


async def _chunks(
    request: Request,
    served: Served,
    body: ChatRequest,
    asked: dict[str, Any],
    form: CallForm | None,
    ground: Ground | None,
) -> AsyncIterator[bytes]:
    """Server-sent events of an answer."""
    head = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": served.name,
    }
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    readers = [CallReader(form, asked.get("tools", ())) if form is not None else None for _ in range(body.n)]
    citings = [Citing(request, served, ground) if ground is not None else None for _ in range(body.n)]

    def chunk(at: int, delta: dict[str, Any], finish: str | None = None, logs: Any = None) -> bytes:
        choice: dict[str, Any] = {"index": at, "delta": delta, "finish_reason": finish}
        if body.logprobs:
            choice["logprobs"] = None if logs is None else chat_logs(logs).model_dump()  # type: ignore[union-attr]
        return event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    def of_texts(at: int) -> TextEvents:
        choice = {"index": at, "delta": {"content": TextEvents.HERE}, "finish_reason": None}
        return TextEvents({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    begun: set[int] = set()
    # Most of a stream: a few letters each.
    plain = [of_texts(at) for at in range(0 if body.logprobs or ground is not None or form is not None else body.n)]
    write = writer_of(request)

    def pass_on(at: int, text: str) -> bool:
        return write is not None and at in begun and bool(text) and write(plain[at].tell(text))

    tap = pass_on if plain else None
    async for kind, part in write_grounded_pieces(request, served, asked, ground, tap):
        if kind == "end":
            if with_usage:
                yield event({**head, "choices": [], "usage": usage_of(part["usage"]).model_dump()})
            yield DONE
            return
        at, finish, reader, citing = part["which"], part.get("finish"), readers[part["which"]], citings[part["which"]]
        if at not in begun:
            begun.add(at)
            yield chunk(at, {"role": "assistant", "content": ""})
        if plain and finish is None and part["text"]:
            yield plain[at].tell(part["text"])
            continue
        deltas: Sequence[dict[str, Any]]
        if citing is not None:
            deltas = _cited_deltas(citing, part, ground)
        elif reader is None:
            deltas = [{"content": part["text"]}] if part["text"] else []
        else:
            parts = reader.feed(part["text"]) + (reader.end() if finish is not None else [])
            deltas = [_delta(one, form) for one in parts]
            finish = "tool_calls" if finish == "stop" and reader.calls else finish
        logs = part.get("logs")
        for delta in deltas:
            yield chunk(at, delta, None, logs)
            logs = None
        if finish is not None:
            yield chunk(at, {}, finish, logs)


def _cited_deltas(citing: Citing, part: dict[str, Any], ground: Ground | None) -> list[dict[str, Any]]:
    last = "finish" in part
    text, cited = citing.feed(part["text"], last)
    deltas: list[dict[str, Any]] = [{"content": text}] if text else []
    if cited:
        deltas[-1]["citations"] = [one.model_dump() for one in cited]
    if last and ground is not None:
        deltas.append({"removed_citations": citing.removed, "known": ground.known})
    return deltas


def _delta(part: Part, form: CallForm | None) -> dict[str, Any]:
    if part.kind == "text":
        return {"content": part.text}
    if part.kind == "name":
        call = {"id": call_id(form), "type": "function", "function": {"name": part.text, "arguments": ""}}
        return {"tool_calls": [{"index": part.index, **call}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
