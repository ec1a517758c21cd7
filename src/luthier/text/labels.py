"""A text to classify as a prompt, and each label as the answer to it: rendered whole, and forked where labels differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from luthier.core.errors import DataError
from luthier.core.types import Message
from luthier.text.render import Renderer

Shots: TypeAlias = Sequence[tuple[str, str]]
"""Texts, each with its label."""


@dataclass(frozen=True, slots=True)
class Ask:
    """How a text is put to a model: the labels, the instruction before all, worked examples, and whether as plain text."""

    labels: tuple[str, ...]
    instruction: str
    shots: Shots = ()
    raw: bool = False

    def about(self, item: str | Sequence[Message]) -> str | tuple[Message, ...]:
        """The prompt: plain text that ends before the label, or turns of which the assistant's is next."""
        if self.raw:
            if not isinstance(item, str):
                raise DataError("labels after plain text (raw) go with a text, not with messages")
            start = f"{self.instruction}\n\n" if self.instruction else ""
            return start + "".join(f"{text}\n{label}\n\n" for text, label in self.shots) + f"{item}\n"
        own = (Message("user", item),) if isinstance(item, str) else tuple(item)
        turns = [one for text, label in self.shots for one in (Message("user", text), Message("assistant", label))]
        turns += [one for one in own if one.role != "system"]
        if self.instruction:
            first = next((at for at, one in enumerate(turns) if one.role == "user"), None)
            if first is None:
                turns.insert(0, Message("user", self.instruction))
            else:
                turns[first] = replace(turns[first], content=f"{self.instruction}\n\n{turns[first].content}")
        return (*(one for one in own if one.role == "system"), *turns)


class LabelRenderer:
    """Prompts with their labels as ids.

    Each prompt with each label is tokenised whole, up to the end of the label's turn, so that the tokens are exactly those
    that the model reads of it, also where the tokenizer joins characters of both. A label's tokens are all after the
    beginning that is common to the prompt with any label.
    """

    def __init__(self, renderer: Renderer, ask: Ask):
        self.renderer, self.ask = renderer, ask
        self._bodies: list[str] | None = None
        self.cut = 0
        """Texts that were cut to fit."""

    def render(self, item: str | Sequence[Message], id: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """(ids of the prompt, ids of each label). Raises DataError for what does not fit, or cannot be rendered."""
        limit = self.renderer.max_length
        shown = item
        while True:
            prompt, labels = self._encode(shown, id)
            size = len(prompt) + max(map(len, labels))
            if size <= limit:
                self.cut += shown is not item
                return prompt, labels
            if not self.renderer.truncate or not isinstance(shown, str):
                raise DataError(
                    f"{id}: {size} tokens do not fit in {limit}; shorten the text, raise max_length if the model "
                    "allows it, or set truncate: true to cut (the cuts are counted)"
                )
            shown = self.renderer.shorten(shown, size - limit)
            if not shown:
                raise DataError(
                    f"{id}: the instruction, the worked examples and a label leave no room for the text in {limit} tokens; "
                    "use fewer examples, or raise max_length"
                )

    def _encode(self, item: str | Sequence[Message], id: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        texts, seam = self._texts(item, id)
        rows = [self.renderer.tokens(text) for text in texts]
        starts = [next(at for at, end in enumerate(ends) if end > seam) for _, ends in rows]
        first, whole = rows[0][0], [ids for ids, _ in rows]
        shared = next((at for at in range(min(starts)) if any(ids[at] != first[at] for ids in whole)), min(starts))
        if not shared:
            raise DataError(f"{id}: the answers differ from their first token on, so they share no prompt")
        return first[:shared], [ids[shared:] for ids in whole]

    def _texts(self, item: str | Sequence[Message], id: str) -> tuple[list[str], int]:
        """The prompt with each label, and where the prompt ends."""
        prompt = self.ask.about(item)
        template = self.renderer.template
        if isinstance(prompt, str):
            return [f"{prompt}{label}\n\n" for label in self.ask.labels], len(prompt)
        if template is not None and template.name == "raw":
            text = "\n".join(turn.content for turn in prompt)
            return [f"{text}{label}{self.renderer.tokenizer.eos_token}" for label in self.ask.labels], len(text)
        head, body = self._split(prompt, self.ask.labels[0], id)
        if self._bodies is None or self._bodies[0] != body:
            # What a template makes of a label does not depend on the text, so it is looked at once.
            parts = [self._split(prompt, label, id) for label in self.ask.labels]
            if any(part[0] != head for part in parts):
                raise DataError(f"{id}: the chat template writes the prompt otherwise before another label")
            self._bodies = [part[1] for part in parts]
        return [head + one for one in self._bodies], len(head)

    def _split(self, prompt: Sequence[Message], label: str, id: str) -> tuple[str, str]:
        return self.renderer.split((*prompt, Message("assistant", label)), id)
