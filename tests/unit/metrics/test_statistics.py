"""Error bars that cover what they promise, and hold at the edges."""

import subprocess
import sys

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.metrics.classification import f1, indicators
from luthier.metrics.statistics import bootstrap, mcnemar, mean, paired_difference, wilson


def test_wilson_covers_what_it_promises():
    random = np.random.default_rng(0)
    share, n = 0.85, 120
    found = [wilson(int(random.binomial(n, share)), n) for _ in range(2000)]
    covered = np.mean([one.low <= share <= one.high for one in found])
    assert 0.93 <= covered <= 0.97


def test_bootstrap_of_f1_covers_the_true_value():
    random = np.random.default_rng(1)
    # P(meant) = 0.4, right with 0.8: F1 of the whole population is 2 x 0.32 / (0.44 + 0.4).
    true, hits = 2 * 0.32 / (0.44 + 0.4), 0
    for _ in range(200):
        meant = random.random(200) < 0.4
        said = np.where(random.random(200) < 0.8, meant, ~meant)
        found = f1(said[:, None], meant[:, None], "micro")
        hits += found.low <= true <= found.high
    assert 0.90 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (1, 1), (0, 1)])
def test_wilson_at_the_edges(right, n):
    found = wilson(right, n)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_nothing_to_judge_is_an_error():
    with pytest.raises(DataError, match="no items"):
        wilson(0, 0)
    with pytest.raises(DataError, match="no items"):
        mean(np.array([]))


def test_the_seed_decides():
    stats = np.random.default_rng(0).random((50, 2))
    one, same = (bootstrap(stats, lambda sums: sums[:, 0] / sums[:, 1], seed=3) for _ in range(2))
    other = bootstrap(stats, lambda sums: sums[:, 0] / sums[:, 1], seed=4)
    assert one == same != other


def test_pairs_see_what_an_unpaired_test_would_not():
    random = np.random.default_rng(0)
    hard = random.normal(size=300) * 5
    found = paired_difference(hard + 0.5 + random.normal(size=300) * 0.5, hard)
    assert found.low > 0
    assert mcnemar(np.array([True] * 12 + [False] * 2), np.array([False] * 12 + [True] * 2)) == pytest.approx(
        0.01294, abs=1e-4
    )


def test_indicators_of_empty_sets():
    assert indicators([(), ("a",)], ["a", "b"]).tolist() == [[False, False], [True, False]]


NEEDLESS = """
import sys
from luthier.models.lean import import_lean
assert import_lean()
import luthier.training.objectives.distil, luthier.training.objectives.grpo
import luthier.metrics.classification, luthier.metrics.regression
print(*(name for name in ("scipy.stats", "sklearn") if name in sys.modules))
"""


def test_what_learns_does_not_wait_for_statistics():
    done = subprocess.run([sys.executable, "-c", NEEDLESS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [], done.stderr
    assert done.returncode == 0, done.stderr
