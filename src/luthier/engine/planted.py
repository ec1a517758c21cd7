"""A prompt with all its continuations as one tree of tokens: what they begin alike with stands in it once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luthier.models.trees import Tree


@dataclass(frozen=True, slots=True)
class Planted:
    """What is left of a prompt after a trunk, the stem, and the branches that its continuations are.

    `steps` are the tokens to be predicted, each with the place in the tree of the token that they follow; a path is the steps
    of one continuation; `asked` are the tokens of the steps by that place.
    """

    tree: Tree
    stem: int
    steps: list[tuple[int, int]]
    paths: list[list[int]]
    asked: dict[int, list[int]]

    def depths(self) -> list[int]:
        """How many tokens of the tree lead to each."""
        found: list[int] = []
        for up in self.tree.ups:
            found.append(found[up] + 1 if up >= 0 else 0)
        return found

    def chains(self) -> Iterator[range]:
        """The places of branches, in pieces that do not fork. In this order every piece follows one of the tokens that
        lead to the end of the piece before it."""
        start = self.stem
        for at in range(self.stem + 1, len(self.tree.ids)):
            if self.tree.ups[at] != at - 1:
                yield range(start, at)
                start = at
        if start < len(self.tree.ids):
            yield range(start, len(self.tree.ids))

    def forks(self, chain: range) -> bool:
        """Whether a piece follows the stem."""
        return self.tree.ups[chain[0]] == self.stem - 1


def plant(stem: Sequence[int], continuations: Sequence[Sequence[int]]) -> Planted:
    """The tree of a prompt of one token at least. The last token of a continuation is in it only where another goes on."""
    ids, ups = list(stem), list(range(-1, len(stem) - 1))
    steps: dict[tuple[int, int], int] = {}
    grown: dict[tuple[int, int], int] = {}
    asked: dict[int, list[int]] = {}
    paths: list[list[int]] = [[] for _ in continuations]
    # In the order of a dictionary a continuation has most in common with the one before it.
    for which in sorted(range(len(continuations)), key=lambda which: tuple(continuations[which])):
        one, at = continuations[which], len(stem) - 1
        for left, token in zip(range(len(one) - 1, -1, -1), one):
            step = at, token
            if step not in steps:
                steps[step] = len(steps)
                asked.setdefault(at, []).append(token)
            paths[which].append(steps[step])
            if left and step not in grown:
                grown[step] = len(ids)
                ids.append(token)
                ups.append(at)
            at = grown.get(step, -1)
    return Planted(Tree(tuple(ids), tuple(ups)), len(stem), list(steps), paths, asked)
