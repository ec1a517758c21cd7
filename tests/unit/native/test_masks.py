"""Masks over rows of logits: the kernel leaves bit for bit what plain torch leaves."""

import ctypes

import numpy as np
import pytest
import torch

from luthier.native import masks
from luthier.native.masks import mask_rows_, naive_mask_rows_

WIDE = {"less than its words": 90, "its words": 96, "part of a word more": 101, "many": 3000}


def made(rows, words, share, seed=0):
    """Masks of which a share of the bits is set, with words of none and of all among them."""
    draw = np.random.default_rng(seed)
    bits = draw.random((rows, words, 32)) < share
    bits[:, ::5], bits[:, 1::7] = False, True
    words_SW = np.packbits(bits.reshape(rows, -1), axis=1, bitorder="little").view(np.int32)
    return [(ctypes.c_int32 * words)(*row) for row in words_SW.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_the_kernel_leaves_what_plain_torch_leaves(dtype, width, share):
    whole_RV = torch.randn(7, width + 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole_RV[2, 3:6] = torch.tensor([-0.0, torch.nan, torch.inf])
    # As the native decoder gives them: rows that are farther apart than they are wide.
    ours_RV, plain_RV = (whole_RV.clone()[:, :width] for _ in range(2))
    rows = [5, 0, 2]
    given = made(len(rows), 94 if width == 3000 else 3, share)
    mask_rows_(ours_RV, rows, given)
    naive_mask_rows_(plain_RV, rows, given)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ours_RV.view(as_bits), plain_RV.view(as_bits))
    for row, mask in zip(rows, given):
        for at in range(width):
            may = at < 32 * len(mask) and int(mask[at // 32]) >> (at % 32) & 1
            assert (plain_RV[row, at] == -torch.inf) == (not may)
    assert torch.equal(ours_RV[[1, 3, 4, 6]], whole_RV[[1, 3, 4, 6], :width])


def test_many_rows_are_shared_out_over_threads_alike():
    logits_RV = torch.randn(40, 40_000, generator=torch.Generator().manual_seed(0))
    ours_RV, plain_RV, given = logits_RV.clone(), logits_RV.clone(), made(40, 1250, 0.3)
    mask_rows_(ours_RV, list(range(40)), given)
    naive_mask_rows_(plain_RV, list(range(40)), given)
    assert torch.equal(ours_RV, plain_RV)


def test_rows_that_do_not_lie_side_by_side_go_by_plain_torch(monkeypatch):
    logits_RV, given = torch.randn(5, 64).T.contiguous().T, made(1, 2, 0.5)
    right_RV = logits_RV.clone()
    naive_mask_rows_(right_RV, [3], given)
    monkeypatch.setattr(masks, "kernel", None)
    mask_rows_(logits_RV, [3], given)
    assert torch.equal(logits_RV, right_RV)
