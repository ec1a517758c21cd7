"""ROUGE, by rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from luthier.core.types import Estimate
from luthier.metrics.scorers.part import HAN, Scorer
from luthier.metrics.statistics import as_floats, mean

TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge(Scorer):
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), the mean over texts.

    Deviation: Chinese characters are words of their own; rouge-score itself drops everything that is not a Latin
    letter or a digit, and would score every Chinese text 0.
    """

    kind: ClassVar[str] = "rouge"

    stem: bool = False
    """Compare English words by their stems (Porter)."""

    def score(self, output: str, gold: str) -> float:
        """ROUGE-L of one text."""
        return float(self._scorer().score(gold, output)["rougeL"].fmeasure)

    def estimate(self, outputs: Sequence[str], golds: Sequence[str]) -> dict[str, Estimate]:
        scorer = self._scorer()
        found = [scorer.score(other, one) for one, other in zip(outputs, golds)]
        return {name: mean(as_floats([one[name].fmeasure for one in found])) for name in TYPES}

    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        class Words(DefaultTokenizer):  # type: ignore[misc]
            def tokenize(self, text: str) -> list[str]:
                latin = super().tokenize(HAN.sub(" ", text))
                han = HAN.findall(text)
                if not han:
                    return list(latin)
                # Keep reading order where scripts mix.
                pieces: list[str] = []
                for piece in HAN.sub(lambda one: f" {one.group()} ", text).split():
                    pieces += [piece] if HAN.fullmatch(piece) else super().tokenize(piece)
                return pieces

        return RougeScorer(list(TYPES), tokenizer=Words(self.stem))
