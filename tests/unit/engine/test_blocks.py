"""Blocks: held, shared, remembered, and never lost or given to two."""

import random

import pytest

from luthier.engine.blocks import Blocks, names_of
from luthier.models.pages import BLOCK


def test_names_go_by_all_that_came_before():
    one, other = list(range(3 * BLOCK + 4)), [99, *range(1, 3 * BLOCK)]
    assert len(list(names_of(one, ""))) == 3 and not set(names_of(one, "")) & set(names_of(other, ""))
    assert list(names_of(one, ""))[:2] == list(names_of(one[: 2 * BLOCK + 1], ""))
    assert not set(names_of(one, "")) & set(names_of(one, "other"))
    assert list(names_of(one[: BLOCK - 1], "")) == []


def test_a_named_block_is_found_until_it_is_needed():
    blocks = Blocks(2)
    first = blocks.take()
    blocks.name(first, b"a")
    blocks.drop(first)
    assert blocks.free == 2 and blocks.find(b"a") == first and blocks.free == 1
    second = blocks.take()
    blocks.drop(second)
    blocks.drop(first)
    assert blocks.take() == second  # an empty one before one that is remembered
    assert blocks.take() == first and blocks.find(b"a") is None
    with pytest.raises(IndexError):
        blocks.take()


def test_a_shared_block_is_free_when_all_have_let_go():
    blocks = Blocks(3)
    held = blocks.take()
    blocks.name(held, b"a")
    assert blocks.find(b"a") == held and blocks.used == 1
    blocks.drop(held)
    assert blocks.used == 1
    blocks.drop(held)
    assert blocks.used == 0


def test_the_longest_unused_is_forgotten_first():
    blocks = Blocks(3)
    held = [blocks.take() for _ in range(3)]
    for block, name in zip(held, (b"a", b"b", b"c")):
        blocks.name(block, name)
    for block in (held[1], held[0], held[2]):
        blocks.drop(block)
    blocks.drop(blocks.find(b"b"))  # used again
    blocks.take()
    assert blocks.find(b"a") is None and blocks.find(b"b") is not None


def test_ten_thousand_moves_lose_no_block():
    draw, blocks = random.Random(0), Blocks(16)
    held, names = [], []
    for step in range(10000):
        move = draw.random()
        if move < 0.4 and blocks.free:
            held.append(blocks.take())
        elif move < 0.5 and held:
            name = bytes([step % 40])
            blocks.name(draw.choice(held), name)
            names.append(name)
        elif move < 0.65 and names:
            found = blocks.find(draw.choice(names))
            held += [] if found is None else [found]
        elif held:
            blocks.drop(held.pop(draw.randrange(len(held))))
        assert blocks.used == len(set(held)) and blocks.free == 16 - len(set(held))
    for block in held:
        blocks.drop(block)
    assert blocks.used == 0 and len({blocks.take() for _ in range(16)}) == 16


def test_a_block_is_shared_by_as_many_as_asked_for_it():
    blocks = Blocks(2)
    held = blocks.take()
    assert blocks.share(held) == held and blocks.used == 1
    blocks.drop(held)
    assert blocks.used == 1 and blocks.take() != held
    blocks.drop(held)
    assert blocks.take() == held
