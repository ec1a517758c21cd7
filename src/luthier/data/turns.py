"""Turns, texts and numbers out of the values of a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from luthier.core.errors import DataError, did_you_mean
from luthier.core.types import Message, Role

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip


def read_turns(value: Any, column: str) -> list[Message]:
    """A conversation in which the assistant speaks. Raises DataError when it does not, and as `read_messages`."""
    turns = read_messages(value, column)
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{column!r} holds no turn of the assistant")
    return turns


def read_messages(value: Any, column: str) -> list[Message]:
    """Turns from a list of them, one alone, or the same as JSON text. Raises DataError when there is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{column!r} is a text and no list of turns") from None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} holds no list of turns")
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number} is a {type(turn).__name__}, expected an object with a role and a content")
    said = turn.get("role", turn.get("from"))
    if said not in ROLES:
        raise DataError(f"turn {number} has the role {said!r}; {did_you_mean(str(said), ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    calls = tuple(_parsed(call) for call in turn.get("tool_calls") or ())
    if said == "function_call":
        calls, content = (_call(content, number),), ""
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"turn {number} has no content")
    weight = turn.get("weight")
    return Message(
        ROLES[said],
        content,
        calls,
        turn.get("tool_call_id"),
        turn.get("name"),
        None if weight is None else read_number(weight, "weight"),
    )


def _part(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("text", "input_text", "output_text"):
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise DataError(f"turn {number} holds a part of the type {kind!r}; only text can be learned")


def _parsed(call: Any) -> Any:
    """A call whose arguments are JSON text, as APIs send them, with the object itself: templates write that out, and would
    write the text as a text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _call(content: Any, number: int) -> dict[str, Any]:
    try:
        call = json.loads(content) if isinstance(content, str) else dict(content)
        return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"turn {number} is a function call that is no JSON with a name and arguments") from None


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools from a list of objects, or the same as JSON text. Raises DataError."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except json.JSONDecodeError as err:
            raise DataError(f"the tools are no JSON ({err.msg})") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError("the tools are no list of objects")
    return tuple(dict(tool) for tool in value)


def read_text(value: Any, column: str) -> str:
    """A text that is not empty. Raises DataError."""
    if isinstance(value, float) and math.isnan(value):
        value = None  # how pandas marks what is missing
    if value is None:
        raise DataError(f"{column!r} is missing")
    if not isinstance(value, str):
        raise DataError(f"{column!r} holds a {type(value).__name__}, expected a text")
    if not value.strip():
        raise DataError(f"{column!r} is empty")
    return value


def read_number(value: Any, column: str) -> float:
    """A finite number. Raises DataError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{column!r} holds {value!r}, expected a number") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise DataError(f"{column!r} holds {value!r}, expected a number")
    return number
