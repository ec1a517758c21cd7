"""How often a model prefers the answers that people liked, beside the model before tuning and the rule "the longer one"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Estimate, Example, Feedback, Message, Prediction, Preference
from luthier.engine.answers import encode_answers, score_answers
from luthier.metrics.classification import roc_auc
from luthier.metrics.statistics import wilson
from luthier.models.spec import LoadedModel

Logs: TypeAlias = NDArray[np.float64]
"""[N, A, 2]: sum of log p and tokens of each answer of each row; of a reward model its reward, and 1."""


def read_answers(model: LoadedModel, examples: Sequence[Example], events: Events, name: str = "judging") -> Logs:
    """What the model says of the answers of each row. Raises DataError for rows of another kind, or that do not fit."""

    def tell(done: int, total: int) -> None:
        events.emit("progress", name=name, done=done, total=total)

    kind = type(examples[0])
    rows = []
    for example in examples:
        if not isinstance(example, Preference | Feedback) or type(example) is not kind:
            raise DataError(f"{example.id}: this row is {type(example).__name__}, where the first is {kind.__name__}")
        rows.append(encode_answers(model, example))
    return score_answers(model, rows, on_progress=tell, events=events)


def judge_answers(
    examples: Sequence[Example], logs: Logs, before: Logs | None = None, *, refers: bool = False
) -> tuple[list[Prediction], dict[str, Estimate], dict[str, Any], dict[str, dict[str, Estimate]]]:
    """(predictions, metrics, details, metrics of the baselines).

    An answer scores what a reward model gives it, or its mean log p a token; where the tuning `refers` to its start, the
    log p that it gained over `before`, and likelihood_accuracy (or likelihood_auc) is the same by mean log p. Of pairs:
    preference_accuracy, the share of rows whose chosen answer scores strictly higher (Wilson). Of answers with a
    verdict: roc_auc over good and bad ones (DeLong). Baselines: `untuned`, by mean log p before; `longer`.
    """
    means = logs[..., 0] / logs[..., 1]
    old_means = None if before is None else before[..., 0] / before[..., 1]
    scores = logs[..., 0] - before[..., 0] if refers and before is not None else means
    details: dict[str, Any] = {"notes": []}
    if isinstance(examples[0], Feedback):
        name, by_likelihood = "roc_auc", "likelihood_auc"
    else:
        name, by_likelihood = "preference_accuracy", "likelihood_accuracy"
    good = [isinstance(one, Feedback) and one.good for one in examples]

    def measure(values: NDArray[np.float64]) -> Estimate | None:
        if name == "preference_accuracy":
            return wilson(int((values[:, 0] > values[:, 1]).sum()), len(values))
        if len(set(good)) < 2:
            return None
        return roc_auc(values[:, 0].tolist(), good)

    found = {name: measure(scores)}
    rivals: dict[str, dict[str, Estimate | None]] = {}
    if scores is not means:
        found[by_likelihood] = measure(means)
        details["notes"].append(
            f"{name} goes by log p gained over the model at the start; {by_likelihood} by mean log p"
        )
    if old_means is not None:
        rivals["untuned"] = {by_likelihood if scores is not means else name: measure(old_means)}
    if name == "preference_accuracy":
        rivals["longer"] = {name: measure(np.array([_sizes(one) for one in examples], dtype=np.float64))}
    elif len(set(good)) < 2:
        details["notes"].append("no ROC-AUC: these rows hold only one kind")
    predictions = [_predict(one, values, refers) for one, values in zip(examples, scores)]
    return predictions, _known(found), details, {who: _known(values) for who, values in rivals.items()}


def _predict(example: Example, scores_A: NDArray[np.float64], refers: bool) -> Prediction:
    if isinstance(example, Preference):
        chosen, rejected = map(float, scores_A)
        said = "chosen" if chosen > rejected else "rejected" if chosen < rejected else "neither"
        shown = f"{_shown(example.prompt)}\n\nchosen ({chosen:.3f}): {_shown(example.chosen)}\n\n"
        return Prediction(
            example.id, said, "chosen", input=f"{shown}rejected ({rejected:.3f}): {_shown(example.rejected)}"
        )
    assert isinstance(example, Feedback)
    score = float(scores_A[0])
    said_of = ("good" if score > 0 else "bad") if refers else score
    shown = f"{_shown(example.prompt)}\n\nanswer ({score:.3f}): {_shown(example.answer)}"
    return Prediction(example.id, said_of, "good" if example.good else "bad", input=shown)


def _sizes(example: Example) -> tuple[int, int]:
    assert isinstance(example, Preference)
    return len(_shown(example.chosen)), len(_shown(example.rejected))


def _shown(turns: Sequence[Message]) -> str:
    return turns[0].content if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _known(found: dict[str, Estimate | None]) -> dict[str, Estimate]:
    return {name: one for name, one in found.items() if one is not None}
