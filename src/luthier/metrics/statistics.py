"""Error bars: what else a number could have been, had the items been others of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.core.types import Estimate

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES = 2000
# Resampling counts are drawn for so many resamples at a time, to keep their matrix small.
CHUNK = 200


def wilson(successes: float, n: int, level: float = 0.95) -> Estimate:
    """A share of `n` yes-or-no items with Wilson's score interval (Wilson 1927)."""
    _need(n)
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + level / 2))
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    # At the ends rounding may leave the share itself just outside.
    return Estimate(share, min(low, share), max(high, share), n, "Wilson", level)


def bootstrap(
    stats_NK: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of sums over items, with a percentile bootstrap interval (Efron 1979).

    `stats_NK` holds what each item adds to K sums; `statistic` maps sums [R, K] to values [R]. Items are drawn with
    replacement; all resamples are done at once as counts x stats, so 2,000 of them take milliseconds.
    """
    n = len(stats_NK)
    _need(n)
    value = float(statistic(stats_NK.sum(0, keepdims=True))[0])
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, CHUNK):
        counts_RN = random.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, resamples - start))
        found.append(statistic(counts_RN @ stats_NK))
    values = np.concatenate(found)
    low, high = np.quantile(values[np.isfinite(values)], [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(
        value, min(float(low), value), max(float(high), value), n, f"bootstrap, {resamples} resamples", level
    )


def mean(values: Floats, level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of `values`, with a percentile bootstrap interval."""
    stats_N2 = np.stack([values, np.ones(len(values))], 1)
    return bootstrap(stats_N2, lambda sums: sums[:, 0] / sums[:, 1], level=level, seed=seed)


def ratio(above: Floats, below: Floats, level: float = 0.95, seed: int = 0) -> Estimate:
    """sum(above) / sum(below), with a percentile bootstrap interval over the items."""
    return bootstrap(np.stack([above, below], 1), lambda sums: sums[:, 0] / sums[:, 1], level=level, seed=seed)


def paired_difference(one: Floats, other: Floats, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of one - other on the same items: the comparison that an unpaired test throws away."""
    return mean(np.asarray(one, float) - np.asarray(other, float), level=level, seed=seed)


def mcnemar(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Exact two-sided p of McNemar's test (1947): are the items that only one gets right evenly divided?"""
    from scipy.stats import binomtest

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    both = only_one + only_other
    return 1.0 if both == 0 else float(binomtest(only_one, both, 0.5).pvalue)


def fisher(correlation: float, n: int, variance: float, method: str, level: float = 0.95) -> Estimate:
    """A correlation with an interval by Fisher's z transform; `variance` is that of z."""
    _need(n)
    if n < 4 or abs(correlation) >= 1:
        return Estimate(correlation, -1.0 if n < 4 else correlation, 1.0 if n < 4 else correlation, n, method, level)
    from scipy.stats import norm

    half = float(norm.ppf(0.5 + level / 2)) * math.sqrt(variance)
    z = math.atanh(correlation)
    return Estimate(correlation, math.tanh(z - half), math.tanh(z + half), n, method, level)


def _need(n: int) -> None:
    if n < 1:
        raise DataError("there are no items to judge; give at least one")


def as_floats(values: Any) -> Floats:
    """Any sequence of numbers as a float64 array."""
    return np.asarray(values, dtype=np.float64)
