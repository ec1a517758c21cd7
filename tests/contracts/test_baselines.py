"""What every baseline must hold: an answer for each held-out row, in order, with its gold, the same every time."""

import pytest

from luthier.core.types import Labelled, Pair
from luthier.evals.baselines import BASELINES, baselines_for

CLASSES = [Labelled(f"row:{at}", f"{word} {at}", word) for at in range(12) for word in ("apple", "pear", "苹果")]
SEVERAL = [Labelled(f"row:{at}", f"red and round {at}", ("red", "round") if at % 2 else ("red",)) for at in range(12)]
NUMBERS = [Labelled(f"row:{at}", "word " * (at + 1), float(at)) for at in range(12)]
PAIRS = [Pair(f"row:{at}", f"a house {at}", f"ein Haus {at}") for at in range(6)]
FITTING = [
    pytest.param(baseline.kind, rows, id=f"{baseline.kind}-{name}")
    for name, task, rows in (
        ("classes", "classify", CLASSES),
        ("several", "classify", SEVERAL),
        ("numbers", "regress", NUMBERS),
        ("pairs", "seq2seq", PAIRS),
    )
    for baseline in baselines_for(task)
]


def test_every_baseline_is_tried():
    assert {case.values[0] for case in FITTING} == set(BASELINES.names())


@pytest.mark.parametrize(("kind", "rows"), FITTING)
def test_it_answers_every_row(kind, rows):
    train, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    found = BASELINES.parse(kind).predict(train, test)
    assert [one.id for one in found] == [row.id for row in test]
    golds = [row.target if isinstance(row, Pair) else row.label for row in test]
    assert [one.gold for one in found] == golds
    assert all(type(one.output) is type(gold) for one, gold in zip(found, golds))
    assert found == BASELINES.parse(kind).predict(train, test)


@pytest.mark.parametrize(("kind", "rows"), FITTING)
def test_it_never_looks_at_the_gold(kind, rows):
    train, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    hidden = [
        Pair(row.id, row.source, "?") if isinstance(row, Pair) else Labelled(row.id, row.text, None, row.pair)
        for row in test
    ]
    seen, unseen = (BASELINES.parse(kind).predict(train, part) for part in (test, hidden))
    assert [one.output for one in seen] == [one.output for one in unseen]


@pytest.mark.parametrize("kind", ["majority", "tfidf"])
def test_probabilities_are_shares(kind):
    for one in BASELINES.parse(kind).predict(CLASSES[:18], CLASSES[18:]):
        assert abs(sum(one.probabilities.values()) - 1) < 1e-6
        assert one.output == max(one.probabilities, key=one.probabilities.get)


def test_tfidf_tells_words_apart_in_both_scripts():
    found = BASELINES.parse("tfidf").predict(CLASSES[:24], CLASSES[24:])
    assert [one.output for one in found] == [row.label for row in CLASSES[24:]]
