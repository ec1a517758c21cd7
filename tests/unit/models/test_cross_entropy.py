"""The chunked head and loss equals the plain one, value and gradients, whatever the chunk, scale, cap and bias."""

import pytest
import torch

from luthier.models import cross_entropy
from luthier.models.cross_entropy import LinearCrossEntropy, naive_token_loss, naive_token_nll, token_loss, token_nll
from luthier.models.output import Head, OwnHead, head_of
from tiny import ALL_FAMILIES, tiny_loaded


@pytest.mark.parametrize("chunk", [1, 97 * 40, cross_entropy.CHUNK])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, None), (2.0, 5.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_plain_form(monkeypatch, chunk, scale, softcap, biased):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(75, 24, requires_grad=True)
    weight = torch.randn(97, 24, requires_grad=True)
    bias = torch.randn(97, requires_grad=True) if biased else None
    target, weights = torch.randint(0, 97, (75,)), torch.rand(75)
    head = Head(weight, bias, scale, softcap)
    learned = [one for one in (hidden, weight, bias) if one is not None]
    plain, ours = naive_token_loss(head, hidden, target, weights), token_loss(head, hidden, target, weights)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-4)
    pairs = zip(torch.autograd.grad(ours * 0.3, learned), torch.autograd.grad(plain * 0.3, learned))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    each, plainly = token_nll(head, hidden, target), naive_token_nll(head, hidden, target)
    torch.testing.assert_close(each, plainly, rtol=1e-6, atol=1e-5)
    # A loss that is no sum over tokens: each gets a gradient of its own.
    for mine, theirs in zip(*(torch.autograd.grad((one**2 * weights).sum(), learned) for one in (each, plainly))):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(token_nll(head, hidden, target), plainly.detach(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_family_s_own_head_in_chunks_equals_all_at_once(monkeypatch, family):
    model = tiny_loaded(family)
    for head in {id(one): one for one in (OwnHead(model.module), head_of(model))}.values():
        width = model.module.get_input_embeddings().weight.shape[1]
        hidden, target = torch.randn(50, width, requires_grad=True), torch.randint(3, 90, (50,))
        monkeypatch.setattr(cross_entropy, "CHUNK", 1)
        ours = token_loss(head, hidden, target, torch.ones(50), smoothing=0.1)
        plain = naive_token_loss(head, hidden, target, torch.ones(50), smoothing=0.1)
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)
        mine, theirs = torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(plain, hidden)[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        each, plainly = token_nll(head, hidden, target), naive_token_nll(head, hidden, target)
        torch.testing.assert_close(each, plainly, rtol=1e-6, atol=1e-5)
        mine, theirs = (torch.autograd.grad((one**2).sum(), hidden)[0] for one in (each, plainly))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_frozen_weight_gets_no_gradient():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    token_loss(Head(weight), hidden, torch.tensor([0, 1, 2, 3, 4]), torch.ones(5)).backward()
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    token_nll(Head(weight), hidden, torch.tensor([0, 1, 2, 3, 4])).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_extreme_logits_stay_finite():
    hidden = torch.full((3, 4), 1e4, requires_grad=True)
    weight = torch.eye(4).repeat(2, 1).requires_grad_()
    loss = LinearCrossEntropy.apply(hidden, weight, None, torch.tensor([0, 1, 2]), torch.ones(3), 1.0, None)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()
