"""Words and character n-grams with a linear model: the baseline that is hard to beat on short texts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.preprocessing import MultiLabelBinarizer

from luthier.core.types import Example, Labelled, Prediction
from luthier.evals.baselines.part import Baseline, input_of, labelled, whole_text


class Tfidf(Baseline):
    """TF-IDF of words (1-2) and of characters (1-4, inside word bounds) with logistic regression; ridge for numbers.

    Sublinear term counts, classes balanced, C = 10: what a practitioner would settle on after a short search.
    Characters carry Chinese, where words are not spaced.
    """

    kind: ClassVar[str] = "tfidf"

    def predict(self, train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
        rows, asked = labelled(train), labelled(test)
        texts, questions = [whole_text(row) for row in rows], [whole_text(row) for row in asked]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline that stops early is still one
            warnings.filterwarnings("ignore", message="Label .* is present in all training examples")
            if isinstance(rows[0].label, float):
                model = make_pipeline(_features(), Ridge(alpha=1.0)).fit(texts, [row.label for row in rows])
                found = model.predict(questions)
                return [_say(row, float(value)) for row, value in zip(asked, found)]
            if isinstance(rows[0].label, tuple):
                return _several(texts, rows, questions, asked)
            model = make_pipeline(_features(), _logistic()).fit(texts, [str(row.label) for row in rows])
            shares_NC, names = model.predict_proba(questions), [str(name) for name in model.classes_]
        return [
            _say(row, names[int(np.argmax(shares))], dict(zip(names, map(float, shares))))
            for row, shares in zip(asked, shares_NC)
        ]


def _features() -> Any:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
    loose = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    return _Union(words, letters, loose)


class _Union:
    """Words and characters side by side; characters alone where no words are found, rare ones too in tiny sets."""

    def __init__(self, words: Any, letters: Any, loose: Any):
        self.words, self.letters, self.loose = words, letters, loose

    def fit(self, texts: Sequence[str], gold: Any = None) -> _Union:
        letters = self.letters if len(texts) >= 50 else self.loose
        try:
            self.chosen = make_union(self.words, letters).fit(texts)
        except ValueError:  # "empty vocabulary": no word of two letters in any text
            self.chosen = self.loose.fit(texts)
        return self

    def transform(self, texts: Sequence[str]) -> Any:
        return self.chosen.transform(texts)

    def fit_transform(self, texts: Sequence[str], gold: Any = None) -> Any:
        return self.fit(texts).transform(texts)


def _logistic() -> LogisticRegression:
    return LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)


def _several(texts: list[str], rows: list[Labelled], questions: list[str], asked: list[Labelled]) -> list[Prediction]:
    binary = MultiLabelBinarizer()
    gold = binary.fit_transform([row.label for row in rows])
    model: Pipeline = make_pipeline(_features(), OneVsRestClassifier(_logistic())).fit(texts, gold)
    names = [str(name) for name in binary.classes_]
    said = []
    for row, shares in zip(asked, model.predict_proba(questions)):
        held = tuple(name for name, share in zip(names, shares) if share > 0.5)
        said.append(_say(row, held, dict(zip(names, map(float, shares)))))
    return said


def _say(row: Labelled, output: Any, probabilities: dict[str, float] | None = None) -> Prediction:
    return Prediction(row.id, output, row.label, probabilities, input=input_of(row))
