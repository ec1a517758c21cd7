"""Classes said against classes meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.core.types import Estimate
from luthier.metrics.statistics import Floats, as_floats, bootstrap, mean, wilson

Average: TypeAlias = Literal["micro", "macro", "weighted"]
Formula: TypeAlias = Callable[[Floats, Floats, Floats], Floats]
Bools: TypeAlias = NDArray[np.bool_]


def accuracy(said: Sequence[Any], meant: Sequence[Any]) -> Estimate:
    """Share of items that are exactly right (for several labels an item: the whole set)."""
    return wilson(sum(one == other for one, other in zip(said, meant)), len(meant))


def indicators(labels_of: Sequence[str | tuple[str, ...]], labels: Sequence[str]) -> Bools:
    """[N, C]: whether item n holds class c."""
    held = [{one} if isinstance(one, str) else set(one) for one in labels_of]
    return np.array([[label in some for label in labels] for some in held], dtype=bool).reshape(len(held), len(labels))


def counts(said_NC: Bools, meant_NC: Bools) -> Floats:
    """[N, 3C]: what each item adds to hits, false alarms and misses of each class."""
    parts = (said_NC & meant_NC, said_NC & ~meant_NC, ~said_NC & meant_NC)
    return np.concatenate(parts, 1).astype(np.float64)


def precision(said_NC: Bools, meant_NC: Bools, average: Average) -> Estimate:
    """Of what was said, the share that was meant; a class never said counts 0, as in scikit-learn."""
    return _averaged(said_NC, meant_NC, average, lambda hits, alarms, misses: _over(hits, hits + alarms))


def recall(said_NC: Bools, meant_NC: Bools, average: Average) -> Estimate:
    """Of what was meant, the share that was said."""
    return _averaged(said_NC, meant_NC, average, lambda hits, alarms, misses: _over(hits, hits + misses))


def f1(said_NC: Bools, meant_NC: Bools, average: Average) -> Estimate:
    """Harmonic mean of precision and recall: 2 hits / (2 hits + false alarms + misses)."""
    return _averaged(
        said_NC, meant_NC, average, lambda hits, alarms, misses: _over(2 * hits, 2 * hits + alarms + misses)
    )


def roc_auc(scores: Sequence[float], positive: Sequence[bool]) -> Estimate:
    """Chance that a positive item scores above a negative one (ties count half), with DeLong's interval (1988).

    Raises ValueError when one of the two kinds is absent.
    """
    from scipy.stats import norm, rankdata

    values, yes = as_floats(scores), np.asarray(positive, bool)
    above, below = values[yes], values[~yes]
    m, n = len(above), len(below)
    if m == 0 or n == 0:
        raise ValueError("ROC-AUC needs items of both kinds")
    ranks = rankdata(np.concatenate([above, below]))
    area = (ranks[:m].sum() - m * (m + 1) / 2) / (m * n)
    # Placement values: the share of the other kind that each item is on the right side of.
    v10 = (ranks[:m] - rankdata(above)) / n
    v01 = 1 - (ranks[m:] - rankdata(below)) / m
    variance = (v10.var(ddof=1) / m if m > 1 else 0.25) + (v01.var(ddof=1) / n if n > 1 else 0.25)
    half = float(norm.ppf(0.975)) * float(np.sqrt(variance))
    return Estimate(float(area), max(0.0, float(area) - half), min(1.0, float(area) + half), m + n, "DeLong")


def log_loss(shares: Sequence[float]) -> Estimate:
    """Mean of -log of the probabilities that were given to the true classes, in nats; one of 0 counts as 1e-15."""
    return mean(-np.log(np.clip(as_floats(shares), 1e-15, None)))


def per_class(said_NC: Bools, meant_NC: Bools, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class, as plain values."""
    table = []
    for at, label in enumerate(labels):
        said, meant = said_NC[:, at], meant_NC[:, at]
        hits, all_said, all_meant = int((said & meant).sum()), int(said.sum()), int(meant.sum())
        row: dict[str, Any] = {"label": label}
        row["precision"] = hits / all_said if all_said else 0.0
        row["recall"] = hits / all_meant if all_meant else 0.0
        row["f1"] = 2 * hits / (all_said + all_meant) if all_said + all_meant else 0.0
        row["support"] = all_meant
        table.append(row)
    return table


def confusion(said: Sequence[str], meant: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """[C, C]: rows are what was meant, columns what was said."""
    index = {label: at for at, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)), dtype=int)
    for one, other in zip(said, meant):
        table[index[other], index[one]] += 1
    return table.tolist()


def _averaged(said_NC: Bools, meant_NC: Bools, average: Average, formula: Formula) -> Estimate:
    classes = said_NC.shape[1]

    def statistic(sums: Floats) -> Floats:
        hits, alarms, misses = (sums[:, at * classes : (at + 1) * classes] for at in range(3))
        if average == "micro":
            return formula(hits.sum(1), alarms.sum(1), misses.sum(1))
        values: Floats = formula(hits, alarms, misses)
        # Classes that occur neither in gold nor in answers say nothing.
        weight = hits + misses if average == "weighted" else (hits + alarms + misses > 0).astype(np.float64)
        return _over((values * weight).sum(1), weight.sum(1))

    return bootstrap(counts(said_NC, meant_NC), statistic)


def _over(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
