"""Predictions to metrics with error bars, by what the model was made to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from luthier.core.errors import DataError
from luthier.core.types import Estimate, Prediction, Task
from luthier.metrics import classification, language, regression
from luthier.metrics.scorers import SCORERS


def judge(
    predictions: Sequence[Prediction], task: Task, labels: Sequence[str] = ()
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """(metrics, details) of predictions with gold.

    details holds what is no single number: the confusion matrix, the table by class, which class is the positive one
    of two, and notes on metrics that could not be computed. Raises DataError when there is nothing to judge.
    """
    if not predictions:
        raise DataError("there are no predictions to judge; give at least one row with its gold")
    if task == "classify":
        return _judge_classes(predictions, labels)
    if task == "regress":
        return _judge_numbers(predictions)
    if all(one.nll is not None for one in predictions):
        return _judge_likelihood(predictions)
    return _judge_texts(predictions)


def _judge_classes(
    predictions: Sequence[Prediction], labels: Sequence[str]
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    said = [_as_labels(one.output) for one in predictions]
    meant = [_as_labels(one.gold) for one in predictions]
    several = any(isinstance(one, tuple) for one in meant)
    said_NC, meant_NC = classification.indicators(said, labels), classification.indicators(meant, labels)
    if several:
        same = [set(_as_set(one)) == set(_as_set(other)) for one, other in zip(said, meant)]
        metrics = {"accuracy": classification.accuracy(same, [True] * len(same))}
    else:
        metrics = {"accuracy": classification.accuracy(said, meant)}
    details: dict[str, Any] = {"per_class": classification.per_class(said_NC, meant_NC, labels), "notes": []}
    for average in ("macro", "micro", "weighted"):
        metrics[f"{average}_f1"] = classification.f1(said_NC, meant_NC, average)
    metrics["macro_precision"] = classification.precision(said_NC, meant_NC, "macro")
    metrics["macro_recall"] = classification.recall(said_NC, meant_NC, "macro")
    if several:
        return metrics, details
    details["confusion"] = {"labels": list(labels), "counts": classification.confusion(said, meant, labels)}  # type: ignore[arg-type]
    if len(labels) == 2:
        counts = Counter(meant)
        positive = min(labels, key=lambda label: (counts.get(label, 0), label))
        at = list(labels).index(positive)
        one, other = said_NC[:, [at]], meant_NC[:, [at]]
        metrics["precision"] = classification.precision(one, other, "micro")
        metrics["recall"] = classification.recall(one, other, "micro")
        metrics["f1"] = classification.f1(one, other, "micro")
        details["positive"] = positive
        details["notes"].append(f"precision, recall and f1 are those of {positive!r}, the rarer of the two classes")
    areas = []
    for at, label in enumerate(labels):
        if all(one.probabilities is not None for one in predictions):
            scores = [one.probabilities.get(label, 0.0) for one in predictions if one.probabilities is not None]
            try:
                areas.append(classification.roc_auc(scores, meant_NC[:, at].tolist()))
            except ValueError:
                details["notes"].append(f"no ROC-AUC for {label!r}: these rows hold only one kind")
    if areas and len(areas) == len(labels):
        metrics["roc_auc"] = areas[list(labels).index(details["positive"])] if len(labels) == 2 else _mean_area(areas)
    if all(one.probabilities is not None for one in predictions):
        given = [(one.probabilities or {}).get(str(gold), 0.0) for one, gold in zip(predictions, meant)]
        metrics["log_loss"] = classification.log_loss(given)
    return metrics, details


def _judge_numbers(predictions: Sequence[Prediction]) -> tuple[dict[str, Estimate], dict[str, Any]]:
    said = [float(one.output) for one in predictions]  # type: ignore[arg-type]
    meant = [float(one.gold) for one in predictions]  # type: ignore[arg-type]
    metrics = {"mse": regression.mse(said, meant), "mae": regression.mae(said, meant)}
    notes = []
    for name, found in (("pearson", regression.pearson(said, meant)), ("spearman", regression.spearman(said, meant))):
        if found is None:
            notes.append(f"no {name}: one side is constant, or there are fewer than three rows")
        else:
            metrics[name] = found
    return metrics, {"notes": notes}


def _judge_likelihood(predictions: Sequence[Prediction]) -> tuple[dict[str, Estimate], dict[str, Any]]:
    nll = [float(one.nll or 0.0) for one in predictions]
    metrics = {"perplexity": language.perplexity(nll, [float(one.tokens or 0) for one in predictions])}
    if all(one.bytes for one in predictions):
        metrics["bits_per_byte"] = language.bits_per_byte(nll, [float(one.bytes or 0) for one in predictions])
    return metrics, {"notes": ["perplexity is per token of this tokenizer; bits_per_byte compares between tokenizers"]}


def _judge_texts(predictions: Sequence[Prediction]) -> tuple[dict[str, Estimate], dict[str, Any]]:
    said = [str(one.output or "") for one in predictions]
    meant = [str(one.gold or "") for one in predictions]
    metrics: dict[str, Estimate] = {}
    for name in ("exact_match", "token_f1", "bleu", "chrf", "rouge"):
        metrics.update(SCORERS.parse(name).estimate(said, meant))
    empty = sum(not one.strip() for one in said)
    return metrics, {"notes": [f"{empty} of {len(said)} answers are empty"] if empty else []}


def _mean_area(areas: Sequence[Estimate]) -> Estimate:
    count = len(areas)
    # The areas share their items, so their errors are not independent: the mean of the half-widths is on the safe side.
    value = sum(one.value for one in areas) / count
    low, high = sum(one.low for one in areas) / count, sum(one.high for one in areas) / count
    return Estimate(value, low, high, areas[0].n, "mean of DeLong, one class against the rest")


def _as_labels(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list | tuple):
        return tuple(value)
    if value is None:
        raise DataError("a row has no gold label, so it cannot be judged")
    return str(value)


def _as_set(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
