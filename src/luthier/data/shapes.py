"""Columns to examples: which shape a table has, and what each row becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from luthier.core.config import Config
from luthier.core.errors import DataError, did_you_mean
from luthier.core.types import Chat, Example, Labelled, Message, Pair, Role, Text
from luthier.data.sources.row import Row

Shape: TypeAlias = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "pair", "scored", "labelled", "text"]


class Columns(Config):
    """Which column holds what; a column that is not named is found by its usual names."""

    text: str | None = None
    """The text to classify, to score or to learn from (usual: text, sentence, sentence1, content, review, premise)."""
    text_pair: str | None = None
    """A second text beside the first (usual: text_pair, sentence2, hypothesis)."""
    label: str | None = None
    """A class name, or a list of them (usual: label, labels)."""
    score: str | None = None
    """A number (usual: score)."""
    source: str | None = None
    """What a target is made from (usual: source)."""
    target: str | None = None
    """What is made of a source (usual: target)."""
    prompt: str | None = None
    """A prompt (usual: prompt, question)."""
    completion: str | None = None
    """Its completion (usual: completion, response, answer)."""
    instruction: str | None = None
    """Alpaca's instruction."""
    input: str | None = None
    """Alpaca's input, which may be empty."""
    output: str | None = None
    """Alpaca's output (usual: output, response)."""
    system: str | None = None
    """A system message for Alpaca and ShareGPT rows."""
    messages: str | None = None
    """OpenAI's list of messages."""
    conversations: str | None = None
    """ShareGPT's list of turns."""
    tools: str | None = None
    """Tools that the assistant may call: a list, or the same as JSON text."""
    weight: str | None = None
    """How much a row counts (1 where there is none)."""
    id: str | None = None
    """A name for the row; by default its file and line."""


USUAL: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "content", "review", "premise"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "label": ("label", "labels"),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "response", "answer"),
    "output": ("output", "response"),
}
# What each shape needs, in the order in which shapes are tried.
NEEDS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "pair": ("source", "target"),
    "prompt_completion": ("prompt", "completion"),
    "scored": ("text", "score"),
    "labelled": ("text", "label"),
    "text": ("text",),
}
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip


def find_columns(names: Iterable[str], columns: Columns) -> dict[str, str]:
    """Role to column name, as mapped or by the usual names. Raises DataError for a mapped column that is not there."""
    names = list(names)
    found: dict[str, str] = {}
    for role in Columns.model_fields:
        mapped = getattr(columns, role)
        if mapped is not None:
            if mapped not in names:
                raise DataError(f"columns.{role}: there is no column {mapped!r}; {did_you_mean(mapped, names)}")
            found[role] = mapped
            continue
        usual = next((name for name in USUAL.get(role, (role,)) if name in names), None)
        if usual is not None:
            found[role] = usual
    return found


def recognise(row: Row, columns: Columns, asked: str = "auto") -> tuple[Shape, dict[str, str]]:
    """The shape of a table from its first row, and the column of each role.

    Columns that are mapped by hand decide before those found by name. Raises DataError when nothing fits.
    """
    found = find_columns(row.values, columns)
    if asked != "auto":
        lacking = [role for role in NEEDS[asked] if role not in found]  # type: ignore[index]
        if lacking:
            raise DataError(
                f"{row.where}: the shape {asked!r} needs {_named(NEEDS[asked])}; the columns are {_named(row.values)}: "  # type: ignore[index]
                f"map them with columns.{lacking[0]}"
            )
        return asked, found  # type: ignore[return-value]
    mapped = {role for role in Columns.model_fields if getattr(columns, role) is not None}
    fits = [shape for shape, needs in NEEDS.items() if all(role in found for role in needs)]
    if not fits:
        raise DataError(
            f"{row.where}: no known shape fits the columns {_named(row.values)}; name them: columns.text (and columns.label or "
            "columns.score), columns.prompt and columns.completion, columns.source and columns.target, or columns.messages"
        )
    best = max(fits, key=lambda shape: (len(mapped & set(NEEDS[shape])), -list(NEEDS).index(shape)))
    if best == "labelled" and isinstance(row.values[found["label"]], float):
        found["score"] = found["label"]
        best = "scored"
    return best, found


def to_example(row: Row, shape: Shape, found: Mapping[str, str]) -> Example:
    """One row as an example. Raises DataError with the reason (without the place) when the row does not hold one."""
    values = row.values
    absent = [found[role] for role in NEEDS[shape] if found[role] not in values]
    if absent:
        raise DataError(f"the column {absent[0]!r} is missing")
    used = {found[role] for role in found if role not in ("weight",)}
    meta = {name: value for name, value in values.items() if name not in used}
    name = str(values[found["id"]]) if "id" in found and values.get(found["id"]) is not None else row.where
    if "weight" in found:
        meta["weight"] = _number(values.get(found["weight"]), found["weight"])

    def get(role: str) -> Any:
        return values.get(found[role]) if role in found else None

    if shape == "text":
        return Text(name, _text(get("text"), found["text"]), meta)
    if shape == "pair":
        return Pair(name, _text(get("source"), found["source"]), _text(get("target"), found["target"]), meta)
    if shape == "prompt_completion":
        return Pair(name, _text(get("prompt"), found["prompt"]), _text(get("completion"), found["completion"]), meta)
    if shape in ("labelled", "scored"):
        second = _text(get("text_pair"), found["text_pair"]) if "text_pair" in found else None
        text = _text(get("text"), found["text"])
        gold = _number(get("score"), found["score"]) if shape == "scored" else _label(get("label"), found["label"])
        return Labelled(name, text, gold, second, meta)
    if shape == "alpaca":
        question = _text(get("instruction"), found["instruction"])
        if str(get("input") or "").strip():
            question = f"{question}\n{get('input')}"
        turns = [Message("user", question), Message("assistant", _text(get("output"), found["output"]))]
    else:
        column = found["messages" if shape == "messages" else "conversations"]
        turns = _turns(values[column], column)
    if get("system") and turns[0].role != "system":
        turns.insert(0, Message("system", str(get("system"))))
    return Chat(name, tuple(turns), _tools(get("tools")), meta)


def _turns(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{column!r} is a text and no list of turns") from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} holds no list of turns")
    turns = [_turn(turn, number) for number, turn in enumerate(value, 1)]
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{column!r} holds no turn of the assistant")
    return turns


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number} is a {type(turn).__name__}, expected an object with a role and a content")
    said = turn.get("role", turn.get("from"))
    if said not in ROLES:
        raise DataError(f"turn {number} has the role {said!r}; {did_you_mean(str(said), ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    calls = tuple(turn.get("tool_calls") or ())
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
        None if weight is None else _number(weight, "weight"),
    )


def _part(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("text", "input_text", "output_text"):
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise DataError(f"turn {number} holds a part of the type {kind!r}; only text can be learned")


def _call(content: Any, number: int) -> dict[str, Any]:
    try:
        call = json.loads(content) if isinstance(content, str) else dict(content)
        return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"turn {number} is a function call that is no JSON with a name and arguments") from None


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
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


def _text(value: Any, column: str) -> str:
    if isinstance(value, float) and math.isnan(value):
        value = None  # how pandas marks what is missing
    if value is None:
        raise DataError(f"{column!r} is missing")
    if not isinstance(value, str):
        raise DataError(f"{column!r} holds a {type(value).__name__}, expected a text")
    if not value.strip():
        raise DataError(f"{column!r} is empty")
    return value


def _label(value: Any, column: str) -> str | tuple[str, ...]:
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(str(_label(inner, column)) for inner in value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isnan(value) and value.is_integer():
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(f"{column!r} holds {value!r}, expected a class name")


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{column!r} holds {value!r}, expected a number") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise DataError(f"{column!r} holds {value!r}, expected a number")
    return number


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
