"""The model that another one learns from: what it is for, loaded and frozen, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.core.types import Chat, Example, Message, Pair
from luthier.engine.rollouts import roll_out
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.packed import packs
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel, ModelSpec, read_spec


def read_scorer(name: str) -> ModelSpec | None:
    """What a teacher that gives classes or numbers says of itself, before it is loaded; None for one that writes text.

    Raises ConfigError for a reward model, which reads conversations.
    """
    place = resolve_source(name)
    spec = read_spec(place) if isinstance(place, Path) else None
    if spec is None or spec.task not in ("classify", "regress"):
        return None
    if spec.learned == "reward":
        raise ConfigError(
            f"objective.teacher: {name} gives rewards for conversations; choose a classifier or a regressor"
        )
    return spec


def load_teacher(name: str, student: LoadedModel, device: torch.device, events: Events) -> LoadedModel:
    """The teacher for a student of the same task, frozen, in the student's precision, on `device`; its size is said."""
    task: Literal["causal", "seq2seq"] | None = None
    if student.spec.task in ("causal", "seq2seq"):
        task = student.spec.task  # type: ignore[assignment]
    teacher = load_model(
        name,
        task=task,
        dtype=student.spec.precision,
        device=str(device),
        truncate=student.renderer.truncate,
    )
    teacher.module.requires_grad_(False)
    if packs(teacher):
        fuse(teacher)
    weights = list(teacher.module.parameters())
    count, size = (sum(one.numel() for one in weights), sum(one.numel() * one.element_size() for one in weights))
    events.choose(
        "teacher",
        name,
        f"{count / 1e6:.1f} M parameters in {student.spec.precision}, frozen, {size / 2**20:.1f} MiB beside the student",
    )
    return teacher


def check_same_classes(name: str, teacher: ModelSpec, student: ModelSpec) -> None:
    """Raises ConfigError when the two do not tell the same classes apart; their order may differ."""
    apart = sorted(set(teacher.labels) ^ set(student.labels))
    if apart or teacher.multi_label != student.multi_label:
        what = f"{apart[0]!r} is a class of one alone" if apart else "one gives one class and the other several at once"
        raise ConfigError(f"objective.teacher: {name} and the student sort into other classes ({what})")


def check_same_tokens(name: str, teacher: LoadedModel, student: LoadedModel) -> None:
    """Raises ConfigError when the two do not give the same numbers to the same tokens."""
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    apart = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if apart:
        raise ConfigError(
            f"objective.teacher: {name} has another tokenizer than {student.spec.source} ({len(apart)} tokens differ, "
            f"{apart[0]!r} among them), so their distributions cannot be compared; choose a teacher of the same family"
        )


def write_answers(
    teacher: LoadedModel, examples: Sequence[Example], max_tokens: int, beams: int, events: Events
) -> list[Example]:
    """Pairs and conversations whose (last) answer is the teacher's: greedy, or the best of so many beams.

    Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947). Where the teacher says nothing the row keeps its
    own answer, and is counted. Raises DataError for a prompt that leaves no room.
    """
    prompts = []
    for example in examples:
        said, tools = _prompt_of(example)
        try:
            prompts.append(teacher.renderer.prompt(said, tools))
        except DataError as err:
            raise DataError(f"{example.id}: {err}") from None
    events.stage(f"writing {len(prompts)} answers with the teacher")
    written: list[Example] = []
    silent = 0
    for example, ids in zip(examples, roll_out(teacher, prompts, max_tokens, beams=beams)):
        ids = ids[:-1] if ids[-1] in teacher.spec.stop_ids else ids
        text = teacher.renderer.decode(ids).strip()
        silent += not text
        written.append(_with_answer(example, text) if text else example)
    if silent:
        events.warn("prompts to which the teacher says nothing, so that the rows keep their own answers", silent)
    return written


def _prompt_of(example: Example) -> tuple[str | tuple[Message, ...], tuple[dict[str, object], ...]]:
    if isinstance(example, Pair):
        return example.source, ()
    assert isinstance(example, Chat)
    return example.messages[: _last_answer(example)], example.tools


def _with_answer(example: Example, text: str) -> Example:
    if isinstance(example, Pair):
        return replace(example, target=text)
    assert isinstance(example, Chat)
    last = _last_answer(example)
    answer = replace(example.messages[last], content=text, tool_calls=())
    return replace(example, messages=(*example.messages[:last], answer))


def _last_answer(example: Chat) -> int:
    return max(at for at, message in enumerate(example.messages) if message.role == "assistant")
