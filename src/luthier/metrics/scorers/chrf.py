"""chrF, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from luthier.core.types import Estimate
from luthier.metrics.scorers.part import Scorer
from luthier.metrics.statistics import as_floats, mean


class Chrf(Scorer):
    """Corpus chrF from 0 to 100 (Popovic 2015): F-score of character n-grams. Good for every script.

    The interval is that of the mean of sentence scores, moved to the corpus value.
    """

    kind: ClassVar[str] = "chrf"
    best: ClassVar[float] = 100.0

    word_order: int = Field(0, ge=0)
    """Word n-grams counted too; 2 is chrF++."""

    def score(self, output: str, gold: str) -> float:
        return float(self._metric().sentence_score(output, [gold]).score)

    def estimate(self, outputs: Sequence[str], golds: Sequence[str]) -> dict[str, Estimate]:
        metric = self._metric()
        corpus = float(metric.corpus_score(list(outputs), [list(golds)]).score)
        each = mean(as_floats([metric.sentence_score(one, [other]).score for one, other in zip(outputs, golds)]))
        shift = corpus - each.value
        low, high = np.clip([each.low + shift, each.high + shift], 0, 100)
        return {self.kind: Estimate(corpus, float(low), float(high), each.n, f"{each.method} of sentence scores")}

    def _metric(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF(word_order=self.word_order)
