"""The chunked head and loss equals the plain one, value and gradients, whatever the chunk."""

import pytest
import torch

from luthier.training.objectives import causal


@pytest.mark.parametrize("chunk", [1, 97 * 40, causal.CHUNK])
def test_equals_the_plain_form(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(causal, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(75, 24, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(97, 24, requires_grad=True)
    target, weights = torch.randint(0, 97, (75,)), torch.rand(75)
    plain = causal.cross_entropy(hidden @ weight.t(), target, weights)
    plain_grads = torch.autograd.grad(plain * 0.3, (hidden, weight))
    ours = causal.LinearCrossEntropy.apply(hidden, weight, target, weights)
    our_grads = torch.autograd.grad(ours * 0.3, (hidden, weight))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-4)
    for mine, theirs in zip(our_grads, plain_grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_frozen_weight_gets_no_gradient():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    loss = causal.LinearCrossEntropy.apply(hidden, weight, torch.tensor([0, 1, 2, 3, 4]), torch.ones(5))
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_extreme_logits_stay_finite():
    hidden = torch.full((3, 4), 1e4, requires_grad=True)
    weight = torch.eye(4).repeat(2, 1).requires_grad_()
    loss = causal.LinearCrossEntropy.apply(hidden, weight, torch.tensor([0, 1, 2]), torch.ones(3))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()
