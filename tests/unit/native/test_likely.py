"""How likely tokens are by rows of logits: the kernel gives what plain torch gives, and a row the same whatever is beside it."""

import pytest
import torch

from luthier.native.likely import log_shares, naive_log_shares

COLUMNS = [[3], [], [0, 1, 998], [5, 5]]


def made(dtype, width=999):
    return (torch.randn(len(COLUMNS), 1024, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)[:, :width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_what_plain_torch_gives(dtype):
    logits_RV = made(dtype)
    logits_RV[2, 40:] = -torch.inf
    ours, plain = log_shares(logits_RV, COLUMNS), naive_log_shares(logits_RV, COLUMNS)
    assert ours.shape == (6,) and ours.dtype == plain.dtype == torch.float32
    assert torch.allclose(ours, plain, atol=1e-5, rtol=1e-6) and ours[3] == -torch.inf


def test_a_row_alone_gives_the_same_bits():
    logits_RV = made(torch.float32)
    together = log_shares(logits_RV, COLUMNS).split([len(one) for one in COLUMNS])
    for at, columns in enumerate(COLUMNS):
        assert torch.equal(log_shares(logits_RV[at : at + 1], [columns]), together[at])


def test_what_is_no_number_stays_visible():
    logits_RV = made(torch.float32)
    logits_RV[0, 500] = torch.nan
    found = log_shares(logits_RV, COLUMNS)
    assert found[0].isnan() and found[1:].isfinite().all()


def test_rows_that_do_not_lie_side_by_side_are_taken_too():
    logits_RV = made(torch.float32)
    assert torch.equal(log_shares(logits_RV.T.contiguous().T, COLUMNS), naive_log_shares(logits_RV, COLUMNS))
