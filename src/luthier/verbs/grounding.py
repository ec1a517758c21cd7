"""Answers from an index: passages put before a question, citations checked after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Message
from luthier.retrieval.answer import Answer, Retrieved, as_row, finish, retrieve_all
from luthier.retrieval.prompt import Source, fit_prompt, say_unknown, ways_of
from luthier.retrieval.search import open_index

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel

Prompt: TypeAlias = str | tuple[Message, ...]


class Grounded:
    """An open index that a model answers from."""

    def __init__(self, reference: str, k: int, *, device: str = "auto", events: Events | None = None):
        self.events, self.k = events or Events(), k
        self.index = open_index(reference, device=device, events=self.events)

    def look_up(self, prompts: Sequence[Prompt]) -> list[Retrieved]:
        """What the index has for the last turn of each prompt, alone and after the user's turn before it. Raises ConfigError for
        a last turn that is not the user's."""
        return retrieve_all(self.index, [_ways(prompt) for prompt in prompts], self.k)

    def ask(
        self,
        model: LoadedModel,
        prompt: Prompt,
        found: Retrieved,
        room: int,
        *,
        raw: bool = False,
        complete: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ) -> tuple[Prompt, tuple[Source, ...]]:
        """The prompt with passages in its last turn: as many as leave `room` tokens for the answer once `complete` has put
        before it what else comes there; and which they are. A passage that is left out is a warning. Raises DataError where
        none fits."""

        def whole(text: str) -> Prompt:
            return text if isinstance(prompt, str) else (*prompt[:-1], Message("user", text))

        limit = model.spec.max_length - (room if model.spec.kind == "decoder" else 0)
        text, sources = fit_prompt(
            found.question, found.sources, lambda text: _count(model, complete(whole(text)), raw) <= limit
        )
        left = len(found.sources) - len(sources)
        if left:
            self.events.warn(
                "passages are left out, since the model's context has no room for them beside the answer", left
            )
        return whole(text), sources

    def finish(self, text: str, sources: tuple[Source, ...]) -> Answer:
        """What the model wrote, with the citations that exist; the others are counted in a warning."""
        made = finish(text, sources)
        if made.removed:
            self.events.warn("citations name no passage, and were taken out", made.removed)
        return made

    def answer_all(
        self,
        model: LoadedModel,
        prompts: Sequence[Prompt],
        room: int,
        write: Callable[[list[tuple[int, Prompt]]], list[dict[str, Any]]],
        **how: Any,
    ) -> list[dict[str, Any]]:
        """A row for each prompt: that of `write`, which is given places and prompts with passages, its text checked, and its
        sources. What the index knows too little of is not written, and says so."""
        found = self.look_up(prompts)
        asked = {
            at: self.ask(model, prompt, one, room, **how)
            for at, (prompt, one) in enumerate(zip(prompts, found))
            if one.known
        }
        written = write([(at, prompt) for at, (prompt, _) in asked.items()]) if asked else []
        rows = dict(zip(asked, written))
        unknown = len(prompts) - len(asked)
        if unknown:
            self.events.warn("questions are not answered, since the index holds too little about them", unknown)
        return [
            self._row(rows[at], asked[at][1])
            if at in rows
            else {"output": say_unknown(one.question), **as_row(_none(one))}
            for at, one in enumerate(found)
        ]

    def _row(self, row: dict[str, Any], sources: tuple[Source, ...]) -> dict[str, Any]:
        made = self.finish(row["output"], sources)
        others = [{**one, "output": self.finish(one["output"], sources).text} for one in row.get("others", ())]
        return {**row, "output": made.text, **({"others": others} if others else {}), **as_row(made)}


def _none(found: Retrieved) -> Answer:
    return Answer(say_unknown(found.question), found.sources, (), 0, False)


def _ways(prompt: Prompt) -> tuple[str, ...]:
    return (prompt,) if isinstance(prompt, str) else ways_of(prompt)


def _count(model: LoadedModel, prompt: Prompt, raw: bool) -> int:
    """How long a prompt is; more than the model reads where it does not fit."""
    try:
        return len(model.renderer.prompt(prompt, raw=raw))
    except DataError:
        return model.spec.max_length + 1
