"""Weights in bfloat16 are moved in fp32: what is too small for one step is not lost over many."""

import torch
from torch.nn import Parameter

from luthier.training.masters import Masters


def test_small_steps_add_up():
    weight = Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters([("w", weight)])
    engine = torch.optim.SGD([p for _, p in masters.parameters], lr=1e-4)
    for _ in range(100):
        weight.sum().backward()
        engine.step()
        engine.zero_grad()
        masters.publish()
    # In bfloat16 alone, 1 - 1e-4 rounds back to 1 each time.
    torch.testing.assert_close(masters.parameters[0][1].detach(), torch.full((4,), 0.99), rtol=0, atol=1e-5)
    assert float(weight.detach()[0]) == 0.98828125


def test_gradients_of_micro_batches_add_up_in_fp32():
    weight = Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters([("w", weight)])
    for value in [256.0] + [0.5] * 8:
        (weight * value).sum().backward()
    assert weight.grad is None and float(masters.parameters[0][1].grad) == 260.0


def test_fp32_weights_are_their_own_masters():
    weight = Parameter(torch.zeros(3))
    assert Masters([("w", weight)]).parameters == [("w", weight)]
