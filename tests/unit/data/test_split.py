"""Splits: nothing is lost, nothing crosses, shares and classes are kept, and the draw repeats."""

import random
from collections import Counter

import pytest

from luthier.core.errors import DataError
from luthier.core.types import Labelled
from luthier.data.split import Split, content_key, split_examples

SHARES = {"validation": 0.1, "test": 0.2}


def make_rows(seed: int, count: int = 400) -> list[Labelled]:
    draw = random.Random(seed)
    texts = [f"text {draw.randrange(count // 2)}" for _ in range(count)]
    return [
        Labelled(f"row:{at}", text.upper() if draw.random() < 0.3 else text, draw.choices("abc", (8, 3, 1))[0])
        for at, text in enumerate(texts)
    ]


@pytest.mark.parametrize("method", ["random", "stratified"])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_and_equal_texts_stay_together(method, seed):
    rows = make_rows(seed)
    parts = split_examples(rows, Split(method=method, seed=seed, validation=0.1, test=0.2), SHARES)
    dealt = [*parts.train, *parts.validation, *parts.test]
    assert sorted(row.id for row in dealt) == sorted(row.id for row in rows)
    keys = [{content_key(row) for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert abs(len(parts.test) / len(rows) - 0.2) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_classes_keep_their_shares(seed):
    rows = [Labelled(f"row:{at}", f"text {at}", "rare" if at % 20 == 0 else "usual") for at in range(400)]
    parts = split_examples(rows, Split(seed=seed, validation=0.1, test=0.2), SHARES)
    assert [Counter(row.label for row in part)["rare"] for part in (parts.train, parts.validation, parts.test)] == [
        14,
        2,
        4,
    ]


def test_a_group_stays_on_one_side():
    rows = [Labelled(f"row:{at}", f"text {at}", "ab"[at % 2], meta={"author": at // 7}) for at in range(210)]
    parts = split_examples(rows, Split(method="grouped", by="author", validation=0.1, test=0.2), SHARES)
    sides = [{row.meta["author"] for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, sides)) == 30 and all(sides)


def test_the_draw_repeats_and_another_seed_differs():
    rows = make_rows(1)
    one, again, other = (split_examples(rows, Split(seed=seed), {"validation": 0.1}) for seed in (0, 0, 1))
    assert one == again and one != other


def test_a_group_column_that_is_not_there():
    rows = [Labelled("row:1", "text", "a", meta={"author": 1})]
    with pytest.raises(DataError, match="there is no column 'autor'; did you mean 'author'"):
        split_examples(rows, Split(method="grouped", by="autor"), SHARES)
