"""/tokenize, /detokenize and /v1/chat/completions/render: what a model reads."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from luthier.faces.server.answered import check_turns
from luthier.faces.server.chat import ChatRequest, Tool, Turn, ground_of, question_of, turns_of
from luthier.faces.server.drawing import Body, TokenId
from luthier.faces.server.refusals import RESPONSES, Refusal
from luthier.faces.server.server import TheKey, TheServer

routes = APIRouter(tags=["tokens"], responses=RESPONSES)


class TokenizeRequest(Body):
    """A text, or a conversation."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("set one of prompt and messages")
        return self


class Tokens(BaseModel):
    tokens: list[int]
    token_strs: list[str]
    count: int
    max_model_len: int


class DetokenizeRequest(Body):
    model: str
    tokens: list[TokenId]


class Detokenized(BaseModel):
    prompt: str


class Rendered(BaseModel):
    """A conversation as the model reads it, the assistant's turn begun."""

    prompt: str
    tokens: list[int]
    count: int


@routes.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, server: TheServer) -> Tokens:
    """The tokens of a text as /v1/completions reads it, or of a conversation."""
    asked: dict[str, Any] = {"text": body.prompt}
    if body.messages is not None:
        asked = {"messages": turns_of(body.messages)}
        # What was said so far: the answers to its last calls may be still to come.
        check_turns(asked["messages"], whole=False)
        asked["tools"] = [one.model_dump(exclude_none=True) for one in body.tools or ()]
    found = await server.shelf.find(body.model).ask("tokenize", **asked)
    return Tokens(
        tokens=found["ids"], token_strs=found["texts"], count=len(found["ids"]), max_model_len=found["context"]
    )


@routes.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, server: TheServer) -> Detokenized:
    """The text of tokens."""
    found = await server.shelf.find(body.model).ask("detokenize", ids=body.tokens)
    return Detokenized(prompt=found["text"])


@routes.post("/v1/chat/completions/render", response_model=Rendered)
async def render(body: ChatRequest, request: Request, server: TheServer, key: TheKey) -> Rendered:
    """What the model would read of this request, and nothing is written."""
    served, asked = server.shelf.find(body.model), question_of(body, key.name)
    ground = await ground_of(body, request, served, asked)
    if ground is not None and not ground.known:
        raise Refusal(
            400, "index: it holds too little about this question, so that the model reads nothing", param="index"
        )
    wanted = {name: asked[name] for name in ("messages", "tools") if name in asked}
    found = await served.ask("render", **wanted)
    return Rendered(prompt=found["text"], tokens=found["ids"], count=len(found["ids"]))
