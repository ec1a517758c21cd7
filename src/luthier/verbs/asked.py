"""Rows of a file as what a model is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from luthier.core.errors import DataError
from luthier.core.types import Chat, Message

Prompt: TypeAlias = str | tuple[Message, ...]


def read_items(path: Path) -> list[tuple[str, Any]]:
    """(id, text or messages or two texts) of each row; gold columns, if any, are left aside. Raises DataError."""
    from luthier.data.shapes import Columns, find_columns, to_example
    from luthier.data.sources import read_rows

    def refuse(where: str, why: str) -> None:
        raise DataError(f"{where}: {why}")

    items: list[tuple[str, Any]] = []
    for row in read_rows(path, bad=refuse):
        found = find_columns(row.values, Columns())
        name = str(row.values.get("id", row.where))
        if "messages" in found:
            turns = row.values[found["messages"]]
            filled = (
                {"messages": [*turns, {"role": "assistant", "content": "?"}]} if isinstance(turns, list) else row.values
            )
            example = to_example(type(row)(filled, row.where), "messages", {"messages": "messages"})
            assert isinstance(example, Chat)
            items.append((name, example.messages[:-1]))
            continue
        role = next((role for role in ("text", "prompt", "source", "instruction") if role in found), None)
        value = row.values.get(found[role]) if role else None
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{row.where}: no text here; the columns may be text, prompt, source, instruction or messages"
            )
        second = row.values.get(found["text_pair"]) if "text_pair" in found else None
        items.append((name, value if second is None else (value, str(second))))
    return items


def as_prompt(item: Any) -> Prompt:
    """What a language model goes on from: the messages, or the text, with the second of two on a line of its own."""
    if isinstance(item, str):
        return item
    return item if isinstance(item[0], Message) else flat(item)


def flat(item: Any) -> str:
    """A text, or several on lines of their own."""
    if isinstance(item, str):
        return item
    return "\n".join(part.content if isinstance(part, Message) else str(part) for part in item if part is not None)
