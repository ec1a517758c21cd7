"""When nothing that is found answers a question: a threshold on evidence that can be compared between questions.

Ranks cannot: something is always first. What can is `coverage`, the best passage's BM25 as a share of the most that the
question could score, and the best cosine. They are added, each divided by its spread over questions that the index does not
answer, and a sum below the threshold is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.retrieval.words import is_dense

Floats: TypeAlias = NDArray[np.float64]
Script: TypeAlias = Literal["dense", "spaced"]
"""Writing without spaces between words, as Chinese, or with."""

# The least spread that a kind of evidence is taken to have.
LEAST = 0.01
# An encoder that lacks more of the tokens cannot read the text.
MOST_UNKNOWN = 0.1


class Refusal(Config):
    """A question is refused whose `coverage_weight * coverage + cosine_weight * cosine` is below `threshold`."""

    coverage_weight: float
    """Weight of BM25 as a share of the most that it could be."""
    cosine_weight: float
    """Weight of the best cosine; 0 where meaning is not compared."""
    threshold: float
    """What the sum must reach."""
    fitted_on: str
    """The questions that it was fitted on."""

    def knows(self, evidence: Evidence) -> bool:
        """Whether the evidence reaches the threshold."""
        return self.coverage_weight * evidence.coverage + self.cosine_weight * evidence.cosine >= self.threshold


class Measured(Config):
    """What was measured on an index for questions in one kind of writing."""

    sentences: int
    """How many halves of its own sentences were asked."""
    unknown: float | None = None
    """The share of their tokens that the encoder's vocabulary lacks; None without an encoder."""
    nearest: float | None = None
    """The share of those from documents whose own file was the nearest by meaning; None where too few were asked. Rows of
    questions do not count: half of one fits many."""
    refusal: Refusal | None = None
    """When a question is refused; None where there is nothing else to tell its answer from."""

    @property
    def compares_meaning(self) -> bool:
        """Whether the encoder can read this writing: its vocabulary must hold it, and it must know where most half sentences
        come from. One that cannot would drown in the fusion what words find."""
        return (self.unknown is None or self.unknown <= MOST_UNKNOWN) and (self.nearest is None or self.nearest >= 0.5)


@dataclass(frozen=True, slots=True)
class Evidence:
    """How well an index knows what a question speaks of, by the best passage of each way; `cosine` is 0 where meaning is not
    compared."""

    coverage: float
    cosine: float


def script_of(text: str) -> Script:
    """The writing of a question."""
    return "dense" if is_dense(text) else "spaced"


def fit_quantile(unknown: Sequence[Evidence], share: float, fitted_on: str, meaning: bool) -> Refusal:
    """Refuse `share` of the evidence of questions that are known to have no answer."""
    weights_2, sums_N = _weigh(unknown, unknown, meaning)
    threshold = float(np.quantile(sums_N, share))
    return _made(weights_2, threshold, fitted_on)


def fit_rows(known: Sequence[Evidence], unknown: Sequence[Evidence], fitted_on: str, meaning: bool) -> Refusal:
    """Refuse where the mean of the shares judged rightly, among questions with an answer and without, is highest.

    Raises DataError where there are none of either kind.
    """
    if not known or not unknown:
        raise DataError(
            f"{fitted_on}: there is no question {'with' if not known else 'without'} an answer, so a threshold cannot be "
            "fitted; add some"
        )
    weights_2, unknown_N = _weigh(unknown, unknown, meaning)
    _, known_N = _weigh(known, unknown, meaning)
    values = np.unique(np.concatenate([known_N, unknown_N]))
    # Between neighbouring values, and below the lowest.
    tried = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    scores = [(known_N >= one).mean() + (unknown_N < one).mean() for one in tried]
    return _made(weights_2, float(tried[int(np.argmax(scores))]), fitted_on)


def _weigh(found: Sequence[Evidence], unknown: Sequence[Evidence], meaning: bool) -> tuple[Floats, Floats]:
    spread_2 = np.maximum(_table(unknown).std(0), LEAST)
    weights_2 = np.array([1.0, float(spread_2[0] / spread_2[1]) if meaning else 0.0])
    return weights_2, _table(found) @ weights_2


def _table(found: Sequence[Evidence]) -> Floats:
    return np.array([[one.coverage, one.cosine] for one in found], np.float64)


def _made(weights_2: Floats, threshold: float, fitted_on: str) -> Refusal:
    return Refusal(
        coverage_weight=float(weights_2[0]), cosine_weight=float(weights_2[1]), threshold=threshold, fitted_on=fitted_on
    )
