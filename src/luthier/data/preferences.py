"""Rows with an answer that was liked and one that was not, or with one answer and a verdict on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.core.errors import DataError
from luthier.core.types import Example, Feedback, Message, Preference, Role
from luthier.data.turns import read_messages, read_number, read_text, read_tools

# How Anthropic's HH-RLHF writes a conversation as one text.
SPEAKERS = re.compile(r"\n\n(Human|Assistant):[ \n]?")
VERDICTS = {True: True, False: False, "true": True, "false": False}


def holds_answers(examples: Sequence[Example]) -> bool:
    """Whether rows hold answers that were liked or not."""
    return bool(examples) and isinstance(examples[0], Preference | Feedback)


def as_preference(name: str, get: Callable[[str], Any], columns: Mapping[str, str], meta: dict[str, Any]) -> Preference:
    """A row with `chosen` and `rejected`: answers to a prompt in a column of its own, or whole conversations that share
    their beginning. Raises DataError: no prompt, prompts that differ, an empty answer, two that are the same.
    """
    prompt, tools = _prompt(get, columns)
    answers = [_conversation(get(role), columns[role]) for role in ("chosen", "rejected")]
    if not prompt or all(one[:1] and one[0].role != "assistant" for one in answers):
        shared = _shared(*answers)
        if not shared and not prompt:
            raise DataError(
                f"{columns['chosen']!r} and {columns['rejected']!r} share no prompt, and no column holds one: "
                "name it with columns.prompt"
            )
        prompt, answers = answers[0][:shared] or prompt, [one[shared:] for one in answers]
    chosen, rejected = answers
    if not chosen or not rejected:
        raise DataError(f"{columns['rejected' if chosen else 'chosen']!r} holds no answer of its own")
    for role, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(answer, columns[role])
    if _said(chosen) == _said(rejected):
        raise DataError(f"{columns['chosen']!r} and {columns['rejected']!r} are the same")
    margin = get("margin")
    return Preference(
        name,
        _with_system(prompt, get("system")),
        chosen,
        rejected,
        tools,
        None if margin is None else read_number(margin, columns["margin"]),
        meta,
    )


def as_feedback(name: str, get: Callable[[str], Any], columns: Mapping[str, str], meta: dict[str, Any]) -> Feedback:
    """A row with one answer and whether it is good: beside a prompt, or as the end of a conversation. Raises DataError."""
    role = next(role for role in ANSWERS if role in columns)
    prompt, tools = _prompt(get, columns)
    answer = _conversation(get(role), columns[role])
    if role in ("messages", "conversations"):
        start = next((at for at in range(len(answer), 0, -1) if answer[at - 1].role != "assistant"), 0)
        prompt, answer = answer[:start], answer[start:]
    if not prompt:
        raise DataError("there is no prompt before the answer: name its column with columns.prompt")
    _check_answer(answer, columns[role])
    good = VERDICTS.get(_lower(get("good")))
    if good is None:
        raise DataError(f"{columns['good']!r} holds {get('good')!r}, expected true or false")
    return Feedback(name, _with_system(prompt, get("system")), answer, good, tools, meta)


# Where the answer of a verdict may stand.
ANSWERS = ("completion", "output", "messages", "conversations")


def is_verdict(value: Any) -> bool:
    """Whether a value says good or bad: true or false."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in VERDICTS)


def _prompt(
    get: Callable[[str], Any], columns: Mapping[str, str]
) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """(the turns before the answer, the tools); no turns where no column holds them."""
    given = get("input")
    if isinstance(given, Mapping):  # OpenAI's preference format
        return tuple(read_messages(given.get("messages"), columns["input"])), read_tools(given.get("tools"))
    tools = read_tools(get("tools"))
    if get("prompt") is not None:
        return _conversation(get("prompt"), columns["prompt"], "user"), tools
    if get("instruction") is not None:
        text = read_text(get("instruction"), columns["instruction"])
        return (Message("user", f"{text}\n{given}" if str(given or "").strip() else text),), tools
    if get("conversations") is not None:
        return tuple(read_messages(get("conversations"), columns["conversations"])), tools
    return (), tools


def _conversation(value: Any, column: str, role: Role = "assistant") -> tuple[Message, ...]:
    """The turns of a value: a list of them, one, a text of HH-RLHF, or any text as one turn of `role`."""
    if isinstance(value, Mapping | list):
        return tuple(read_messages(value, column))
    text = read_text(value, column)
    if not SPEAKERS.match("\n\n" + text.lstrip("\n")):
        return (Message(role, text),)
    _, *parts = SPEAKERS.split("\n\n" + text.lstrip("\n"))
    turns = [
        Message("user" if who == "Human" else "assistant", said.strip()) for who, said in zip(parts[::2], parts[1::2])
    ]
    # A prompt ends by opening the assistant's turn.
    return tuple(turns[:-1] if role == "user" and not turns[-1].content else turns)


def _shared(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many turns two conversations share before the first answer in which they differ.

    Raises DataError when it is not in an answer of the assistant that they part.
    """
    same = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    if same == len(one) == len(other) and same:
        return same - 1
    for turns in (one, other):
        if same < len(turns) and turns[same].role != "assistant":
            raise DataError(f"the prompts of the two answers differ in turn {same + 1} ({turns[same].role})")
    return same


def _check_answer(turns: Sequence[Message], column: str) -> None:
    if turns[0].role != "assistant" or turns[-1].role != "assistant":
        raise DataError(f"{column!r} is no answer of the assistant")
    if not any(turn.content.strip() or turn.tool_calls for turn in turns if turn.role == "assistant"):
        raise DataError(f"{column!r} is empty")


def _said(turns: Sequence[Message]) -> list[tuple[str, str, str]]:
    return [(turn.role, turn.content.strip(), str(turn.tool_calls)) for turn in turns]


def _with_system(prompt: tuple[Message, ...], system: Any) -> tuple[Message, ...]:
    return prompt if not system or prompt[0].role == "system" else (Message("system", str(system)), *prompt)


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value
