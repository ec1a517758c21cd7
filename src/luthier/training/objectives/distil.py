"""Learn from another model: its whole distribution over each next token, not the one token that came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Chat, Encoded, Example, Pair, Text
from luthier.data.batches import Batch
from luthier.engine.rollouts import numbers_for, roll_out
from luthier.models.divergence import Aim, divergence_loss
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.output import head_of
from luthier.models.packed import packs
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.causal import supervised
from luthier.training.objectives.part import Loss, Objective, Tally, Total, alone
from luthier.training.objectives.pretrain import Pretrain
from luthier.training.objectives.sft import SFT


@dataclass(frozen=True, slots=True)
class Written(Encoded):
    """A row whose answer the student wrote."""

    answer_tokens: int = 0
    finished: bool = True


class Distil(Objective):
    """A student comes near to a teacher's distribution on the tokens that `sft` or `pretrain` would learn.

    The loss of a token is (1 - hard) x temperature^2 x divergence + hard x cross-entropy (Hinton et al. 2015,
    arXiv:1503.02531). Forward KL covers all that the teacher may say; reverse KL (MiniLLM, arXiv:2306.08543) keeps to
    what it is likely to say; jsd lies between (GKD, arXiv:2306.13649). With `on_policy` that share of the rows of each
    step is learned on answers that the student writes at temperature 1, so that it is taught where its own answers lead
    it; as in GKD no gradient goes through the writing (MiniLLM's policy gradient is left out). Teacher and student
    share a tokenizer; rows of padding that one of their heads has more than the other are left out of both.
    """

    kind: ClassVar[str] = "distil"
    wants: ClassVar[tuple[type, ...]] = (Text, Chat, Pair)

    teacher: str
    """The model to learn from: a shipped model, run:<id>, a directory, or a hub id."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Distance between the two distributions."""
    beta: float | None = Field(None, gt=0, lt=1)
    """Where jsd lies between forward KL (near 0) and reverse KL (near 1); 0.5 unless it is set."""
    temperature: float = Field(1.0, gt=0)
    """How much both distributions are flattened before they are compared."""
    hard: float = Field(0.0, ge=0, lt=1)
    """Share of ordinary cross-entropy on the rows' own tokens."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """Share of rows learned on answers that the student writes."""
    max_tokens: int = Field(128, gt=0)
    """Most tokens of an answer that the student writes."""
    _teacher: LoadedModel | None = PrivateAttr(None)
    _form: Pretrain | SFT = PrivateAttr(default_factory=SFT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta belongs to jsd and has no effect on {self.divergence}; set divergence: jsd")
        if self.hard and self.on_policy:
            raise ValueError(
                "hard is learned from the rows' own answers, on_policy from the student's; choose one of the two"
            )
        return self

    def check_model(self, spec: ModelSpec) -> None:
        if spec.task != "causal":
            raise ConfigError(
                f"objective 'distil' needs a decoder-only model that writes text; {spec.source} ({spec.kind}, {spec.task}) "
                "does not: use another model"
            )

    def learned(self) -> str:
        return self._form.kind

    def prepare(self, train: Sequence[Example], events: Events) -> Objective:
        """A copy that learns what `pretrain` would of plain text, and else what `sft` would."""
        if self.on_policy and isinstance(train[0], Text):
            raise ConfigError(
                "objective.on_policy: plain text has no prompt to answer; use conversations or pairs, or set on_policy: 0"
            )
        copy = self.model_copy()
        copy._form = Pretrain() if isinstance(train[0], Text) else SFT()
        return copy

    def ready(self, model: LoadedModel, events: Events) -> None:
        teacher = load_model(self.teacher, task="causal", dtype=model.spec.precision, device=str(model.device))
        check_same_tokens(self.teacher, teacher, model)
        if teacher.spec.max_length < model.spec.max_length:
            raise ConfigError(
                f"objective.teacher: {self.teacher} reads {teacher.spec.max_length} tokens, and rows may have "
                f"{model.spec.max_length}; set max_length: {teacher.spec.max_length}"
            )
        teacher.module.requires_grad_(False)
        if packs(teacher):
            fuse(teacher)
        weights = list(teacher.module.parameters())
        count, size = (sum(one.numel() for one in weights), sum(one.numel() * one.element_size() for one in weights))
        events.choose(
            "teacher",
            self.teacher,
            f"{count / 1e6:.1f} M parameters in {model.spec.precision}, frozen, {size / 2**20:.1f} MiB beside the student",
        )
        self._teacher = teacher

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        return self._form.encode(examples, model, events)

    @property
    def draws(self) -> bool:
        return self.on_policy > 0

    def draw(
        self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...], total: Total = alone
    ) -> Sequence[Encoded]:
        if not self.on_policy:
            return rows
        # The first number of a row says whether the student writes, the others what.
        numbers = [numbers_for(seed, row.id, 0, self.max_tokens + 1) for row in rows]
        chosen = [at for at, (first, *_) in enumerate(numbers) if first < self.on_policy]
        if not chosen:
            return rows
        starts = [_last_answer(rows[at]) for at in chosen]
        prompts = [rows[at].ids[:start] for at, start in zip(chosen, starts)]
        numbers_SM = np.stack([numbers[at][1:] for at in chosen])
        drawn = list(rows)
        for at, prompt, ids in zip(chosen, prompts, roll_out(model, prompts, self.max_tokens, numbers_SM=numbers_SM)):
            weights = (0.0,) * len(prompt) + (rows[at].weights[len(prompt)],) * len(ids)
            finished = ids[-1] in model.spec.stop_ids
            drawn[at] = Written(rows[at].id, (*prompt, *ids), weights, answer_tokens=len(ids), finished=finished)
        return drawn

    def tally(self, rows: Sequence[Encoded]) -> Tally:
        written = [row for row in rows if isinstance(row, Written)]
        if not written:
            return {}
        return {
            "answer_tokens": (sum(row.answer_tokens for row in written), len(written)),
            "stopped": (sum(row.finished for row in written), len(written)),
        }

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        assert self._teacher is not None  # ready() comes first
        states_ME, target_M, weight_M = supervised(model, batch)
        with torch.no_grad():
            taught_MD, _, _ = supervised(self._teacher, batch)
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, 0.5 if self.beta is None else self.beta)
        aim = Aim(beta, self.temperature, self.hard)
        heads = head_of(model), head_of(self._teacher)
        return Loss(
            divergence_loss(heads[0], states_ME, heads[1], taught_MD, target_M, weight_M, aim), batch.weight
        ), None


def check_same_tokens(name: str, teacher: LoadedModel, student: LoadedModel) -> None:
    """Raises ConfigError when the two do not give the same numbers to the same tokens."""
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    apart = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if apart:
        raise ConfigError(
            f"objective.teacher: {name} has another tokenizer than {student.spec.source} ({len(apart)} tokens differ, "
            f"{apart[0]!r} among them), so their distributions cannot be compared; choose a teacher of the same family"
        )


def _last_answer(row: Encoded) -> int:
    """Where the last run of learned tokens begins."""
    at = max(place for place, weight in enumerate(row.weights) if weight)
    while at and row.weights[at - 1]:
        at -= 1
    return at
