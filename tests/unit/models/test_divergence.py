"""The divergence from hidden states: by hand, against all logits at once, with gradients and bounded memory."""

from math import log, sqrt

import pytest
import torch

from luthier.models import divergence
from luthier.models.divergence import Aim, divergence_loss, naive_divergence_loss
from luthier.models.load import load_model
from luthier.models.output import Head, OwnHead
from tiny import tiny_loaded, tiny_model

AIMS = [
    Aim(),
    Aim(beta=1.0, temperature=2.0),
    Aim(beta=0.5),
    Aim(beta=0.1, temperature=0.5, hard=0.3),
    Aim(hard=0.9),
]


def logits(*shares: float) -> torch.Tensor:
    return torch.tensor([shares], dtype=torch.float64).log()


def test_by_hand():
    p, q, target = logits(0.5, 0.5), logits(0.9, 0.1), torch.tensor([1])

    def value(**settings) -> float:
        return float(Aim(**settings).losses(q, p, target))

    forward = 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)
    assert value() == pytest.approx(forward)
    assert value(beta=1.0) == pytest.approx(0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5))
    # a quarter of the teacher: M = (0.8, 0.2)
    to_p = 0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)
    to_q = 0.9 * log(0.9 / 0.8) + 0.1 * log(0.1 / 0.2)
    assert value(beta=0.25) == pytest.approx(0.25 * to_p + 0.75 * to_q)
    # at temperature 2 the shares of q are 3/4 and 1/4; times 2^2
    assert value(temperature=2.0) == pytest.approx(4 * (0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)))
    assert value(hard=0.2) == pytest.approx(0.8 * forward + 0.2 * log(10))
    assert float(Aim(beta=0.5).losses(p, p, target)) == pytest.approx(0, abs=1e-12)
    assert sqrt(0.9) / (sqrt(0.9) + sqrt(0.1)) == pytest.approx(0.75)


def made(dtype: torch.dtype, bias: bool = False, **settings):
    torch.manual_seed(1)
    hidden_NE = torch.randn(300, 16, dtype=dtype)
    taught_ND = torch.randn(300, 24, dtype=dtype)
    head = Head(torch.randn(50, 16, dtype=dtype), torch.randn(50, dtype=dtype) if bias else None, **settings)
    teacher = Head(torch.randn(56, 24, dtype=dtype))  # with six rows of padding
    return hidden_NE, head, teacher, taught_ND, torch.randint(50, (300,)), torch.rand(300) * 2 - 0.5


def gradients(loss, head, hidden_NE, *rest):
    hidden_NE = hidden_NE.clone().requires_grad_()
    learning = [hidden_NE, head.weight_VE.requires_grad_()]
    if head.bias_V is not None:
        learning.append(head.bias_V.requires_grad_())
    value = loss(head, hidden_NE, *rest)
    (value * 0.7).backward()
    found = [one.grad.clone() for one in learning]
    for one in learning:
        one.grad = None
    return float(value.detach()), found


@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"scale": 0.5, "softcap": 3.0}])
def test_chunks_give_what_all_logits_give(monkeypatch, aim, settings):
    monkeypatch.setattr(divergence, "CHUNK", 0)  # 32 rows at a time
    hidden_NE, head, *rest = made(torch.float32, **settings)
    value, found = gradients(divergence_loss, head, hidden_NE, *rest, aim)
    expected, others = gradients(naive_divergence_loss, head, hidden_NE, *rest, aim)
    assert value == pytest.approx(expected, rel=1e-5)
    for one, other in zip(found, others):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aim", AIMS)
def test_bfloat16_is_near(aim):
    hidden_NE, head, *rest = made(torch.bfloat16)
    value, found = gradients(divergence_loss, head, hidden_NE, *rest, aim)
    wide = Head(head.weight_VE.detach().float())
    teacher, taught_ND, *gold = rest
    exact, others = gradients(
        naive_divergence_loss, wide, hidden_NE.float(), Head(teacher.weight_VE.float()), taught_ND.float(), *gold, aim
    )
    assert value == pytest.approx(exact, rel=0.02)
    for one, other in zip(found, others):
        assert float((one.float() - other).norm() / other.norm()) < 0.03


def test_a_head_that_is_no_matrix(monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK", 0)
    model, other = tiny_loaded("gpt2"), load_model(str(tiny_model("gpt2", seed=1)))
    hidden_NE, taught_NE = torch.randn(2, 80, 32)
    gold = torch.randint(400, (80,)), torch.rand(80)
    weight_VE = model.module.get_output_embeddings().weight
    values, found = [], []
    for loss in (divergence_loss, naive_divergence_loss):
        states_NE = hidden_NE.clone().requires_grad_()
        value = loss(OwnHead(model.module), states_NE, OwnHead(other.module), taught_NE, *gold, Aim(beta=0.3))
        value.backward()
        values.append(float(value.detach()))
        found.append((states_NE.grad, weight_VE.grad.clone()))
        weight_VE.grad = None
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for one, twin in zip(*found):
        torch.testing.assert_close(one, twin, rtol=1e-4, atol=1e-6)


def test_never_the_logits_of_all_tokens(monkeypatch):
    """The largest tensor that is made holds the logits of one chunk."""
    monkeypatch.setattr(divergence, "CHUNK", 0)
    hidden_NE, head, *rest = made(torch.float32)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, torch.Tensor) and one.ndim == 2 and one.shape[1] >= 50:
                    largest = max(largest, one.shape[0])
            return out

    hidden_NE.requires_grad_()
    with Sizes():
        divergence_loss(head, hidden_NE, *rest, Aim(beta=0.5)).backward()
    assert largest == 32
