"""A prompt and several answers to it as one row, the prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.core.errors import DataError
from luthier.core.types import Chat, Encoded, Message
from luthier.text.render import Renderer


def render_answers(
    renderer: Renderer,
    prompt: Sequence[Message],
    answers: Sequence[Sequence[Message]],
    tools: Sequence[dict[str, Any]] = (),
    id: str = "",
) -> Encoded:
    """One row: the tokens that all conversations share before the first that is learned, then what follows in each.

    Each conversation is rendered whole, so shared tokens and those of an answer are together exactly what the model
    reads of it, also where the tokenizer joins characters of both. Learned (weight 1, or that of the turn) is what the
    assistant says in an answer, the end of its turn included; nothing after it is kept. Raises DataError as
    `Renderer.chat` does, and when conversations differ from their first token on.
    """
    before = [replace(turn, weight=0.0) for turn in prompt]
    rows = [renderer.chat(Chat(id, (*before, *answer), tuple(tools))) for answer in answers]
    learned = [[at for at, weight in enumerate(row.weights) if weight] for row in rows]
    shared = _shared_length([row.ids for row in rows], min(places[0] for places in learned))
    if not shared:
        raise DataError(f"{id}: the answers differ from their first token on, so they share no prompt")
    parts = [(row.ids[shared : places[-1] + 1], row.weights[shared:]) for row, places in zip(rows, learned)]
    return Encoded(
        id,
        (*rows[0].ids[:shared], *(token for ids, _ in parts for token in ids)),
        (*(0.0,) * shared, *(weight for ids, weights in parts for weight in weights[: len(ids)])),
        segments=(shared, *(len(ids) for ids, _ in parts)),
        parents=(-1, *(0,) * len(parts)),
        cut=sum(row.cut for row in rows),
    )


def split_answers(row: Encoded) -> list[Encoded]:
    """A row of a prompt and answers as one row an answer, each with the prompt before it; any other row as it is."""
    if not row.parents:
        return [row]
    starts = [sum(row.segments[:at]) for at in range(len(row.segments) + 1)]
    found = []
    answers = [at for at, up in enumerate(row.parents) if up >= 0]
    for number, at in enumerate(answers, 1):
        up, part = row.parents[at], slice(starts[at], starts[at + 1])
        above = slice(starts[up], starts[up + 1])
        name = row.id if len(answers) == 1 else f"{row.id}, answer {number} of {len(answers)}"
        whole = (*row.ids[above], *row.ids[part]), (*row.weights[above], *row.weights[part])
        found.append(replace(row, id=name, ids=whole[0], weights=whole[1], segments=(), parents=()))
    return found


def _shared_length(rows: Sequence[Sequence[int]], limit: int) -> int:
    """How many first tokens, at most `limit`, are the same in all rows."""
    first = rows[0]
    return next((at for at in range(limit) if any(row[at] != first[at] for row in rows[1:])), limit)
