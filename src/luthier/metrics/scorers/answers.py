"""Short answers: the same, or sharing words."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from luthier.core.types import Estimate
from luthier.metrics.scorers.part import HAN, Scorer
from luthier.metrics.statistics import wilson

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): case folded, punctuation, articles and extra spaces gone.

    Deviation: punctuation is every character of Unicode's class P, so that Chinese marks go too.
    """
    kept = "".join(
        " " if HAN.match(character) is None and character in "\t\n" else character
        for character in text.casefold()
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return " ".join(ARTICLES.sub(" ", kept).split())


def words(text: str) -> list[str]:
    """Normalised words; each Chinese character is a word of its own, as in CMRC 2018."""
    return HAN.sub(lambda found: f" {found.group()} ", normalise(text)).split()


class ExactMatch(Scorer):
    """1 when the answer is the gold after SQuAD's normalisation."""

    kind: ClassVar[str] = "exact_match"

    def score(self, output: str, gold: str) -> float:
        return float(normalise(output) == normalise(gold))

    def estimate(self, outputs: Sequence[str], golds: Sequence[str]) -> dict[str, Estimate]:
        return {self.kind: wilson(sum(self.score(one, other) for one, other in zip(outputs, golds)), len(golds))}


class TokenF1(Scorer):
    """F1 of the words shared by answer and gold (SQuAD); characters in Chinese. Two empty texts score 1."""

    kind: ClassVar[str] = "token_f1"

    def score(self, output: str, gold: str) -> float:
        said, meant = words(output), words(gold)
        if not said or not meant:
            return float(said == meant)
        shared = sum((Counter(said) & Counter(meant)).values())
        return 2 * shared / (len(said) + len(meant))
