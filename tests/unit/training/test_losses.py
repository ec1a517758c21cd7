"""Each loss against its formula, by hand."""

import math

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.training.losses import LOSSES
from luthier.training.losses.cross_entropy import balance


def test_cross_entropy_is_the_log_of_the_softmax():
    scores, gold = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([1])
    by_hand = -math.log(math.exp(1) / (math.exp(2) + math.exp(1) + math.exp(-1)))
    assert LOSSES.parse("cross_entropy").rows(scores, gold).item() == pytest.approx(by_hand, rel=1e-6)


def test_smoothing_moves_mass_to_all_classes():
    scores, gold, smoothing = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([0]), 0.3
    log_p = scores.log_softmax(-1)[0]
    target = [1 - smoothing + smoothing / 3, smoothing / 3, smoothing / 3]
    by_hand = -sum(share * float(value) for share, value in zip(target, log_p))
    loss = LOSSES.parse({"kind": "cross_entropy", "smoothing": smoothing})
    assert loss.rows(scores, gold).item() == pytest.approx(by_hand, rel=1e-5)


def test_several_labels_average_binary_losses():
    scores, gold = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 0.0]])
    by_hand = (-math.log(1 / (1 + math.exp(-0.5))) - math.log(1 - 1 / (1 + math.exp(1.0)))) / 2
    assert LOSSES.parse("cross_entropy").rows(scores, gold).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_focal_fades_sure_rows_and_is_cross_entropy_at_gamma_zero(several):
    torch.manual_seed(0)
    scores = torch.randn(6, 3)
    gold = torch.randint(0, 2, (6, 3)).float() if several else torch.randint(0, 3, (6,))
    plain = LOSSES.parse("cross_entropy").rows(scores, gold)
    torch.testing.assert_close(LOSSES.parse({"kind": "focal", "gamma": 0}).rows(scores, gold), plain)
    assert (LOSSES.parse({"kind": "focal", "gamma": 2}).rows(scores, gold) < plain).all()


def test_focal_by_hand():
    p = math.exp(1) / (math.exp(1) + 1)
    loss = LOSSES.parse({"kind": "focal", "gamma": 2}).rows(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(-((1 - p) ** 2) * math.log(p), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "errors"),
    [("mse", [0.25, 9.0]), ("mae", [0.5, 3.0]), ({"kind": "huber", "delta": 1.0}, [0.125, 2.5])],
)
def test_errors_of_numbers(name, errors):
    rows = LOSSES.parse(name).rows(torch.tensor([[1.5], [4.0]]), torch.tensor([1.0, 1.0]))
    assert rows.tolist() == pytest.approx(errors)


def test_balance_gives_every_class_the_same_total():
    weights = balance({"ham": 90, "spam": 10})
    assert 90 * weights["ham"] == pytest.approx(10 * weights["spam"]) == pytest.approx(50)


def test_unknown_loss():
    with pytest.raises(ConfigError, match="did you mean 'focal'"):
        LOSSES.parse("focall")
