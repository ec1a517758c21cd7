"""Errors as OpenAI's API shows them: a status, and an object that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from luthier.core.errors import ConfigError, LuthierError, ModelError, RunError, did_you_mean
from luthier.faces.server.engines import Gone, Refused
from luthier.faces.server.mistakes import OBJECT, sentences_of


class Fault(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class FaultBody(BaseModel):
    """The body of every answer that is an error."""

    error: Fault


class MessagesFault(BaseModel):
    type: str
    message: str


class MessagesFaultBody(BaseModel):
    """The same at the addresses of Anthropic's API."""

    type: Literal["error"] = "error"
    error: MessagesFault


# The addresses that answer as Anthropic's API does, and its words for what is wrong, where they are others.
MESSAGES = "/v1/messages"
MESSAGES_KINDS = {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


class Refusal(LuthierError):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: float | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.wait = status, param, code, wait


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# What an engine says no with.
STATUSES = {"Busy": 429, "Closed": 503, "Bug": 500, "MissingExtra": 501}
# How settings of the engine are called in a request, where that is another name.
SENT_AS = (("stop_ids", "stop_token_ids"), ("ignore_stop", "ignore_eos"))
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultBody, "description": text}
    for status, text in (
        (400, "The request is wrong; the message says where and what to do."),
        (401, "No key, or one that is not known."),
        (403, "The key may not do this."),
        (404, "There is no such thing."),
        (408, "The body did not come."),
        (413, "The body is too large."),
        (429, "Too much at once; Retry-After says when to ask again."),
        (500, "A bug in Luthier."),
        (501, "A package is missing; the message names the extra that brings it."),
        (503, "Not now: a model is being loaded, or the server is ending."),
        (504, "It took longer than the server allows."),
    )
}

MESSAGES_RESPONSES = {status: {**one, "model": MessagesFaultBody} for status, one in RESPONSES.items()}

# Of an address whose answer may also come as events. A schema would be that of one event, of which there are many kinds.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {}}}, "description": "The answer, or its events."}
}


def refusal_of(err: Exception) -> Refusal:
    """An error of any kind as an answer."""
    if isinstance(err, Refusal):
        return err
    if isinstance(err, Refused):
        status, said = STATUSES.get(err.kind, 400), _as_sent(str(err))
        code = "context_length_exceeded" if err.kind == "TooLong" else None
        return Refusal(status, said, param=_param(said) if status == 400 else None, code=code, wait=_wait(status))
    if isinstance(err, Gone):
        return Refusal(503, str(err), code="engine_unavailable", wait=2.0)
    if isinstance(err, RunError):
        return Refusal(404, str(err))
    if isinstance(err, ConfigError | ModelError | LuthierError):
        return Refusal(400, str(err), param=_param(str(err)))
    return Refusal(500, f"this is a bug in Luthier: {type(err).__name__}: {err}", code="bug")


def _as_sent(message: str) -> str:
    """An engine's sentence about a setting, with the name that it has in a request."""
    said = message.removeprefix("sampling: ")
    return next((f"{there}{said[len(here) :]}" for here, there in SENT_AS if said.startswith(here)), said)


def _wait(status: int) -> float | None:
    return {429: 1.0, 503: 2.0}.get(status)


def _param(message: str) -> str | None:
    """The setting that a sentence begins with."""
    head, found, _ = message.partition(":")
    return head if found and head.replace("_", "").replace(".", "").isalnum() and " " not in head else None


def body_of(refusal: Refusal, path: str = "") -> dict[str, Any]:
    """The object that an error is, in an answer or in a stream, at an address."""
    if speaks_messages(path):
        kind = "invalid_request_error" if refusal.status < 500 else "api_error"
        kind = {**KINDS, **MESSAGES_KINDS}.get(refusal.status, kind)
        return {"type": "error", "error": {"type": kind, "message": str(refusal)}}
    kind = KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {
        "error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code},
    }


def speaks_messages(path: str) -> bool:
    """Whether an address is one of Anthropic's API."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def answer_of(refusal: Refusal, path: str) -> JSONResponse:
    """The whole answer, at an address."""
    headers = {} if refusal.wait is None else {"Retry-After": str(max(1, round(refusal.wait)))}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(refusal, path), refusal.status, headers)


def explain(app: FastAPI, routers: Sequence[APIRouter] = ()) -> None:
    """Let `app`, which has these `routers`, answer every error so."""

    async def ours(request: Request, err: Exception) -> JSONResponse:
        return answer_of(refusal_of(err), request.url.path)

    async def invalid(request: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, RequestValidationError)
        return answer_of(_invalid(err), request.url.path)

    async def plain(request: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, HTTPException)
        answer = answer_of(Refusal(err.status_code, _sentence(err, request.url.path)), request.url.path)
        answer.headers.update(err.headers or {})
        if err.status_code == 405:
            answer.headers["Allow"] = ", ".join(_methods(routers, request))
        return answer

    app.add_exception_handler(LuthierError, ours)
    app.add_exception_handler(Exception, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)


def _methods(routers: Sequence[APIRouter], request: Request) -> list[str]:
    """All that an address takes: it may be written down once for each."""
    routes = [one for router in routers for one in router.routes if isinstance(one, APIRoute)]
    return sorted({name for one in routes if one.path_regex.match(request.url.path) for name in one.methods or ()})


def _sentence(err: HTTPException, path: str) -> str:
    if err.status_code == 405 and path.startswith("/v1/vector_stores"):
        return "indexes are read and searched here; `luthier index DOCS --name NAME` makes, updates and fills them"
    if err.status_code == 400 and "parsing the body" in str(err.detail):
        why = "it is no UTF-8, compressed, nested too deep, or holds a number that is too long"
        return f"the body cannot be read as JSON: {why}; {OBJECT}"
    known = {
        404: "there is nothing at this address; /docs lists what there is",
        405: "this address does not take this method; /docs says which it takes",
    }
    return known.get(err.status_code, str(err.detail))


def _invalid(err: RequestValidationError) -> Refusal:
    """All that is wrong with a body, in sentences."""
    said, param = sentences_of(err.errors(), err.body)
    return Refusal(400, "; ".join(said), param=param)


def unknown(name: str, known: list[str]) -> Refusal:
    """There is no such model."""
    return Refusal(
        404, f"model: {name!r} is not served here; {did_you_mean(name, known) if known else 'no model is'}", param="model",
        code="model_not_found",
    )  # fmt: skip
