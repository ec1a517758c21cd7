"""The softmax of attention in C equals plain torch, forward and backward."""

import pytest
import torch

from luthier.native.build import NoLibrary, load_library
from luthier.native.softmax import LONGEST, can_see, naive_seen_softmax, seen_softmax_, seen_softmax_backward_

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3}}


@pytest.fixture(autouse=True)
def library():
    try:
        load_library()
    except NoLibrary as why:
        pytest.skip(f"no library: {why}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 50])
@pytest.mark.parametrize(
    ("own", "before"), [((1,), (0,)), ((40, 37), (0, 0)), ((3, 2, 1), (70, 70, 41)), ((80,), (9,))]
)
def test_shares_and_their_gradient(dtype, causal, window, own, before):
    torch.manual_seed(0)
    shape = (len(own), 3, max(own), max(before) + max(own))
    scores, grad = (torch.randn(shape).mul(4).to(dtype) for _ in range(2))
    rules = (torch.tensor([own, before]), causal, window, 0.5)
    wide = scores.float().requires_grad_()
    plain = naive_seen_softmax(wide, *rules)
    ours = seen_softmax_(scores.clone(), *rules)
    torch.testing.assert_close(ours.float(), plain, **TOLERANCE[dtype])
    (theirs,) = torch.autograd.grad(plain, wide, grad.float())
    mine = seen_softmax_backward_(grad.clone(), ours, *rules).float()
    torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype]["rtol"], atol=10 * TOLERANCE[dtype]["atol"])


def test_what_is_seen_by_hand():
    """Two tokens of their own after a parent of one, in room for three and two: equal scores are equal shares."""
    scores = torch.zeros(1, 1, 3, 5)
    sizes = torch.tensor([[2], [1]])
    third = 1 / 3
    causal = seen_softmax_(scores.clone(), sizes, True, None, 1.0)
    expected = [[0, 0.5, 0.5, 0, 0], [0, third, third, third, 0], [0, 0, 0, 0, 0]]
    torch.testing.assert_close(causal[0, 0], torch.tensor(expected))
    near = seen_softmax_(scores.clone(), sizes, False, 2, 1.0)
    expected = [[0, third, third, third, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 0]]
    torch.testing.assert_close(near[0, 0], torch.tensor(expected))


def test_what_is_no_number_stays_visible():
    scores = torch.zeros(1, 1, 40, 40)
    scores[0, 0, 3, 2] = float("nan")
    scores[0, 0, 39, 5] = float("inf")
    shares = seen_softmax_(scores, torch.tensor([[40], [0]]), True, None, 1.0)[0, 0]
    assert not shares[3, :4].isfinite().any() and not shares[39].isfinite().all()
    assert shares[:3].isfinite().all() and shares[4:39].isfinite().all()


def test_rows_too_long_for_the_kernel_are_left_to_torch():
    assert can_see(torch.empty(1, 1, 1, LONGEST)) and not can_see(torch.empty(1, 1, 1, LONGEST + 1))
    assert not can_see(torch.empty(1, 1, 1, 8, dtype=torch.float64))
