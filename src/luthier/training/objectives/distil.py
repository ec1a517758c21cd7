"""Learn from another model: its whole distribution over each next token or class, not the one that came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.core.types import Chat, Encoded, Example, Labelled, Pair, Text
from luthier.data.batches import Batch
from luthier.engine.likelihood import target_states
from luthier.engine.pooler import score_batch
from luthier.engine.rollouts import numbers_for, roll_out
from luthier.models.cross_entropy import token_loss
from luthier.models.divergence import Aim, divergence_loss
from luthier.models.load import read_kind
from luthier.models.output import head_of
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.causal import supervised
from luthier.training.objectives.classify import Classify, label_names
from luthier.training.objectives.part import Loss, Objective, Tally, Total, alone
from luthier.training.objectives.pretrain import Pretrain
from luthier.training.objectives.regress import Regress
from luthier.training.objectives.scores import encode_taught, taught_losses, taught_metrics
from luthier.training.objectives.seq2seq import Seq2Seq
from luthier.training.objectives.sft import SFT
from luthier.training.objectives.teacher import (
    check_same_classes,
    check_same_tokens,
    leave_open,
    load_teacher,
    read_scorer,
    teacher_fingerprint,
    write_answers,
)


@dataclass(frozen=True, slots=True)
class Written(Encoded):
    """A row whose answer the student wrote."""

    answer_tokens: int = 0
    finished: bool = True


class Distil(Objective):
    """A student comes near to a teacher on the tokens that `pretrain`, `sft` or `seq2seq` would learn, or on the classes and
    numbers of `classify` and `regress`.

    The loss of a token, or of a row's classes, is (1 - hard) x temperature^2 x divergence + hard x cross-entropy (Hinton
    et al. 2015, arXiv:1503.02531). Forward KL covers all that the teacher may say; reverse KL (MiniLLM, arXiv:2306.08543)
    keeps to what it is likely to say; jsd lies between (GKD, arXiv:2306.13649). With `on_policy` that share of the rows of
    each step is learned on answers that the student writes at temperature 1, so that it is taught where its own answers
    lead it; as in GKD no gradient goes through the writing (MiniLLM's policy gradient is left out). Teacher and student
    share a tokenizer; rows of padding that one of their heads has more than the other are left out of both. With `answers:
    teacher` the answers are those that the teacher writes (Kim and Rush 2016, arXiv:1606.07947); at hard 1 they are all
    that is learned, and the tokenizers may differ.

    A teacher tuned with `classify` or `regress` reads each row once, before the first step, in its own tokens: any
    classifier can teach any other. Rows are labelled, or plain text, which is learned from the teacher alone. Classes are
    matched by name; numbers are learned by squared error, in the teacher's standardised unit.
    """

    kind: ClassVar[str] = "distil"
    wants: ClassVar[tuple[type, ...]] = (Text, Chat, Pair, Labelled)

    teacher: str
    """The model to learn from: a shipped model, run:<id>, a directory, or a hub id."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Distance between the two distributions."""
    beta: float | None = Field(None, gt=0, lt=1)
    """Where jsd lies between forward KL (near 0) and reverse KL (near 1); 0.5 unless it is set."""
    temperature: float = Field(1.0, gt=0)
    """How much both distributions are flattened before they are compared."""
    hard: float = Field(0.0, ge=0, le=1)
    """Share of ordinary cross-entropy on the answers' own tokens, or on the labels of rows that have one."""
    answers: Literal["rows", "teacher"] = "rows"
    """Which answers are learned: those of the rows, or what the teacher writes to their prompts (sequence-level)."""
    beams: int = Field(1, gt=0)
    """Beams with which the teacher writes."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """Share of rows learned on answers that the student writes."""
    max_tokens: int = Field(128, gt=0)
    """Most tokens of an answer that is written."""
    _teacher: LoadedModel | None = PrivateAttr(None)
    _form: Pretrain | SFT | Seq2Seq | Classify | Regress = PrivateAttr(default_factory=SFT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta belongs to jsd and has no effect on {self.divergence}; set divergence: jsd")
        if self.hard and self.on_policy:
            raise ValueError(
                "hard is learned from the rows' own answers, on_policy from the student's; choose one of the two"
            )
        if self.hard == 1 and self.answers == "rows":
            raise ValueError("hard: 1 learns nothing from the teacher; set less, or answers: teacher")
        if self.beams > 1 and self.answers == "rows":
            raise ValueError("beams are for answers that the teacher writes; set answers: teacher")
        return self

    def check_model(self, spec: ModelSpec) -> None:
        if self._scores or (isinstance(self._form, Seq2Seq) and spec.task == "seq2seq"):
            return
        if isinstance(self._form, Seq2Seq):
            raise ConfigError(
                f"objective.teacher: {self.teacher} is an encoder-decoder, and {spec.source} ({spec.kind}, {spec.task}) is "
                "none; choose a teacher and a student of one kind"
            )
        if spec.task != "causal":
            raise ConfigError(
                f"objective 'distil' needs a decoder-only model that writes text; {spec.source} ({spec.kind}, {spec.task}) "
                "does not: use another model"
            )

    def learned(self) -> str:
        return self._form.kind

    def load_options(self, train: Sequence[Example]) -> dict[str, Any]:
        scorer = read_scorer(self.teacher)
        if scorer is None:
            return {"task": None}
        if scorer.task == "regress":
            return {"task": "regress"}
        return {"task": "classify", "labels": label_names(scorer.labels), "multi_label": scorer.multi_label}

    def prepare(self, train: Sequence[Example], events: Events) -> Objective:
        """A copy that learns what `classify` or `regress` would where the teacher does; else what `seq2seq` would of an
        encoder-decoder, what `pretrain` would of plain text, and else what `sft` would."""
        copy = self.model_copy()
        copy._form = self._choose_form(train)
        if self.on_policy and isinstance(train[0], Text) and not copy._scores:
            raise ConfigError(
                "objective.on_policy: plain text has no prompt to answer; use conversations or pairs, or set on_policy: 0"
            )
        if self.on_policy and not isinstance(copy._form, SFT):
            raise ConfigError(
                f"objective.on_policy: the student writes answers where it learns what 'sft' does, not {copy._form.kind!r}; "
                "set on_policy: 0"
            )
        if self.answers == "teacher" and not isinstance(copy._form, SFT | Seq2Seq):
            raise ConfigError(
                "objective.answers: the rows hold no prompts that the teacher could answer; use conversations or pairs, or "
                "set answers: rows"
            )
        if isinstance(copy._form, Regress) and (self.temperature != 1 or self.divergence != "forward_kl"):
            raise ConfigError(
                f"objective.teacher: {self.teacher} gives numbers, which have no distribution; leave out temperature, "
                "divergence and beta"
            )
        return copy

    def ready(self, model: LoadedModel, device: torch.device, events: Events) -> None:
        teacher = load_teacher(self.teacher, model, device, events)
        if self._scores:
            check_same_classes(self.teacher, teacher.spec, model.spec)
            unit = {"target_mean": teacher.spec.target_mean, "target_scale": teacher.spec.target_scale}
            model.spec = model.spec.model_copy(update=unit)
        elif self.hard < 1:
            check_same_tokens(self.teacher, teacher, model)
            if teacher.spec.max_length < model.spec.max_length:
                raise ConfigError(
                    f"objective.teacher: {self.teacher} reads {teacher.spec.max_length} tokens, and rows may have "
                    f"{model.spec.max_length}; set max_length: {teacher.spec.max_length}"
                )
        self._teacher = teacher

    def companions(self) -> Sequence[LoadedModel]:
        return () if self._teacher is None else (self._teacher,)

    def beside(self) -> str:
        asked = self._scores or self.answers == "teacher"
        return teacher_fingerprint(self._teacher) if self._teacher is not None and asked else ""

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        if self._scores:
            assert self._teacher is not None  # ready() comes first
            return encode_taught(examples, model, self._teacher, self.teacher, events)
        if self.answers == "teacher":
            assert self._teacher is not None
            examples, cut = write_answers(self._teacher, examples, self.max_tokens, self.beams, events)
            rows = self._form.encode(examples, model, events)
            stops = model.renderer.stop_ids
            return [leave_open(row, stops) if at in cut else row for at, row in enumerate(rows)]
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

    def stand_in(self, rows: Sequence[Encoded], model: LoadedModel) -> Sequence[Encoded]:
        """The rows with the longest answers that the student may write, where these are longer."""
        if not self.on_policy:
            return rows
        found = []
        for row in rows:
            start = _last_answer(row)
            room = min(self.max_tokens, model.spec.max_length - start) - (len(row.ids) - start)
            more = max(0, room)
            found.append(replace(row, ids=row.ids + row.ids[-1:] * more, weights=row.weights + (1.0,) * more))
        return found

    def prompts(self, rows: Sequence[Encoded]) -> tuple[Sequence[int], int]:
        return ([_last_answer(row) for row in rows], self.max_tokens) if self.on_policy else ((), 0)

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
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, 0.5 if self.beta is None else self.beta)
        aim = Aim(beta, self.temperature, self.hard)
        if self._scores:
            assert batch.gold is not None and batch.row_weights_S is not None
            scores_SC = score_batch(model, batch)
            losses_S = taught_losses(scores_SC, batch.gold, aim, model)
            return Loss((losses_S * batch.row_weights_S).sum(), batch.weight), scores_SC
        states_ME, target_M, weight_M = self._supervised(model, batch)
        if self.hard == 1:
            return Loss(token_loss(head_of(model), states_ME, target_M, weight_M), batch.weight), None
        with torch.no_grad():
            taught_MD, _, _ = self._supervised(self._teacher, batch)
        heads = head_of(model), head_of(self._teacher)
        return Loss(
            divergence_loss(heads[0], states_ME, heads[1], taught_MD, target_M, weight_M, aim), batch.weight
        ), None

    def metrics(self, scores: Tensor, gold: Tensor, model: LoadedModel) -> dict[str, float]:
        return taught_metrics(scores, gold, model)

    @property
    def _scores(self) -> bool:
        """Whether scores are taught, not tokens."""
        return isinstance(self._form, Classify | Regress)

    def _supervised(self, model: LoadedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        if batch.target_M is None or batch.target_weights_M is None:
            return supervised(model, batch)
        return target_states(model, batch), batch.target_M, batch.target_weights_M

    def _choose_form(self, train: Sequence[Example]) -> Pretrain | SFT | Seq2Seq | Classify | Regress:
        scorer = read_scorer(self.teacher)
        other = next((one for one in train if isinstance(one, Labelled | Text) != (scorer is not None)), None)
        if scorer is not None:
            if other is not None:
                raise DataError(
                    f"{other.id}: the teacher {self.teacher} gives classes or numbers to texts, and this is a "
                    f"{type(other).__name__}; use labelled rows or plain text, or a teacher that writes"
                )
            return Classify() if scorer.task == "classify" else Regress()
        labelled = next((one for one in train if isinstance(one, Labelled)), None)
        if labelled is not None:
            raise DataError(
                f"{labelled.id}: labelled rows are learned from a teacher tuned with 'classify' or 'regress', which "
                f"{self.teacher} is not; choose another teacher"
            )
        if read_kind(self.teacher) == "encoder-decoder":
            return Seq2Seq()
        return Pretrain() if isinstance(train[0], Text) else SFT()


def _last_answer(row: Encoded) -> int:
    """Where the last run of learned tokens begins."""
    at = max(place for place, weight in enumerate(row.weights) if weight)
    while at and row.weights[at - 1]:
        at -= 1
    return at
