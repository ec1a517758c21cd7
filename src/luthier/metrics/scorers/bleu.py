"""BLEU, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from luthier.core.types import Estimate
from luthier.metrics.scorers.part import Scorer, is_chinese
from luthier.metrics.statistics import Floats, bootstrap


class Bleu(Scorer):
    """Corpus BLEU from 0 to 100 (Papineni et al. 2002; Post 2018), with a bootstrap interval over sentences.

    `tokenize: auto` is sacrebleu's 13a, or zh where the golds are mostly Chinese; the method says which.
    """

    kind: ClassVar[str] = "bleu"
    best: ClassVar[float] = 100.0

    tokenize: Literal["auto", "13a", "zh", "char", "none"] = "auto"
    """sacrebleu's tokenizer."""

    def score(self, output: str, gold: str) -> float:
        """Sentence BLEU with effective order: n-grams longer than the sentence do not count against it."""
        return float(self._metric([gold]).sentence_score(output, [gold]).score)

    def estimate(self, outputs: Sequence[str], golds: Sequence[str]) -> dict[str, Estimate]:
        metric = self._metric(golds)
        rows = []
        for one, other in zip(outputs, golds):
            found = metric.sentence_score(one, [other])
            rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
        found = bootstrap(np.array(rows, dtype=np.float64), _bleu)
        return {
            self.kind: Estimate(
                found.value, found.low, found.high, found.n, f"{found.method}, tokenize {self._choose(golds)}"
            )
        }

    def _choose(self, golds: Sequence[str]) -> str:
        return ("zh" if is_chinese(golds) else "13a") if self.tokenize == "auto" else self.tokenize

    def _metric(self, golds: Sequence[str]) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(tokenize=self._choose(golds), effective_order=True)


def _bleu(sums: Floats) -> Floats:
    """BLEU of summed counts [R, 10]: four matches, four totals, both lengths; exponential smoothing as in sacrebleu."""
    values = []
    for row in sums:
        matches, totals, said, meant = row[:4], row[4:8], row[8], row[9]
        logs, smooth = [], 1.0
        for match, total in zip(matches, totals):
            if total == 0:
                break
            if match == 0:
                smooth *= 2
            logs.append(np.log((match if match > 0 else 1 / smooth) / total))
        if said == 0 or not matches.any() or len(logs) < 4:
            values.append(0.0)
            continue
        brevity = 1.0 if said >= meant else np.exp(1 - meant / said)
        values.append(100 * brevity * float(np.exp(np.mean(logs))))
    return np.array(values)
