"""Numbers said against numbers meant."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.types import Estimate
from luthier.metrics.statistics import Floats, as_floats, fisher, mean


def mse(said: Sequence[float], meant: Sequence[float]) -> Estimate:
    """Mean squared error."""
    return mean((as_floats(said) - as_floats(meant)) ** 2)


def mae(said: Sequence[float], meant: Sequence[float]) -> Estimate:
    """Mean absolute error."""
    return mean(abs(as_floats(said) - as_floats(meant)))


def pearson(said: Sequence[float], meant: Sequence[float]) -> Estimate | None:
    """Linear correlation, with Fisher's interval; None where one side is constant or there are fewer than 3 items."""
    from scipy.stats import pearsonr

    one, other = as_floats(said), as_floats(meant)
    if len(one) < 3 or _is_constant(one) or _is_constant(other):
        return None
    return fisher(float(pearsonr(one, other).statistic), len(one), 1 / max(1, len(one) - 3), "Fisher z")


def spearman(said: Sequence[float], meant: Sequence[float]) -> Estimate | None:
    """Rank correlation, with the interval of Bonett and Wright (2000): variance of z = (1 + r^2 / 2) / (n - 3)."""
    from scipy.stats import spearmanr

    one, other = as_floats(said), as_floats(meant)
    if len(one) < 3 or _is_constant(one) or _is_constant(other):
        return None
    found = float(spearmanr(one, other).statistic)
    return fisher(found, len(one), (1 + found * found / 2) / max(1, len(one) - 3), "Fisher z, Bonett and Wright")


def _is_constant(values: Floats) -> bool:
    # The standard deviation of equal numbers is often not zero: their mean is rounded.
    return bool(values.max() == values.min())
