"""Always the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from luthier.core.types import Example, Prediction
from luthier.evals.baselines.part import Baseline, input_of, labelled


class Mean(Baseline):
    """Says the mean number of the training rows."""

    kind: ClassVar[str] = "mean"

    def predict(self, train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
        numbers = [float(row.label) for row in labelled(train)]  # type: ignore[arg-type]
        value = sum(numbers) / len(numbers)
        return [Prediction(row.id, value, row.label, input=input_of(row)) for row in labelled(test)]
