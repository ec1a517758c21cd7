"""Rows of logits of which only some tokens may be chosen: the C kernel of masks.h, and its twin in plain torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.native.layers import LONG, kernel, usable

Mask: TypeAlias = "ctypes.Array[ctypes.c_int32]"
"""A bit for each token, set where it may come. Finding out where an array of numpy lies takes longer than the kernel."""


def mask_rows_(logits_RV: Tensor, rows: Sequence[int], masks: Sequence[Mask]) -> None:
    """In place: in these rows -inf wherever the bit of a token is not set in the row's mask (words as many in each, the
    lowest bit first), or the mask has none. All else keeps its bits. Where there are no kernels, the same in plain torch."""
    if not usable(logits_RV) or logits_RV.stride(1) != 1:
        naive_mask_rows_(logits_RV, rows, masks)
        return
    numbers = LONG * len(rows)
    places, addresses = numbers(*rows), numbers(*map(ctypes.addressof, masks))
    kernel("mask_rows", logits_RV)(
        logits_RV.data_ptr(), ctypes.addressof(places), ctypes.addressof(addresses), len(rows), len(masks[0]),
        logits_RV.shape[1], logits_RV.stride(0),
    )  # fmt: skip


def naive_mask_rows_(logits_RV: Tensor, rows: Sequence[int], masks: Sequence[Mask]) -> None:
    """The same, by a boolean for every token of every row."""
    width, device = logits_RV.shape[1], logits_RV.device
    words_SW = torch.from_numpy(np.stack([np.frombuffer(memoryview(one), dtype=np.int32) for one in masks])).to(device)
    unset_SN = (words_SW[:, :, None] >> torch.arange(32, device=device) & 1).flatten(1)[:, :width] == 0
    unset_SV = F.pad(unset_SN, (0, width - unset_SN.shape[1]), value=True)
    places = torch.tensor(rows, device=device)
    logits_RV[places] = logits_RV[places].masked_fill_(unset_SV, -torch.inf)
