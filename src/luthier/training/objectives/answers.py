"""What objectives on liked and disliked answers share: how rows are encoded, what a model says of them at the start, and
how pairs are compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Feedback, Preference
from luthier.data.batches import Batch, collate
from luthier.engine.answers import answer_logs, encode_answers, score_answers
from luthier.models.facts import fingerprint
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.part import Loss, Objective, encode_rows


class Compare(Objective):
    """A chosen and a rejected answer, whose log-probabilities make the loss of a row: DPO and its kin.

    A row's loss is one term, times its weight, so how rows are split into micro-batches changes nothing.
    """

    wants: ClassVar[tuple[type, ...]] = (Preference,)
    metric: ClassVar[tuple[str, int]] = ("preference_accuracy", +1)

    def check_model(self, spec: ModelSpec) -> None:
        check_writes(self.kind, spec)

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        return encode_rows(examples, lambda one: encode_row(model, one), events, renderer=model.renderer)

    def batch(self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...]) -> Batch:
        batch = batch_answers(rows)
        if batch.gold is None:
            batch.gold = torch.zeros(len(rows), 2)
        return batch

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        logs_R2, sizes_R2 = answer_logs(model, batch)
        assert batch.gold is not None and batch.row_weights_S is not None
        loss_R = self.losses(logs_R2, sizes_R2, batch.gold)
        rewards_R2 = self.rewards(logs_R2.detach(), sizes_R2, batch.gold)
        return Loss((loss_R * batch.row_weights_S).sum(), batch.weight), rewards_R2

    def losses(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        """[R] from log p of (chosen, rejected), their tokens, and log p at the start where the objective refers to it."""
        raise NotImplementedError(f"{type(self).__name__} must define losses()")

    def rewards(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        """[R, 2]: what the model, as this objective reads it, gives the two answers."""
        raise NotImplementedError(f"{type(self).__name__} must define rewards()")

    def metrics(self, scores: Tensor, gold: Tensor, model: LoadedModel) -> dict[str, float]:
        return compare_metrics(scores)


def check_writes(kind: str, spec: ModelSpec) -> None:
    """Raises ConfigError for a model that does not write text, or not as a decoder."""
    if spec.task != "causal":
        raise ConfigError(
            f"objective {kind!r} needs a decoder-only model that writes text; {spec.source} ({spec.kind}, {spec.task}) "
            "does not: use another model"
        )


def encode_row(model: LoadedModel, example: Preference | Feedback) -> Encoded:
    """An example with the weight of its row, which scales the loss and not the log-probabilities."""
    return replace(encode_answers(model, example), weight=float(example.meta.get("weight", 1.0)))


def batch_answers(rows: Sequence[Encoded]) -> Batch:
    """Rows end to end; token weights stay as they are, row weights stand beside them and are what the batch weighs."""
    batch = collate([replace(row, weight=1.0) for row in rows])
    batch.row_weights_S = torch.tensor([row.weight for row in rows], dtype=torch.float32)
    batch.weight = float(batch.row_weights_S.sum(dtype=torch.float64))
    return batch


def compare_metrics(rewards_R2: Tensor) -> dict[str, float]:
    """How often the chosen answer gets strictly more, by how much on average, and what each gets."""
    chosen_R, rejected_R = rewards_R2.double().unbind(1)
    return {
        "preference_accuracy": float((chosen_R > rejected_R).double().mean()),
        "reward_margin": float((chosen_R - rejected_R).mean()),
        "chosen_reward": float(chosen_R.mean()),
        "rejected_reward": float(rejected_R.mean()),
    }


def refer_to_start(rows: Sequence[Encoded], model: LoadedModel, events: Events, keep: Path) -> NDArray[np.float64]:
    """[N, A]: log p of each answer under the model as it is now, before the first step: the reference of DPO and KTO.

    One pass with dropout off. For an adapter that starts at nothing this is the base, for one that is trained further
    the model with it, for full tuning the model: no second model is held. Kept in `keep` under a digest of the rows and
    the weights, so that a resumed run reads the same numbers.
    """
    if not rows:
        return np.empty((0, 0))
    digest = hashlib.sha256(f"{fingerprint(model.network)} {model.network.dtype}".encode())
    for row in rows:
        digest.update(repr((row.ids, row.weights, row.segments)).encode())
    path = keep / f"{digest.hexdigest()[:32]}.npy"
    try:
        known = np.load(path)
        if len(known) == len(rows):
            return known  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError):
        pass  # not there, or not whole: made anew

    def tell(done: int, total: int) -> None:
        events.emit("progress", name="reference", done=done, total=total)

    events.stage(f"reading {len(rows)} rows with the model as it starts")
    found_NA = score_answers(model, rows, on_progress=tell)[..., 0]
    keep.mkdir(parents=True, exist_ok=True)
    side = path.with_suffix(".part")
    with open(side, "wb") as file:
        np.save(file, found_NA)
        file.flush()
        os.fsync(file.fileno())
    side.rename(path)
    return found_NA
