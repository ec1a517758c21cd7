"""Trees of tokens scored by the native decoder: each prompt in a lane, its continuations in one place after another.

What all prompts begin with lies in blocks that every table begins with. A lane goes on from there in blocks of its own,
the first of which begins with a copy of what the last block of the trunk holds; that copy stays for the next prompt.
Branches are read in the order of a walk through their tree: what one leaves behind its fork is overwritten by the next, so
a fork costs nothing. Where there are few prompts, several hands walk through the tree of each at once, every one with a copy
of its own of the prompt's last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from luthier.engine.blocks import Blocks
from luthier.engine.planted import Planted
from luthier.models.pages import BLOCK
from luthier.models.trees import shared_length
from luthier.native.cached import Cached
from luthier.native.likely import log_shares
from luthier.native.packed import Packed

# Tokens of a step, and logits that are made in one: with more it takes memory, and is no faster.
TOKENS, LOGITS = 512, 2**24
# Hands of all prompts together, where one has several; and blocks that they hold beside those of the first one of each.
HANDS, BESIDE = 64, 128


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one tree that follow one another: which tree, where in it, the table, and what lies before them in that."""

    which: int
    places: range
    table: list[int]
    before: int

    def part(self, start: int, stop: int) -> _Piece:
        return _Piece(self.which, self.places[start:stop], self.table, self.before + start)


class Lanes:
    """Scores with packed weights; `adapter` is the number of one beside them, or -1."""

    def __init__(self, packed: Packed, adapter: int = -1):
        self.packed, self.adapter = packed, adapter
        self._cached: Cached | None = None
        self._blocks = Blocks(0)
        self._ids: tuple[int, ...] = ()
        self._trunk: list[int] = []
        self._heads: list[int] = []
        """The first blocks of lanes."""

    def grow_trunk(self, ids: Sequence[int], parts: Sequence[Sequence[Planted]]) -> None:
        """Make the trunk `ids`: what it has in common with them stays, the rest is read. Room is made for what is to be scored
        after it in any of these parts, or the trunk would be read anew for it."""
        shared = shared_length([self._ids, tuple(ids)])
        kept = -(-shared // BLOCK)
        if not shared == len(self._ids) == len(ids):
            self._drop(self._heads)
            self._drop(self._trunk[kept:])
            self._heads, self._trunk, self._ids = [], self._trunk[:kept], tuple(ids[:shared])
        self._make_room(-(-len(ids) // BLOCK) - kept + max(self._needs(part, len(ids)) for part in parts))
        self._read_trunk(tuple(ids))

    def score(self, planted: Sequence[Planted]) -> list[list[float]]:
        """For each tree the log-probability of each of its steps: the same bits whatever is beside it."""
        found: list[dict[tuple[int, int], float]] = [{} for _ in planted]
        self._make_room(self._needs(planted, len(self._ids)))
        taken: list[int] = []
        try:
            hands = self._set_hands(planted, taken)
            stems = [
                _Piece(at, range(one.stem), own[0], len(self._ids)) for at, (one, own) in enumerate(zip(planted, hands))
            ]
            self._read(stems, planted, found)
            for one, own in zip(planted, hands):
                here = (len(self._ids) + one.stem) // BLOCK
                for table in own[1:] if (len(self._ids) + one.stem) % BLOCK else ():
                    self._copy(own[0][here], table[here])
            for pieces in zip_longest(*_walks(planted, hands, len(self._ids))):
                self._read([piece for piece in pieces if piece is not None], planted, found)
        finally:
            self._drop(taken)
        return [[own[step] for step in one.steps] for one, own in zip(planted, found)]

    def _set_hands(self, planted: Sequence[Planted], taken: list[int]) -> list[list[list[int]]]:
        """The tables of the hands of each tree; blocks of theirs that are to be given back are added to `taken`."""

        def take(count: int) -> list[int]:
            blocks = [self._blocks.take() for _ in range(count)]
            taken.extend(blocks)
            return blocks

        whole, found = len(self._ids) // BLOCK, []
        for at, (one, (wide, count)) in enumerate(zip(planted, self._sizes(planted, len(self._ids)))):
            if at == len(self._heads):
                self._heads.append(self._blocks.take())
                if len(self._ids) % BLOCK:
                    self._copy(self._trunk[-1], self._heads[-1])
            lane = [*self._trunk[:whole], self._heads[at], *take(wide - 1)]
            here = (len(self._ids) + one.stem) // BLOCK
            found.append([lane, *([*lane[:here], *take(len(lane) - here)] for _ in range(count - 1))])
        return found

    def _sizes(self, planted: Sequence[Planted], trunk: int) -> list[tuple[int, int]]:
        """Of each tree the blocks of its lane, after a trunk of so many tokens, and how many hands it gets."""
        tail, found = trunk % BLOCK, []
        for one in planted:
            branches = sum(one.forks(chain) for chain in one.chains())
            wide = -(-(tail + max(one.depths()) + 1) // BLOCK)
            more = BESIDE // len(planted) // max(1, wide - (tail + one.stem) // BLOCK)
            found.append((wide, max(1, min(branches, HANDS // len(planted), 1 + more))))
        return found

    def _needs(self, planted: Sequence[Planted], trunk: int) -> int:
        """Blocks that are to be taken for these."""
        needed, tail = max(0, len(planted) - len(self._heads)), trunk % BLOCK
        for one, (wide, count) in zip(planted, self._sizes(planted, trunk)):
            needed += wide - 1 + (count - 1) * (wide - (tail + one.stem) // BLOCK)
        return needed

    def _read(
        self, pieces: Sequence[_Piece], planted: Sequence[Planted], found: Sequence[dict[tuple[int, int], float]]
    ) -> None:
        """Read these, and keep how likely what is asked after their tokens is."""
        assert self._cached is not None
        for step in _steps(pieces, planted, max(1, LOGITS // self.packed.vocabulary)):
            ids: list[int] = []
            rows: list[int] = []
            places: list[tuple[int, int]] = []
            for piece in step:
                one = planted[piece.which]
                for place in piece.places:
                    if place in one.asked:
                        rows.append(len(ids) + place - piece.places[0])
                        places.append((piece.which, place))
                ids += one.tree.ids[piece.places.start : piece.places.stop]
            tables, before = [piece.table for piece in step], [piece.before for piece in step]
            sizes, adapters = [len(piece.places) for piece in step], [self.adapter] * len(step)
            logits_RV = self._cached.read(ids, tables, before, sizes, rows, adapters=adapters)
            if rows:
                asked = [planted[which].asked[place] for which, place in places]
                logs = iter(log_shares(logits_RV, asked).tolist())
                for (which, place), tokens in zip(places, asked):
                    found[which].update({(place, token): next(logs) for token in tokens})

    def _make_room(self, more: int) -> None:
        """See to it that so many blocks can be taken."""
        if self._blocks.free >= more:
            return
        ids, count = self._ids, self._blocks.used + more
        self._ids, self._trunk, self._heads = (), [], []
        # What there was is given back first.
        self._cached = None
        self._cached, self._blocks = Cached(self.packed, count), Blocks(count)
        self._read_trunk(ids)

    def _read_trunk(self, ids: tuple[int, ...]) -> None:
        assert self._cached is not None
        self._trunk += [self._blocks.take() for _ in range(-(-len(ids) // BLOCK) - len(self._trunk))]
        while len(self._ids) < len(ids):
            start = len(self._ids)
            some = ids[start : start + TOKENS]
            self._cached.read(some, [self._trunk], [start], [len(some)], [], adapters=[self.adapter])
            self._ids += some

    def _copy(self, source: int, target: int) -> None:
        assert self._cached is not None
        self._cached.copy(source, target)

    def _drop(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._blocks.drop(block)


def blocks_held(context: int, prompts: int, tokens: int) -> int:
    """Blocks of keys and values that lanes hold at most, of so many prompts at once with so many tokens in all, or of one that is
    longer: the trunk, what each prompt begins and ends in the middle of, what they are longer by, and further hands."""
    return -(-context // BLOCK) + 2 * prompts + -(-min(max(tokens, context), prompts * context) // BLOCK) + BESIDE


def _walks(planted: Sequence[Planted], hands: Sequence[Sequence[list[int]]], before: int) -> list[list[_Piece]]:
    """What each hand reads, one piece after another: whole branches, in turn."""
    found = []
    for at, (one, own) in enumerate(zip(planted, hands)):
        walks: list[list[_Piece]] = [[] for _ in own]
        depths, turn = one.depths(), -1
        for chain in one.chains():
            turn += one.forks(chain)
            table = own[turn % len(own)]
            walks[turn % len(own)].append(_Piece(at, chain, table, before + depths[chain[0]]))
        found += walks
    return found


def _steps(pieces: Sequence[_Piece], planted: Sequence[Planted], most: int) -> Iterator[list[_Piece]]:
    """The pieces in steps of at most TOKENS tokens and `most` rows of logits; what is too long goes on in the next."""
    step: list[_Piece] = []
    tokens = rows = 0
    for piece in pieces:
        asked, start = planted[piece.which].asked, 0
        for at, place in enumerate(piece.places):
            if tokens == TOKENS or (rows == most and place in asked):
                if at > start:
                    step.append(piece.part(start, at))
                yield step
                step, tokens, rows, start = [], 0, 0, at
            tokens, rows = tokens + 1, rows + (place in asked)
        step.append(piece.part(start, len(piece.places)))
    if step:
        yield step
