"""The order of many numbers, sooner than by sorting them with their places in torch: numpy sorts whole words many at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PLACES = 0xFFFFFFFF


def order(values_N: Tensor) -> Tensor:
    """[N]: the places of these numbers (fp32 or fp64), the lowest first, and of equal ones the first place first: those of
    `naive_order`. Off the CPU it is that."""
    if values_N.device.type != "cpu" or values_N.dtype not in (torch.float32, torch.float64):
        return naive_order(values_N)
    # Zeros below and above zero are one number.
    values = (values_N.detach() + 0.0).numpy()
    if values.dtype == np.float32:
        bits = values.view(np.int32)
        # As whole numbers, those below zero count down.
        ranks = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
        return _sorted(ranks, np.arange(len(values)))
    loose = np.argsort(values)
    found = values[loose]
    ranks = np.zeros(len(values), dtype=np.int64)
    np.cumsum(found[1:] != found[:-1], out=ranks[1:])
    return _sorted(ranks, loose)


def naive_order(values_N: Tensor) -> Tensor:
    """The same, by torch."""
    return values_N.sort(stable=True).indices


def _sorted(ranks: np.ndarray, places: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort((ranks << 32) | places) & PLACES)
