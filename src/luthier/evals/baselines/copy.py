"""The source as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from luthier.core.types import Example, Pair, Prediction
from luthier.evals.baselines.part import Baseline


class Copy(Baseline):
    """Hands back the source: what an untranslated text or the text itself as its summary would score."""

    kind: ClassVar[str] = "copy"

    def predict(self, train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
        return [Prediction(row.id, row.source, row.target, input=row.source) for row in test if isinstance(row, Pair)]
