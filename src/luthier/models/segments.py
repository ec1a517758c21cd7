"""The segments of a flat batch, and the plan to compute their attention: which are alike, and where their tokens lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Up to this length three matrix operations beat the fused kernel on a CPU (2 x Zen 5, bf16, forward and backward of
# 2,048 tokens: segments of 128 take 15 ms against 41, of 512 64 against 61).
SHORT = 320
# Segments are computed side by side while no more than this share of their scores is padding, and while the scores of a
# group stay small.
WASTE, SCORES = 0.25, 2**22


@dataclass(frozen=True, slots=True)
class Group:
    """S segments of like length side by side: T places for the tokens of each, after B for those of its parent.

    Places beyond a segment's end repeat its last token, places before a parent's start its first.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    """The segment that each continues; -1 where B is 0."""
    width: int
    before: int
    tokens: Tensor
    """[S, T]: the flat place of each token."""
    keys: Tensor
    """[S, B + T]: the flat places of what it may see."""
    real: Tensor
    """[S, T]: whether a place holds a token of its own."""
    sizes: Tensor
    """[2, S]: how many tokens each has, and how many its parent."""
    seen: Tensor | None
    """[S, B]: whether a place holds a token of the parent; None where all do."""

    @property
    def even(self) -> bool:
        return min(self.lengths) == self.width


class Segments:
    """The segments of a flat batch, and the plan to compute them: made once a step, on the host.

    A segment sees itself, and all of the one it continues where `parents` gives one (see Batch.parents). `short` are
    groups computed side by side, those without a parent first; `long` are the numbers of segments computed alone.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", parents: Sequence[int] = ()):
        self.lengths, self.device = tuple(lengths), torch.device(device)
        self.parents = tuple(parents) or (-1,) * len(self.lengths)
        self._starts = [0, *accumulate(lengths)]
        self.long: list[int] = []
        groups: list[list[int]] = []
        for at in sorted(range(len(self.lengths)), key=lambda at: (self.before(at), self.lengths[at])):
            if self._scores([at]) > SHORT**2:
                self.long.append(at)
            elif (found := next((one for one in groups if self._fits(at, one)), None)) is not None:
                found.append(at)
            else:
                groups.append([at])
        self.long.sort()
        self.short = [self._group(one) for one in groups]
        inside = [torch.arange(self._starts[at], self._starts[at + 1]) for at in self.long]
        self.long_tokens = torch.cat(inside).to(self.device) if inside else None
        self._kept: dict[tuple[object, ...], Any] = {}

    def before(self, at: int) -> int:
        """How many tokens stand before segment `at`: the length of its parent."""
        return self.lengths[self.parents[at]] if self.parents[at] >= 0 else 0

    def _scores(self, members: Sequence[int]) -> int:
        """Scores of a head when `members` are side by side, padding and all."""
        width, before = (max(map(size, members)) for size in (self.lengths.__getitem__, self.before))
        return len(members) * width * (before + width)

    def _fits(self, at: int, members: list[int]) -> bool:
        if (self.before(at) > 0) != (self.before(members[0]) > 0):
            return False
        together = [*members, at]
        area = self._scores(together)
        return area <= SCORES and sum(self._scores([one]) for one in together) >= (1 - WASTE) * area

    def _group(self, members: Sequence[int]) -> Group:
        lengths, parents = ([of[at] for at in members] for of in (self.lengths, self.parents))
        befores = [self.before(at) for at in members]
        width, before = max(lengths), max(befores)
        places_T, back_B = torch.arange(width), torch.arange(before, 0, -1)
        size_S1, before_S1 = torch.tensor(lengths)[:, None], torch.tensor(befores)[:, None]
        start_S1 = torch.tensor([self._starts[at] for at in members])[:, None]
        end_S1 = torch.tensor([self._starts[up + 1] for up in parents])[:, None]
        tokens_ST = start_S1 + torch.minimum(places_T, size_S1 - 1)
        keys_SK = torch.cat([end_S1 - torch.minimum(back_B, before_S1), tokens_ST], 1)
        return Group(
            lengths=tuple(lengths),
            parents=tuple(parents),
            width=width,
            before=before,
            tokens=tokens_ST.to(self.device),
            keys=keys_SK.to(self.device),
            real=(places_T < size_S1).to(self.device),
            sizes=torch.tensor([lengths, befores], device=self.device),
            seen=None if min(befores) == before else (back_B <= before_S1).to(self.device),
        )

    def rows(self, at: int, heads: int) -> tuple[Tensor, Tensor]:
        """Where the heads of group `at` lie in a flat [N * heads] list of vectors, in the order [S, heads, T]: (places to
        take from, places to put to). What is put for padding goes to the place N * heads."""

        def find() -> tuple[Tensor, Tensor]:
            group = self.short[at]
            take_SHT = group.tokens[:, None] * heads + self._heads(heads)
            put_SHT = torch.where(group.real[:, None], take_SHT, sum(self.lengths) * heads)
            return take_SHT.flatten(), put_SHT.flatten()

        return self._once(("rows", at, heads), find)

    def key_rows(self, at: int, heads: int) -> Tensor:
        """The places to take from of all that group `at` may see, in the order [S, heads, B + T]."""
        group = self.short[at]
        if not group.before:
            return self.rows(at, heads)[0]
        return self._once(("keys", at, heads), lambda: (group.keys[:, None] * heads + self._heads(heads)).flatten())

    def parent_rows(self, at: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """For the P different parents of group `at`: (which of them each segment has, the places in the order
        [P, heads, B] that hold a token, and where those lie in a flat [N * heads] list)."""

        def find() -> tuple[Tensor, Tensor, Tensor]:
            group = self.short[at]
            different = sorted(set(group.parents))
            which_S = torch.tensor([different.index(up) for up in group.parents], device=self.device)
            firsts = [group.parents.index(up) for up in different]
            put_PHB = group.keys[firsts, None, : group.before] * heads + self._heads(heads)
            # Places before a parent's start hold none; found on the host, where the lengths are.
            held_PB = torch.arange(group.before, 0, -1) <= torch.tensor([self.lengths[up] for up in different])[:, None]
            take = held_PB[:, None].expand(-1, heads, -1).flatten().nonzero().squeeze(1).to(self.device)
            return which_S, take, put_PHB.flatten()[take]

        return self._once(("parents", at, heads), find)

    def mask(self, width: int, before: int, causal: bool, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[T, B + T] to add to the scores of `width` tokens with `before` in front of them; None where each sees all."""
        return self._once(
            ("mask", width, before, causal, window, dtype),
            lambda: make_mask(width, before, causal, window, dtype, self.device),
        )

    def _heads(self, heads: int) -> Tensor:
        return torch.arange(heads, device=self.device)[:, None]

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        made: T = self._kept[key]
        return made


def owners(lengths: Sequence[int]) -> Tensor:
    """[N], on the host: the segment of each token."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def make_mask(
    width: int, before: int, causal: bool, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """[T, B + T]: 0 where a token sees another, the lowest number where it does not; None where each sees all."""
    if not causal and (window is None or before + width <= window):
        return None
    away_TK = torch.arange(width, device=device)[:, None] + before - torch.arange(before + width, device=device)
    seen_TK = away_TK.abs() < (window or before + width)
    if causal:
        seen_TK &= away_TK >= 0
    return torch.zeros(away_TK.shape, dtype=dtype, device=device).masked_fill_(~seen_TK, torch.finfo(dtype).min)
