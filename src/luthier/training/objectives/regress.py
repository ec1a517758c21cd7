"""Learn to give a text a number: a score, a price, a similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Labelled, Task
from luthier.data.batches import Batch
from luthier.engine.pooler import score_batch
from luthier.models.spec import LoadedModel
from luthier.training.losses import LOSSES
from luthier.training.losses.part import Loss as RowLoss
from luthier.training.objectives.part import Loss, Objective, encode_rows


class Regress(Objective):
    """One number from one pooled vector.

    Gold is standardised for training (mean and scale of the training rows, kept with the model), so learning rates
    and Huber's delta mean the same whatever the unit; predictions come back in the unit of the data.
    """

    kind: ClassVar[str] = "regress"
    wants: ClassVar[tuple[type, ...]] = (Labelled,)
    task: ClassVar[Task | None] = "regress"
    metric: ClassVar[tuple[str, int]] = ("spearman", +1)

    loss: LOSSES.field_or_auto = "auto"  # type: ignore[name-defined]
    """How wrong a row is: mse, mae, huber (delta), or auto."""

    def prepare(self, train: Sequence[Example], events: Events) -> Regress:
        gold = read_numbers(self, train)
        loss: RowLoss | str = self.loss
        if float(gold.std()) == 0:
            raise DataError(f"all {len(gold)} training rows have the score {gold[0]:g}; there is nothing to learn")
        if loss == "auto":
            far = float((abs(gold - gold.mean()) > 3 * gold.std()).mean())
            loss = LOSSES.parse("huber" if far > 0.01 else "mse")
            events.choose(
                "loss", loss.kind, f"{far:.1%} of the scores lie more than 3 standard deviations from the mean"
            )
        if not isinstance(loss, RowLoss) or loss.fits != "numbers":
            raise ConfigError(
                f"objective.loss: {getattr(loss, 'kind', loss)!r} is for classes; numbers take 'mse', 'mae' or 'huber'"
            )
        return self.model_copy(update={"loss": loss})

    def adapt(self, model: LoadedModel, train: Sequence[Example]) -> None:
        gold = read_numbers(self, train)
        update = {"target_mean": float(gold.mean()), "target_scale": float(gold.std())}
        model.spec = model.spec.model_copy(update=update)

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        read_numbers(self, examples)
        mean, scale = model.spec.target_mean, model.spec.target_scale

        def encode(example: Labelled) -> Encoded:
            row = model.renderer.labelled(example.text, example.pair, id=example.id)
            gold = (float(example.label) - mean) / scale  # type: ignore[arg-type]
            return replace(row, id=example.id, weights=(), gold=gold, weight=float(example.meta.get("weight", 1.0)))

        return encode_rows(examples, encode, events, renderer=model.renderer)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        scores_S1 = score_batch(model, batch)
        assert isinstance(self.loss, RowLoss) and batch.row_weights_S is not None and batch.gold is not None
        return Loss((self.loss.rows(scores_S1, batch.gold) * batch.row_weights_S).sum(), batch.weight), scores_S1

    def metrics(self, scores: Tensor, gold: Tensor, model: LoadedModel) -> dict[str, float]:
        from scipy.stats import spearmanr

        guess_N, gold_N = scores.squeeze(-1).double(), gold.double()
        found = {"mse": float(((guess_N - gold_N) ** 2).mean()) * model.spec.target_scale**2}
        if len(guess_N) > 1 and guess_N.max() > guess_N.min() and gold_N.max() > gold_N.min():
            found["spearman"] = float(spearmanr(guess_N.numpy(), gold_N.numpy()).statistic)
        return found


def read_numbers(objective: Regress, examples: Sequence[Example]) -> np.ndarray:
    """Gold of every row as floats. Raises DataError for a row whose gold is no number."""
    objective.check_examples(examples)
    numbers = []
    for example in examples:
        assert isinstance(example, Labelled)
        if not isinstance(example.label, float):
            raise DataError(
                f"{example.id}: objective 'regress' needs a number, found the label {example.label!r}; "
                "use 'classify', or name the number's column with columns.score"
            )
        numbers.append(example.label)
    return np.array(numbers)
