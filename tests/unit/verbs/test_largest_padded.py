"""Of rows with a source and an answer, what is padded most is looked at beside what has the most tokens."""

from types import SimpleNamespace

from luthier.core.types import Encoded
from luthier.verbs.largest import largest_parts


def row(source, answer):
    return Encoded(f"{source}-{answer}", (5,) * source, (), target=(6,) * answer, target_weights=(1.0,) * answer)


def test_the_most_padded_rows_are_among_the_largest():
    settings = SimpleNamespace(accumulate=1, micro_tokens=1000)
    even, uneven = [row(50, 50)] * 4, [row(10, 200), row(90, 5), row(10, 5), row(10, 5)]
    parts, several = largest_parts([even, uneven], settings, 1)
    assert [sorted(one.id for one in part) for part in parts] == [
        ["50-50"] * 4, sorted(one.id for one in uneven),
    ]  # fmt: skip
    assert not several
    plain = [[Encoded("a", (5,) * 30, (1.0,) * 30)], [Encoded("b", (5,) * 20, (1.0,) * 20)] * 2]
    assert [[one.id for one in part] for part in largest_parts(plain, settings, 1)[0]] == [["b", "b"]]
