"""Losses of liked and disliked answers against numbers worked by hand, the reference of the start, and KTO's z."""

import math

import numpy as np
import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Encoded, Feedback, Message, Preference
from luthier.data.batches import collate
from luthier.engine.answers import answer_logs, score_answers
from luthier.engine.likelihood import score
from luthier.models.load import load_model
from luthier.text.answers import split_answers
from luthier.training.objectives import OBJECTIVES
from luthier.training.objectives.answers import refer_to_start
from luthier.training.objectives.kto import _own_alone, draw_others, with_other
from luthier.training.objectives.orpo import log_rest
from luthier.training.validation import validate
from tiny import tiny_loaded, tiny_model

WORDS = ["The quick brown fox", "a free prize now", "see you at seven", "房间很干净", "One two three", "the tickets"]
# log p of (chosen, rejected), their tokens, and log p at the start: h = (-10 + 12) - (-20 + 16) = 6.
LOGS, SIZES, START = (torch.tensor([one], dtype=torch.float64) for one in ([-10, -20], [5, 4], [-12, -16]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair(at: int, weight: float = 1.0) -> Preference:
    answers = ((Message("assistant", WORDS[at - 1]),), (Message("assistant", WORDS[at - 2] * (at % 2 + 1)),))
    return Preference(f"t:{at}", (Message("user", WORDS[at]),), *answers, meta={"weight": weight})


def verdict(at: int, weight: float = 1.0) -> Feedback:
    answer = (Message("assistant", WORDS[at - 1]),)
    return Feedback(f"t:{at}", (Message("user", WORDS[at]),), answer, at % 2 == 0, meta={"weight": weight})


HAND = [
    ({"kind": "dpo"}, -math.log(sigmoid(0.6))),
    ({"kind": "dpo", "beta": 0.5, "label_smoothing": 0.1}, -0.9 * math.log(sigmoid(3)) - 0.1 * math.log(sigmoid(-3))),
    # (2 / 5 - -4 / 4 - 1 / 0.5)^2
    ({"kind": "dpo", "beta": 0.25, "loss": "ipo"}, 0.36),
    ({"kind": "dpo", "loss": "hinge"}, 0.4),
    ({"kind": "dpo", "beta": 0.5, "loss": "hinge"}, 0.0),
    # SFT on five tokens: 10 / 5.
    ({"kind": "dpo", "sft": 0.25}, -math.log(sigmoid(0.6)) + 0.5),
    ({"kind": "simpo"}, -math.log(sigmoid(2 * (-2 + 5) - 1))),
    ({"kind": "simpo", "beta": 1.0, "gamma": 0.0}, -math.log(sigmoid(3))),
    (
        {"kind": "orpo", "beta": 0.5},
        2 - 0.5 * math.log(sigmoid((-2 - math.log(1 - math.exp(-2))) - (-5 - math.log(1 - math.exp(-5))))),
    ),
]


@pytest.mark.parametrize(("settings", "meant"), HAND)
def test_losses_by_hand(settings, meant):
    found = OBJECTIVES.parse(settings).losses(LOGS, SIZES, START)
    assert found.shape == (1,) and float(found) == pytest.approx(meant, rel=1e-9)


def test_kto_by_hand():
    # r - z = 2 for a good answer, -1 for a bad one.
    found = OBJECTIVES.parse({"kind": "kto", "beta": 0.5, "desirable": 2.0}).losses(
        torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    )
    assert found.tolist() == pytest.approx([2 * (1 - sigmoid(1)), 1 - sigmoid(0.5)])


def test_reward_by_hand():
    rewards, margin = torch.tensor([[3.0, 1.0], [0.5, 1.0]]), torch.tensor([0.5, 0.0])
    found = OBJECTIVES.parse({"kind": "reward", "center": 0.1}).losses(rewards, margin)
    meant = [-math.log(sigmoid(1.5)) + 1.6, -math.log(sigmoid(-0.5)) + 0.225]
    assert found.tolist() == pytest.approx(meant, rel=1e-6)


def test_the_rest_of_a_probability():
    p = torch.tensor([1e-6, 0.3, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(log_rest(p.log()), torch.log1p(-p))
    certain = torch.tensor([0.0], requires_grad=True)
    assert torch.isfinite(log_rest(certain)).all()
    assert torch.isfinite(torch.autograd.grad(log_rest(certain).sum(), certain)[0]).all()


def test_smoothing_goes_with_sigmoid_alone():
    with pytest.raises(ConfigError, match="label_smoothing goes with loss: sigmoid, not with ipo"):
        OBJECTIVES.parse({"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1})


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_answers_read_after_a_shared_prompt_score_as_if_alone(family):
    model = tiny_loaded(family)
    rows = OBJECTIVES.parse("simpo").encode([pair(at) for at in range(6)], model, Events())
    found_RA = score_answers(model, rows, tokens=60)
    alone = [score(model, split_answers(row)) for row in rows]
    assert -found_RA[..., 0] == pytest.approx(np.array([[one[0] for one in row] for row in alone]), rel=1e-5)
    assert found_RA[..., 1].tolist() == [[one[1] for one in row] for row in alone]
    logs, counts = answer_logs(model, collate(rows))
    assert logs.requires_grad and logs.detach().numpy() == pytest.approx(found_RA[..., 0], rel=1e-5)
    assert counts.tolist() == found_RA[..., 1].tolist()


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "reward", "kto"])
def test_a_row_of_weight_two_is_that_row_twice(name, tmp_path):
    make = verdict if name == "kto" else pair
    objective = OBJECTIVES.parse(name)
    torch.manual_seed(0)
    model = load_model(str(tiny_model("llama")), **objective.load_options([]))

    start = load_model(str(tiny_model("llama", seed=1))) if objective.refers else model

    def measure(*weights: float) -> tuple[float, float]:
        examples = [make(at, weight) for at, weight in enumerate(weights, 1) if weight]
        rows = objective.refer(objective.encode(examples, model, Events()), start, Events(), tmp_path)
        # KTO's z depends on the rows of a step, and is not asked about here.
        if name == "kto":
            rows = [_own_alone(row, 0.0) for row in rows]
        loss, _ = objective.measure(model, objective.batch(rows, model, (0, 0)))
        return float(loss.sum.detach()), loss.weight

    once, heavy, alone = measure(1, 1), measure(2, 1), measure(1, 0)
    assert heavy == pytest.approx((once[0] + alone[0], 3.0), rel=1e-5)


def test_the_start_is_read_once_and_kept(tmp_path, monkeypatch):
    model = tiny_loaded("llama")
    objective = OBJECTIVES.parse("dpo")
    rows = objective.encode([pair(at) for at in range(6)], model, Events())
    model.module.train()
    first = refer_to_start(rows, model, Events(), tmp_path)
    assert model.module.training and len(list(tmp_path.iterdir())) == 1
    assert first.shape == (6, 2) and (first == score_answers(model, rows)[..., 0]).all()
    with monkeypatch.context() as held:
        held.setattr("luthier.training.objectives.answers.score_answers", None)
        assert (refer_to_start(rows, model, Events(), tmp_path) == first).all()
    # Other rows, or other weights, are another start; a damaged file is made anew.
    refer_to_start(rows[:3], model, Events(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    other = load_model(str(tiny_model("llama", seed=1)))
    assert (refer_to_start(rows, other, Events(), tmp_path) != first).all()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert (refer_to_start(rows, model, Events(), tmp_path) == first).all()


def test_others_have_another_prompt_and_are_drawn_once():
    keys = ["a", "a", "b", "c", "a", "b"]
    found = draw_others(keys)
    assert found == draw_others(keys)
    assert all(other is not None and keys[other] != keys[at] for at, other in enumerate(found))
    assert draw_others(["a", "a"]) == [None, None] and draw_others(["a"]) == [None]


def test_another_answer_is_cut_to_fit():
    row = Encoded("a", (1, 2, 3, 4), (0.0, 0.0, 1.0, 1.0), segments=(2, 2), parents=(-1, 0))
    other = Encoded("b", (5, 6, 7, 8, 9), (0.0, 1.0, 1.0, 1.0, 1.0), segments=(1, 4), parents=(-1, 0))
    found = with_other(row, other, 5)
    assert found.ids == (1, 2, 3, 4, 6, 7, 8) and found.segments == (2, 2, 3) and found.parents == (-1, 0, 0)
    assert found.weights == (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_kto_measures_how_far_the_model_moved_over_the_whole_step(tmp_path):
    model = tiny_loaded("llama")
    objective = OBJECTIVES.parse("kto")
    rows = objective.encode([verdict(at) for at in range(6)], model, Events())
    rows = objective.refer(rows, model, Events(), tmp_path)
    assert all(len(row.segments) == 3 and len(row.gold) == 3 for row in rows)
    still = objective.draw(rows, model, (0, 0))
    assert [row.gold[1] for row in still] == pytest.approx([row.gold[1] for row in rows])
    with torch.no_grad():
        for one in model.module.parameters():
            one.mul_(1.05)
    moved = score_answers(model, rows)[..., 0] - np.array([row.gold[1:] for row in rows])
    z = max(0.0, float(moved[:, 1].mean()))
    drawn = objective.draw(rows, model, (0, 0))
    assert z > 0 and [row.gold[1] for row in drawn] == pytest.approx([row.gold[1] + z for row in rows])
    assert all(len(row.segments) == 2 for row in drawn)
    meant = [1 - sigmoid(0.1 * (r - z) * (1 if at % 2 == 0 else -1)) for at, r in enumerate(moved[:, 0])]
    loss, _ = objective.measure(model, objective.batch(drawn, model, (0, 0)))
    assert float(loss.sum.detach()) == pytest.approx(sum(meant), rel=1e-5)
    # A validation takes z over all of its rows, and compares good with bad.
    found = validate(model, objective, rows, tokens=50)
    assert found["loss"] == pytest.approx(sum(meant) / 6, rel=1e-5)
    good, bad = moved[::2, 0], moved[1::2, 0]
    assert found["reward_margin"] == pytest.approx(0.1 * (good.mean() - bad.mean()), rel=1e-4)
    assert found["roc_auc"] == pytest.approx(float((good[:, None] > bad).mean()))


def test_kto_takes_z_over_the_rows_of_all_processes(tmp_path):
    model = tiny_loaded("llama")
    objective = OBJECTIVES.parse("kto")
    rows = objective.encode([verdict(at) for at in range(6)], model, Events())
    rows = objective.refer(rows, model, Events(), tmp_path)
    with torch.no_grad():
        for one in model.module.parameters():
            one.mul_(1.05)
    said: list[tuple[float, ...]] = []
    shares = rows[:2], rows[2:], []
    for share in shares:
        objective.draw(share, model, (0, 0), lambda *numbers: said.append(numbers) or list(numbers))
    sums = [sum(one) for one in zip(*said)]
    parts = [objective.draw(share, model, (0, 0), lambda *numbers: sums) for share in shares]
    whole = objective.draw(rows, model, (0, 0))
    assert [row.gold[1] for part in parts for row in part] == pytest.approx([row.gold[1] for row in whole], abs=1e-6)
    assert [row.gold[1] for row in parts[0]] != pytest.approx(
        [row.gold[1] for row in objective.draw(shares[0], model, (0, 0))], abs=1e-4
    )


def test_rows_with_one_prompt_say_that_z_is_nothing(tmp_path):
    model = tiny_loaded("llama")
    events, objective = Events(), OBJECTIVES.parse("kto")
    rows = [
        Feedback(f"t:{at}", (Message("user", "Hi"),), (Message("assistant", WORDS[at]),), at > 0) for at in range(2)
    ]
    encoded = objective.refer(objective.encode(rows, model, events), model, events, tmp_path)
    assert next(iter(events.warnings.items()))[1] == 2
    assert [row.gold for row in objective.draw(encoded, model, (0, 0))] == [row.gold for row in encoded]


def test_validation_counts_pairs_that_stand_right():
    scores = torch.tensor([[2.0, 1.0], [0.0, 0.0], [1.0, 3.0], [5.0, 1.0]])
    found = OBJECTIVES.parse("dpo").metrics(scores, torch.zeros(4, 2), None)
    assert found == {
        "preference_accuracy": 0.5, "reward_margin": 0.75, "chosen_reward": 2.0, "rejected_reward": 1.25
    }  # fmt: skip


def test_models_that_cannot_are_refused():
    bert = tiny_loaded("bert")
    with pytest.raises(ConfigError, match="objective 'dpo' needs a decoder-only model"):
        OBJECTIVES.parse("dpo").check_model(bert.spec)
    reward = OBJECTIVES.parse("reward")
    with pytest.raises(ConfigError, match="reads the last token of a decoder-only model"):
        reward.check_model(load_model(str(tiny_model("bert")), **reward.load_options([])).spec)
    with pytest.raises(ConfigError, match="pooling 'mean'"):
        reward.check_model(load_model(str(tiny_model("llama")), pooling="mean", **reward.load_options([])).spec)
