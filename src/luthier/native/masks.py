"""Rows of logits of which only some tokens may be chosen: the C kernel of masks.h, and its twin in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.native.layers import kernel, usable


def mask_rows_(logits_RV: Tensor, rows: Sequence[int], masks: Sequence[np.ndarray]) -> None:
    """In place: in these rows -inf wherever the bit of a token is not set in the row's mask (int32 words, as many in each, the
    lowest bit first), or the mask has none. All else keeps its bits. Where there are no kernels, the same in plain torch."""
    if not usable(logits_RV) or logits_RV.stride(1) != 1:
        naive_mask_rows_(logits_RV, rows, masks)
        return
    places = np.asarray(rows, dtype=np.int64)
    addresses = np.asarray([address_of(one) for one in masks], dtype=np.int64)
    kernel("mask_rows", logits_RV)(
        logits_RV.data_ptr(), address_of(places), address_of(addresses), len(rows), len(masks[0]), logits_RV.shape[1],
        logits_RV.stride(0),
    )  # fmt: skip


def naive_mask_rows_(logits_RV: Tensor, rows: Sequence[int], masks: Sequence[np.ndarray]) -> None:
    """The same, by a boolean for every token of every row."""
    width, device = logits_RV.shape[1], logits_RV.device
    words_SW = torch.from_numpy(np.stack(masks)).to(device)
    unset_SN = (words_SW[:, :, None] >> torch.arange(32, device=device) & 1).flatten(1)[:, :width] == 0
    unset_SV = F.pad(unset_SN, (0, width - unset_SN.shape[1]), value=True)
    places = torch.tensor(rows, device=device)
    logits_RV[places] = logits_RV[places].masked_fill_(unset_SV, -torch.inf)


def address_of(array: np.ndarray) -> int:
    """Where its numbers lie."""
    return int(array.__array_interface__["data"][0])
