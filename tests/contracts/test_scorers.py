"""What every scorer must hold: the gold scores the most, an empty answer is defined, corpus values stay in range."""

import pytest

from luthier.metrics.scorers import SCORERS

GOLDS = [
    "the quick brown fox jumps over the dog",
    "a second sentence that is long enough",
    "今天天气很好我们去公园玩吧",
]


@pytest.mark.parametrize("name", SCORERS.names())
def test_the_gold_scores_the_most_and_nothing_scores_nothing(name):
    scorer = SCORERS.parse(name)
    for gold in GOLDS:
        assert scorer.score(gold, gold) == pytest.approx(scorer.best)
        assert scorer.score("", gold) == pytest.approx(0)
        assert 0 <= scorer.score(gold[: len(gold) // 2], gold) < scorer.best


@pytest.mark.parametrize("name", SCORERS.names())
def test_estimates_hold_their_interval(name):
    scorer = SCORERS.parse(name)
    said = [GOLDS[0], "a sentence that is long", GOLDS[2]]
    for found in scorer.estimate(said, GOLDS).values():
        assert 0 <= found.low <= found.value <= found.high <= scorer.best + 1e-9 and found.n == 3 and found.method
