"""The moving average of the weights, by hand, and the swap that is undone bit for bit."""

import pytest
import torch
from torch.nn import Parameter

from luthier.training.averages import MovingAverage


def test_the_average_by_hand():
    weight = Parameter(torch.tensor([0.0]))
    ema = MovingAverage([("w", weight)], 0.15)
    found = []
    for value in (1.0, 2.0, 3.0):
        weight.data.fill_(value)
        ema.update()
        ema.eval()
        found.append(float(weight.detach()))
        ema.train()
        assert float(weight.detach()) == value
    # d = 1/10, min(0.15, 2/11), min(0.15, 3/12).
    first = 0.9
    second = 0.15 * first + 0.85 * 2
    assert found == pytest.approx([first, second, 0.15 * second + 0.85 * 3])


def test_short_runs_follow_the_weights():
    weight = Parameter(torch.zeros(1))
    ema = MovingAverage([("w", weight)], 0.999)
    weight.data.fill_(1.0)
    for _ in range(10):
        ema.update()
    ema.eval()
    assert float(weight.detach()) > 0.99


def test_state_goes_on_and_swaps_do_not_pile_up():
    torch.manual_seed(0)
    weight = Parameter(torch.randn(5))
    one = MovingAverage([("w", weight)], 0.9)
    weight.data.add_(1.0)
    one.update()
    other = MovingAverage([("w", weight)], 0.9)
    other.load_state_dict(one.state_dict())
    before = weight.detach().clone()
    one.eval()
    one.eval()
    averaged = weight.detach().clone()
    one.train()
    one.train()
    assert torch.equal(weight, before) and not torch.equal(averaged, before)
    for ema in (one, other):
        ema.update()
        assert ema.steps == 2
    assert torch.equal(one.state_dict()["averages"][0], other.state_dict()["averages"][0])
