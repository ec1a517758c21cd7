"""Answers from an index: passages put before the question, citations checked after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Message
from luthier.retrieval.answer import (
    Answer,
    Retrieved,
    Source,
    as_row,
    finish,
    fit_prompt,
    retrieve_all,
    say_unknown,
)
from luthier.retrieval.search import open_index

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel

Prompt = str | tuple[Message, ...]


class Grounded:
    """Questions of one run of a verb with what an index has for them."""

    def __init__(self, reference: str, k: int, *, device: str = "auto", events: Events | None = None):
        self.events, self.k = events or Events(), k
        self.index = open_index(reference, device=device, events=self.events)

    def look_up(self, prompts: Sequence[Prompt]) -> list[Retrieved]:
        """What there is for the last turn of each prompt."""
        return retrieve_all(self.index, [_question(prompt) for prompt in prompts], self.k)

    def ask(
        self, model: LoadedModel, prompt: Prompt, found: Retrieved, room: int, complete: Callable[[Prompt], Prompt] = lambda one: one,
        raw: bool = False,
    ) -> tuple[Prompt, tuple[Source, ...]]:
        """The prompt with passages before its last question: as many as leave `room` tokens for the answer, and which.
        `complete` adds what else comes before. Fewer than there are is a warning."""

        def whole(text: str) -> Prompt:
            return complete(text if isinstance(prompt, str) else (*prompt[:-1], Message("user", text)))

        limit = model.spec.max_length - (room if model.spec.kind == "decoder" else 0)
        text, sources = fit_prompt(found.question, found.sources, lambda text: _tokens(model, whole(text), raw) <= limit)
        left = len(found.sources) - len(sources)
        if left:
            self.events.warn("passages did not fit the model's context beside the answer, and were left out", left)
        return whole(text), sources

    def finish(self, text: str, sources: tuple[Source, ...]) -> Answer:
        """What the model wrote, with citations that exist; others are counted."""
        made = finish(text, sources)
        if made.removed:
            self.events.warn("citations named no passage, and were taken out", made.removed)
        return made

    def refuse(self, found: Retrieved) -> Answer:
        """What is said where the index knows too little; the model is not asked."""
        return Answer(say_unknown(found.question), found.sources, (), 0, False)


def add_sources(row: dict[str, Any], made: Answer) -> dict[str, Any]:
    """A row of answers with the text that was checked, and its sources."""
    return {**row, "output": made.text, **as_row(made)}


def _question(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if not prompt or prompt[-1].role != "user":
        raise ConfigError("index: a conversation is answered from an index where its last turn is the user's")
    return prompt[-1].content


def _tokens(model: LoadedModel, prompt: Prompt, raw: bool) -> int:
    """How long a prompt is; more than any model reads where it does not fit."""
    from luthier.core.errors import DataError

    try:
        return len(model.renderer.prompt(prompt, raw=raw))
    except DataError:
        return model.spec.max_length + 1
