"""Encoded rows to tensors: which rows go into which step, and how they are laid side by side."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from luthier.core.types import Encoded


@dataclass(slots=True)
class Batch:
    """Rows end to end: one flat batch for every objective. N tokens, S segments, M target tokens.

    There is no padding. `lengths` (on the host) says where one segment ends and the next begins; a segment is a text
    that attends to itself alone: a row, or one of the documents in a row of packed text. `weight` is the sum of
    everything that counts in this batch: the loop adds it up over the whole step before it divides.
    """

    names: list[str]
    ids_N: Tensor
    lengths: tuple[int, ...]
    weights_N: Tensor
    """How much predicting each token counts."""
    places_M: Tensor
    """The places of tokens that weigh anything: known on the host, so that no device has to be asked."""
    previous_N: Tensor
    """The place of the token before each: the one to its left, the last of the parent for a segment that has one."""
    parents: tuple[int, ...] = ()
    """For each segment the one that it continues, or -1; empty: none does. A parent has no parent of its own."""
    gold: Tensor | None = None
    """Class index [S], multi-hot [S, C] or number [S] of each row; the original ids [N] of masked tokens."""
    row_weights_S: Tensor | None = None
    target_M: Tensor | None = None
    """The decoder's side, for an encoder-decoder."""
    target_lengths: tuple[int, ...] = ()
    target_weights_M: Tensor | None = None
    weight: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of both sides."""
        return sum(self.lengths) + sum(self.target_lengths)

    def to(self, device: torch.device) -> Self:
        """Move every tensor to `device`, in place."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                setattr(self, one.name, value.to(device, non_blocking=True))
        return self


def collate(rows: Sequence[Encoded]) -> Batch:
    """Lay `rows` end to end."""
    lengths = tuple(length for row in rows for length in row.segments or (len(row.ids),))
    parents = _parents(rows)
    weights_N = _floats([row.weights or (0.0,) * len(row.ids) for row in rows], rows)
    batch = Batch(
        names=[row.id for row in rows],
        ids_N=_ids([row.ids for row in rows]),
        lengths=lengths,
        previous_N=_previous(lengths, parents),
        parents=parents,
        weights_N=weights_N,
        places_M=weights_N.nonzero().squeeze(1),
        row_weights_S=torch.tensor([row.weight for row in rows], dtype=torch.float32),
    )
    if rows[0].target:
        batch.target_M = _ids([row.target for row in rows])
        batch.target_lengths = tuple(len(row.target) for row in rows)
        batch.target_weights_M = _floats([row.target_weights for row in rows], rows)
        batch.weight = float(batch.target_weights_M.sum(dtype=torch.float64))
    elif rows[0].gold is not None:
        dtype = torch.int64 if isinstance(rows[0].gold, int) else torch.float32
        batch.gold = torch.tensor([row.gold for row in rows], dtype=dtype)
        batch.weight = float(batch.row_weights_S.sum(dtype=torch.float64))  # type: ignore[union-attr]
    else:
        batch.weight = float(batch.weights_N.sum(dtype=torch.float64))
    return batch


def plan_steps(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, by_length: bool) -> list[list[int]]:
    """The rows of each step of one epoch: a pure function of its arguments, so a resumed run sees the same order.

    Every row appears once; the last step may be smaller. `by_length` sorts inside windows of 50 steps, so that rows
    of a step are alike in length and little is padded, and then shuffles the steps.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not by_length:
        return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
    sizes = np.asarray(lengths)
    steps: list[list[int]] = []
    window = batch_size * 50
    for start in range(0, len(order), window):
        inside = order[start : start + window]
        inside = inside[np.argsort(sizes[inside], kind="stable")]
        steps += [inside[at : at + batch_size].tolist() for at in range(0, len(inside), batch_size)]
    return [steps[at] for at in random.permutation(len(steps))]


def split_step(rows: Sequence[int], lengths: Sequence[int], parts: int, tokens: int) -> list[list[int]]:
    """The rows of one step in micro-batches of at most `tokens` tokens (a longer row is one alone), and at least `parts`.

    Best fit; where there should be several, by falling length each into the emptiest that has room. Deterministic.
    """
    parts = min(parts, len(rows))
    if parts == 1:
        return [[rows[at] for at in one] for one in best_fit([lengths[row] for row in rows], tokens)]
    bins: list[list[int]] = [[] for _ in range(parts)]
    room = [tokens] * parts
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        at = max(range(len(bins)), key=lambda at: (not bins[at], room[at], -at))
        if bins[at] and room[at] < lengths[row]:
            at = len(bins)
            bins.append([])
            room.append(tokens)
        bins[at].append(row)
        room[at] -= lengths[row]
    return bins


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Places of `lengths` for each of `hands` processes: by falling length, each to the one with the fewest tokens so far.

    Deterministic; a hand stays empty where there are too few. Within one the order is kept.
    """
    if hands == 1:
        return [list(range(len(lengths)))]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    held = [0] * hands
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        hand = min(range(hands), key=lambda hand: (held[hand], hand))
        dealt[hand].append(at)
        held[hand] += lengths[at]
    return [sorted(hand) for hand in dealt]


def best_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Places of `lengths` in bins of `limit`: by falling length, each into the fullest bin that has room (Johnson 1974).

    A length over the limit is alone.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        place = bisect_left(rooms, lengths[at])
        if place < len(rooms):
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
            bins[chosen].append(at)
        else:
            room, chosen = limit, len(bins)
            bins.append([at])
        left = room - lengths[at]
        if left > 0:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return bins


def fill_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in batches of at most `tokens` tokens (a longer row is alone), rows alike in length together."""
    batches: list[list[int]] = []
    held = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not batches or held + lengths[row] > tokens:
            batches.append([])
            held = 0
        batches[-1].append(row)
        held += lengths[row]
    return batches


def _parents(rows: Sequence[Encoded]) -> tuple[int, ...]:
    """The parents of all segments, counted through the batch; empty where no row has any."""
    if not any(row.parents for row in rows):
        return ()
    parents: list[int] = []
    for row in rows:
        first = len(parents)
        parents += [at + first if at >= 0 else -1 for at in row.parents or (-1,) * max(1, len(row.segments))]
    return tuple(parents)


def _previous(lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    """[N]: the place before each token; a segment without a parent begins after itself, where nothing is learned."""
    places_N = torch.arange(sum(lengths)) - 1
    starts = np.cumsum([0, *lengths])
    for at in range(len(lengths)):
        parent = parents[at] if parents else -1
        places_N[starts[at]] = starts[parent + 1] - 1 if parent >= 0 else starts[at]
    return places_N


def _ids(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))


def _floats(weights: Sequence[Sequence[float]], rows: Sequence[Encoded]) -> Tensor:
    """The rows' own weights times the weight of each row, end to end."""
    scaled = [np.asarray(one) * row.weight for one, row in zip(weights, rows)]
    return torch.from_numpy(np.concatenate(scaled).astype(np.float32))
