"""The order of many numbers is that of torch's own stable sort, and what is kept of a vocabulary is the same."""

import pytest
import torch

from luthier.engine import choose
from luthier.engine.order import naive_order, order
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling


def numbers(kind, dtype, count=5000):
    found = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if kind == "equal":
        found = (found * 3).round()
    if kind == "endless":
        found[::7], found[1::7] = torch.inf, -torch.inf
    if kind == "zeros":
        found[::2], found[1::3] = 0.0, -0.0
    return found * (1e-3 if kind == "near" else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["apart", "near", "equal", "endless", "zeros"])
def test_the_order_is_that_of_torch(kind, dtype):
    for count in (1, 2, 5000):
        values_N = numbers(kind, dtype, count)
        before = values_N.clone()
        assert torch.equal(order(values_N), naive_order(values_N)) and torch.equal(values_N, before)


@pytest.mark.parametrize("kind", ["apart", "near", "equal"])
@pytest.mark.parametrize("settings", [{"top_p": 0.99}, {"top_p": 0.5}, {"typical_p": 0.9}, {"typical_p": 0.2}], ids=str)
def test_what_is_kept_of_a_flat_distribution_is_what_torch_keeps(kind, settings, monkeypatch):
    request = Request((5,), Sampling(temperature=1.0, **settings), 8, 0, float)
    found = choose.shares_of(numbers(kind, torch.float32), request)
    monkeypatch.setattr(choose, "order", naive_order)
    right = choose.shares_of(numbers(kind, torch.float32), request)
    assert torch.equal(found[0], right[0]) and 1 < int((found[0] > 0).sum()) < 5000
    assert found[1] is right[1] is None or torch.equal(found[1], right[1])
