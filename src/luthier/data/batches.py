"""Encoded rows to tensors: which rows go into which step, and how they are laid side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from luthier.core.types import Encoded


@dataclass(slots=True)
class Batch:
    """Rows side by side, padded on the right. B rows, T tokens, S target tokens.

    Padding is known by position (`mask_BT`), never by the pad token's id. `weight` is the sum of everything that
    counts in this batch: the loop adds it up over the whole step before it divides.
    """

    names: list[str]
    ids_BT: Tensor
    mask_BT: Tensor
    weights_BT: Tensor
    target_BS: Tensor | None = None
    target_weights_BS: Tensor | None = None
    gold: Tensor | None = None
    row_weights_B: Tensor | None = None
    weight: float = 0.0
    tokens: int = 0
    """Real tokens, padding left out; both sides of an encoder-decoder."""

    def to(self, device: torch.device) -> Self:
        """Move every tensor to `device`, in place."""
        for name in ("ids_BT", "mask_BT", "weights_BT", "target_BS", "target_weights_BS", "gold", "row_weights_B"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=True))
        return self


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Lay `rows` side by side. Padded places hold `pad_id`, mask 0 and weight 0."""
    ids_BT, mask_BT = _pad([row.ids for row in rows], pad_id)
    batch = Batch(
        names=[row.id for row in rows],
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        weights_BT=_pad_floats([row.weights for row in rows], ids_BT.shape[1]),
        row_weights_B=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        tokens=sum(len(row.ids) + len(row.target) for row in rows),
    )
    batch.weights_BT *= batch.row_weights_B[:, None]
    if rows[0].target:
        batch.target_BS, _ = _pad([row.target for row in rows], pad_id)
        batch.target_weights_BS = _pad_floats([row.target_weights for row in rows], batch.target_BS.shape[1])
        batch.target_weights_BS *= batch.row_weights_B[:, None]
        batch.weight = float(batch.target_weights_BS.sum(dtype=torch.float64))
    elif rows[0].gold is not None:
        dtype = torch.int64 if isinstance(rows[0].gold, int) else torch.float32
        batch.gold = torch.tensor([row.gold for row in rows], dtype=dtype)
        batch.weight = float(batch.row_weights_B.sum(dtype=torch.float64))
    else:
        batch.weight = float(batch.weights_BT.sum(dtype=torch.float64))
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


def split_step(rows: Sequence[int], lengths: Sequence[int], parts: int) -> Iterator[list[int]]:
    """The rows of one step in at most `parts` micro-batches of rows alike in length; none is empty."""
    ordered = sorted(rows, key=lambda row: lengths[row])
    parts = min(parts, len(ordered))
    for part in range(parts):
        yield ordered[part * len(ordered) // parts : (part + 1) * len(ordered) // parts]


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _pad_floats(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    weights = np.zeros((len(rows), width), dtype=np.float32)
    for at, row in enumerate(rows):
        weights[at, : len(row)] = row
    return torch.from_numpy(weights)
