"""Worked examples before a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.core.types import Chat, Labelled, Message, Pair, Text

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


def load_shots(model: LoadedModel, name: str, path: Path | None, events: Events) -> list[tuple[str, str]]:
    """The worked examples of a file, where one is given. Raises ConfigError for a model that reads none."""
    if path is None:
        return []
    if not writes(model):
        raise ConfigError(
            f"shots: {name} is made to {model.spec.task} and reads no worked examples; leave --shots out, "
            "or use a language model"
        )
    return _read_shots(path, events)


def with_shots(
    model: LoadedModel, prompt: str | tuple[Message, ...], shots: Sequence[tuple[str, str]], raw: bool
) -> str | tuple[Message, ...]:
    """The prompt with worked examples before it: as turns of the conversation, or as plain text for `raw`."""
    if not shots:
        return prompt
    if raw or model.spec.kind != "decoder":
        if not isinstance(prompt, str):
            raise ConfigError("shots as plain text (raw) go with a text prompt, not with messages")
        return "".join(f"{question}\n{answer}\n\n" for question, answer in shots) + f"{prompt}\n"
    turns = [turn for question, answer in shots for turn in (Message("user", question), Message("assistant", answer))]
    own = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    head = [turn for turn in own if turn.role == "system"]
    return (*head, *turns, *(turn for turn in own if turn.role != "system"))


def writes(model: LoadedModel) -> bool:
    """Whether it writes text."""
    return model.spec.task in ("causal", "seq2seq")


def _read_shots(path: Path, events: Events) -> list[tuple[str, str]]:
    from luthier.data.load import Data, load_examples

    shots = []
    for example in load_examples(path, Data(train=str(path)), events):
        if isinstance(example, Pair):
            shots.append((example.source, example.target))
        elif isinstance(example, Labelled):
            shots.append((example.text, str(example.label)))
        elif isinstance(example, Chat) and [turn.role for turn in example.messages][-2:] == ["user", "assistant"]:
            shots.append((example.messages[-2].content, example.messages[-1].content))
        else:
            kind = "plain text" if isinstance(example, Text) else "a conversation of another form"
            raise DataError(f"{example.id}: a shot is a question with its answer, this is {kind}")
    return shots
