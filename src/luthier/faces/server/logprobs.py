"""Log-probabilities as OpenAI's two APIs show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

Log = Sequence[Any]
"""Of the wire: id, text, log-probability, and the same of the likeliest in its place."""
# JSON has no infinity; OpenAI shows what could not come so.
LEAST = -9999.0


class TopLog(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLog(TopLog):
    top_logprobs: list[TopLog] = []


class ChatLogs(BaseModel):
    """Of each token of an answer."""

    content: list[TokenLog] | None = None
    refusal: None = None


class TextLogs(BaseModel):
    """Of each token of a text, of the prompt too where it is echoed; nothing is known of the first one there."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logs(logs: Sequence[Log] | None) -> ChatLogs | None:
    """Of the tokens of a chat's answer."""
    if logs is None:
        return None
    return ChatLogs(
        content=[TokenLog(**_log(one), top_logprobs=[TopLog(**_log(top)) for top in one[3]]) for one in logs]
    )


def text_logs(logs: Sequence[Log], start: int = 0, text: str | None = None) -> TextLogs:
    """Of the tokens of a text that begins at the character `start`. Where the whole `text` is given, tokens that it does not
    show, such as the one it begins with, take no room in it."""
    offsets = []
    for one in logs:
        offsets.append(start)
        start += len(one[1]) if text is None or text.startswith(one[1], start) else 0
    return TextLogs(
        tokens=[one[1] for one in logs],
        token_logprobs=[None if one[2] is None else max(one[2], LEAST) for one in logs],
        # The token that was chosen is there too, whether it is among the likeliest or not.
        top_logprobs=[
            None if one[2] is None else {one[1]: max(one[2], LEAST)} | {top[1]: max(top[2], LEAST) for top in one[3]}
            for one in logs
        ],
        text_offset=offsets,
    )


def _log(log: Log) -> dict[str, Any]:
    return {"token": log[1], "logprob": max(log[2], LEAST), "bytes": list(log[1].encode("utf-8", "replace"))}
