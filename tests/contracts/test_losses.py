"""What every loss must hold: one value a row, gradients that flow, a perfect answer that costs (almost) nothing."""

import pytest
import torch

from luthier.training.losses import LOSSES


@pytest.mark.parametrize("kind", LOSSES.names())
def test_rows_gradients_and_the_perfect_answer(kind):
    loss = LOSSES.parse(kind)
    torch.manual_seed(0)
    if loss.fits == "classes":
        scores, gold = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
        perfect = torch.nn.functional.one_hot(gold, 3) * 50.0
    else:
        scores, gold = torch.randn(5, 1, requires_grad=True), torch.randn(5)
        perfect = gold[:, None].clone()
    rows = loss.rows(scores, gold)
    assert rows.shape == (5,) and rows.dtype == torch.float32 and (rows >= 0).all()
    rows.sum().backward()
    assert float(scores.grad.abs().max()) > 0
    assert float(loss.rows(perfect, gold).max()) < 1e-5


@pytest.mark.parametrize("kind", LOSSES.names())
def test_half_precision_scores_are_summed_in_fp32(kind):
    loss = LOSSES.parse(kind)
    gold = torch.tensor([0, 1]) if loss.fits == "classes" else torch.tensor([0.5, -0.5])
    scores = torch.zeros(2, 2 if loss.fits == "classes" else 1, dtype=torch.bfloat16)
    assert loss.rows(scores, gold).dtype == torch.float32
