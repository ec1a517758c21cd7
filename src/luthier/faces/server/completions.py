"""/v1/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from luthier.faces.server.answering import DONE, TextEvents, event, new_id, stream_events, while_here
from luthier.faces.server.direct import writer_of
from luthier.faces.server.drawing import Drawing, StreamOptions, TokenId, Usage, usage_of
from luthier.faces.server.logprobs import TextLogs, text_logs
from luthier.faces.server.refusals import RESPONSES, STREAMED
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.shelf import Served
from luthier.faces.server.writing import write, write_pieces

routes = APIRouter(tags=["completions"], responses=RESPONSES)
# Of what an engine counts, what adds up over several prompts.
COUNTED = ("prompt", "written", "reused", "drafted", "accepted")
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Drawing):
    """What /v1/completions takes."""

    model: str
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=50)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 writes nothing; set echo: true to be told of the prompt")
        if self.stream and (self.echo or len(self.prompts) > 1):
            raise ValueError("a stream is the answer to one prompt, without an echo; ask without stream")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many, each a text or its tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """What /v1/completions answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


@routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def complete_text(
    body: CompletionRequest, request: Request, server: TheServer, key: TheKey
) -> Response | Completion:
    """Go on from a text, or from several; with `stream`, as server-sent events."""
    served = server.shelf.find(body.model)
    asked = [_question(body, prompt, key.name) for prompt in body.prompts]
    seconds = server.settings.timeout
    if body.stream:
        return await stream_events(request, _chunks(request, served, body, asked[0]), seconds)
    # As many as are written at once: more would wait, and no request fills alone what may wait.
    at_once = max(1, min(served.process.facts["streams"], server.settings.waiting // 2) // body.n)
    found = await while_here(request, _ask_all(request, served, asked, at_once), seconds)
    choices: list[TextChoice] = []
    for one in found:
        choices += [_choice(len(choices) + at, body, answer, one) for at, answer in enumerate(one["answers"])]
    usage = {name: sum(one["usage"][name] for one in found) for name in COUNTED}
    if body.max_tokens == 0:
        usage["written"] = 0
    return Completion(
        id=new_id("cmpl"), created=int(time.time()), model=served.name, choices=choices, usage=usage_of(usage)
    )


def _question(body: CompletionRequest, prompt: str | list[int], tenant: str) -> dict[str, Any]:
    sampling = body.sampling(None if body.max_tokens is None else max(1, body.max_tokens))
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
        sampling["prompt_logprobs"] = body.echo
    return {
        "text" if isinstance(prompt, str) else "ids": prompt,
        "sampling": sampling,
        "stream": body.stream,
        "echo": body.echo,
        "tenant": tenant,
        "salt": f"{tenant} {body.user or ''}",
        "priority": body.priority,
    }


async def _ask_all(request: Request, served: Served, asked: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    turn = asyncio.Semaphore(at_once)

    async def ask(one: dict[str, Any]) -> dict[str, Any]:
        async with turn:
            return await write(request, served, one)

    tasks = [asyncio.create_task(ask(one)) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        # Where one is refused, the others are not waited for any more.
        for task in tasks:
            task.cancel()


def _choice(at: int, body: CompletionRequest, answer: dict[str, Any], whole: dict[str, Any]) -> TextChoice:
    text = "" if body.max_tokens == 0 else answer["text"]
    logs = list(answer.get("logs") or ())[: None if body.max_tokens else 0]
    if body.echo:
        text, logs = whole["prompt"] + text, [*(whole.get("prompt_logs") or ()), *logs]
    return TextChoice(
        index=at,
        text=text,
        logprobs=text_logs(logs, text=text) if body.logprobs is not None else None,
        finish_reason="length" if body.max_tokens == 0 else answer["finish"],
    )


async def _chunks(
    request: Request, served: Served, body: CompletionRequest, asked: dict[str, Any]
) -> AsyncIterator[bytes]:
    head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": served.name}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    shown, begun, usage = [0] * body.n, False, {"usage": None} if with_usage else {}

    def of_texts(at: int) -> TextEvents:
        choice = {"index": at, "text": TextEvents.HERE, "finish_reason": None, "logprobs": None}
        return TextEvents({**head, "choices": [choice], **usage})

    def pass_on(at: int, text: str) -> bool:
        return begun and write is not None and write(plain[at].tell(text))

    write, plain = writer_of(request), [of_texts(at) for at in range(body.n)]
    async for kind, part in write_pieces(request, served, asked, pass_on):
        if kind == "end":
            if with_usage:
                yield event({**head, "choices": [], "usage": usage_of(part["usage"]).model_dump()})
            yield DONE
            return
        at, logs, begun = part["which"], part.get("logs"), True
        choice: dict[str, Any] = {"index": at, "text": part["text"], "finish_reason": part.get("finish")}
        choice["logprobs"] = None if logs is None else text_logs(logs, shown[at]).model_dump()
        shown[at] += len(part["text"])
        yield event({**head, "choices": [choice], **usage})
