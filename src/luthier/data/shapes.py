"""Columns to examples: which shape a table has, and what each row becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from luthier.core.config import Config
from luthier.core.errors import DataError, did_you_mean
from luthier.core.types import Chat, Example, Labelled, Message, Pair, Text
from luthier.data.preferences import ANSWERS, as_feedback, as_preference, is_verdict
from luthier.data.sources.row import Row
from luthier.data.turns import read_number, read_text, read_tools, read_turns

Shape: TypeAlias = Literal[
    "preference",
    "feedback",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "pair",
    "scored",
    "labelled",
    "text",
]


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
    chosen: str | None = None
    """The better of two answers, or the conversation with it (usual: chosen, chosen_response, preferred_output)."""
    rejected: str | None = None
    """The worse one (usual: rejected, rejected_response, non_preferred_output)."""
    margin: str | None = None
    """By how much the chosen answer is better, for reward models."""
    good: str | None = None
    """Whether an answer is good: true or false (usual: kto_tag; label where it holds true and false beside an answer)."""
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
    "chosen": ("chosen", "chosen_response", "chosen_messages", "preferred_output"),
    "rejected": ("rejected", "rejected_response", "rejected_messages", "non_preferred_output"),
    "good": ("kto_tag", "label"),
}
# What each shape needs, in the order in which shapes are tried.
NEEDS: dict[Shape, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "feedback": ("good",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "pair": ("source", "target"),
    "prompt_completion": ("prompt", "completion"),
    "scored": ("text", "score"),
    "labelled": ("text", "label"),
    "text": ("text",),
}


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


def recognise(row: Row, columns: Columns, asked: Shape | Literal["auto"] = "auto") -> tuple[Shape, dict[str, str]]:
    """The shape of a table from its first row, and the column of each role.

    Columns that are mapped by hand decide before those found by name. Raises DataError when nothing fits.
    """
    found = find_columns(row.values, columns)
    # `label` is a class name beside a text, and a verdict beside an answer.
    judged = "good" in found and is_verdict(row.values[found["good"]]) and any(role in found for role in ANSWERS)
    if columns.good is None and asked != "feedback" and not judged:
        found.pop("good", None)
    if asked != "auto":
        lacking = [role for role in NEEDS[asked] if role not in found]
        if lacking:
            raise DataError(
                f"{row.where}: the shape {asked!r} needs {_named(NEEDS[asked])}; the columns are {_named(row.values)}: "
                f"map them with columns.{lacking[0]}"
            )
        return asked, found
    mapped = {role for role in Columns.model_fields if getattr(columns, role) is not None}
    fits = [shape for shape, needs in NEEDS.items() if all(role in found for role in needs)]
    if not fits:
        raise DataError(
            f"{row.where}: no known shape fits the columns {_named(row.values)}; name them: columns.text (and columns.label or "
            "columns.score), columns.prompt and columns.completion, columns.source and columns.target, columns.chosen and "
            "columns.rejected, or columns.messages"
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
        meta["weight"] = read_number(values.get(found["weight"]), found["weight"])

    def get(role: str) -> Any:
        return values.get(found[role]) if role in found else None

    if shape == "preference":
        return as_preference(name, get, found, meta)
    if shape == "feedback":
        return as_feedback(name, get, found, meta)
    if shape == "text":
        return Text(name, read_text(get("text"), found["text"]), meta)
    if shape == "pair":
        return Pair(name, read_text(get("source"), found["source"]), read_text(get("target"), found["target"]), meta)
    if shape == "prompt_completion":
        return Pair(
            name, read_text(get("prompt"), found["prompt"]), read_text(get("completion"), found["completion"]), meta
        )
    if shape in ("labelled", "scored"):
        second = read_text(get("text_pair"), found["text_pair"]) if "text_pair" in found else None
        text = read_text(get("text"), found["text"])
        gold = read_number(get("score"), found["score"]) if shape == "scored" else _label(get("label"), found["label"])
        return Labelled(name, text, gold, second, meta)
    if shape == "alpaca":
        question = read_text(get("instruction"), found["instruction"])
        if str(get("input") or "").strip():
            question = f"{question}\n{get('input')}"
        turns = [Message("user", question), Message("assistant", read_text(get("output"), found["output"]))]
    else:
        column = found["messages" if shape == "messages" else "conversations"]
        turns = read_turns(values[column], column)
    if get("system") and turns[0].role != "system":
        turns.insert(0, Message("system", str(get("system"))))
    return Chat(name, tuple(turns), read_tools(get("tools")), meta)


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


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
