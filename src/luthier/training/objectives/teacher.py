"""The model that another one learns from: what it is for, loaded and frozen, and what it writes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.core.types import Chat, Encoded, Example, Pair, last_answer, prompt_of
from luthier.engine.rollouts import roll_out
from luthier.models.facts import fingerprint
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.packed import packs
from luthier.models.quantised.linear import sample
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel, ModelSpec, read_spec
from luthier.training.encoded import tokenizer_fingerprint


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
        task = student.spec.task
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


@torch.no_grad()
def teacher_fingerprint(teacher: LoadedModel) -> str:
    """A name for all that decides what a teacher says: its weights and head (by samples), the precision it computes in,
    its spec (classes, unit, template, context), its configuration and its tokenizer."""
    module, network = teacher.module, teacher.network
    written = getattr(module, "generation_config", None)
    digest = hashlib.sha256(teacher.spec.model_dump_json().encode())
    digest.update(f"{network.dtype}{network.config.to_json_string()}".encode())
    digest.update(b"" if written is None else written.to_json_string().encode())
    digest.update(f"{tokenizer_fingerprint(teacher.tokenizer)}{fingerprint(network)}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample(tensor))
    return digest.hexdigest()


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
) -> tuple[list[Example], set[int]]:
    """Pairs and conversations whose (last) answer is the teacher's: greedy, or the best of so many beams; and the places
    of those that were cut before the teacher ended them.

    Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947). Where the teacher says nothing the row keeps its
    own answer. Both are counted. Raises DataError for a prompt that leaves no room.
    """
    prompts = []
    for example in examples:
        said, tools = prompt_of(example)
        try:
            prompts.append(teacher.renderer.prompt(said, tools))
        except DataError as err:
            raise DataError(f"{example.id}: {err}") from None
    events.stage(f"writing {len(prompts)} answers with the teacher")
    written: list[Example] = []
    cut: set[int] = set()
    silent = 0
    for at, (example, ids) in enumerate(zip(examples, roll_out(teacher, prompts, max_tokens, beams=beams))):
        ended = ids[-1] in teacher.spec.stop_ids
        text = teacher.renderer.decode(ids[:-1] if ended else ids).strip()
        if not text:
            silent += 1
            written.append(example)
            continue
        written.append(_with_answer(example, text))
        if not ended:
            cut.add(at)
    if silent:
        events.warn("prompts to which the teacher says nothing, so that the rows keep their own answers", silent)
    if cut:
        events.warn(
            "answers of the teacher that reach max_tokens, or the end of its context, without an end of their own; they do "
            "not teach the student to stop",
            len(cut),
        )
    return written, cut


def leave_open(row: Encoded, stop_ids: Sequence[int]) -> Encoded:
    """The row with the token that ends its last answer unlearned; unchanged where that token was cut off."""
    ids, weights = (row.target, row.target_weights) if row.target else (row.ids, row.weights)
    last = max((at for at, token in enumerate(ids) if token in stop_ids), default=len(ids))
    if any(weights[last + 1 :]):
        return row
    weights = (*weights[:last], *(0.0 for _ in weights[last:]))
    return replace(row, target_weights=weights) if row.target else replace(row, weights=weights)


def _with_answer(example: Example, text: str) -> Example:
    if isinstance(example, Pair):
        return replace(example, target=text)
    assert isinstance(example, Chat)
    last = last_answer(example)
    answer = replace(example.messages[last], content=text, tool_calls=())
    return replace(example, messages=(*example.messages[:last], answer))
