"""Always the commonest class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from luthier.core.types import Example, Prediction
from luthier.evals.baselines.part import Baseline, input_of, labelled


class Majority(Baseline):
    """Says the commonest label of the training rows, with their shares as probabilities.

    Where rows hold several labels it says each that more than half of the rows hold, or the commonest one.
    """

    kind: ClassVar[str] = "majority"

    def predict(self, train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
        rows = labelled(train)
        several = any(isinstance(row.label, tuple) for row in rows)
        counts: Counter[str] = Counter()
        for row in rows:
            counts.update(row.label if isinstance(row.label, tuple) else (str(row.label),))
        shares = {label: count / len(rows) for label, count in counts.items()}
        commonest = counts.most_common(1)[0][0]
        usual = tuple(label for label, share in shares.items() if share > 0.5) or (commonest,)
        output = usual if several else commonest
        return [Prediction(row.id, output, row.label, shares, input=input_of(row)) for row in labelled(test)]
