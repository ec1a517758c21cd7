"""Which characters of a rendered conversation the assistant said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from luthier.core.errors import DataError
from luthier.core.types import Message

Span: TypeAlias = tuple[int, int, float]
"""First character, the one after the last, and the weight of what lies between."""
Apply: TypeAlias = Callable[[Sequence[Message], bool], str]
"""Render messages; the flag asks for the opening of an assistant turn at the end."""

# A text that no conversation holds, to see where a content lands.
SENTINEL = "\u2983luthier\u2984"


def find_spans(messages: Sequence[Message], apply: Apply, turn_end: str, learn: str) -> list[Span]:
    """The spans of the assistant turns that are learned, each with the text that ends the turn and nothing after it.

    A turn reaches from where its opening ends to where the conversation up to it ends, when both are prefixes of the
    whole. Marking the content meets a turn that is written differently once more turns follow (thinking that is stripped
    from earlier turns), and one that nothing comes before. Raises DataError when a turn cannot be placed or has no end.
    """
    whole = apply(messages, False)
    turns = [at for at, message in enumerate(messages) if message.role == "assistant"]
    spans: list[Span] = []
    for at in turns[-1:] if learn == "last" else turns:
        message = messages[at]
        weight = 1.0 if message.weight is None else float(message.weight)
        if weight == 0:
            continue
        # Before the first turn there is nothing that a template could render.
        opening, through = apply(messages[:at], True) if at else None, apply(messages[: at + 1], False)
        if opening and whole.startswith(opening) and whole.startswith(through) and len(opening) < len(through):
            start = len(opening)
            end = whole.rfind(turn_end, start, len(through)) + len(turn_end)
            if end < start + len(turn_end):
                raise DataError(
                    f"the chat template does not close turn {at + 1} with {turn_end!r}, so the model could not learn to stop"
                )
        else:
            start, end = _mark(messages, at, apply, whole, turn_end)
        spans.append((start, end, weight))
    return spans


def _mark(messages: Sequence[Message], at: int, apply: Apply, whole: str, turn_end: str) -> tuple[int, int]:
    message = messages[at]
    if not message.tool_calls:
        marked = apply([*messages[:at], replace(message, content=SENTINEL), *messages[at + 1 :]], False)
        before, _, after = marked.partition(SENTINEL)
        for content in (message.content, message.content.strip()):
            if SENTINEL not in after and before + content + after == whole:
                gap = len(after) - len(after.lstrip())
                if after[gap:].startswith(turn_end):
                    return len(before), len(before) + len(content) + gap + len(turn_end)
    raise DataError(
        f"the chat template rewrites turn {at + 1} when more turns follow, so what to learn cannot be placed; "
        "split the conversation, or set learn: last"
    )
