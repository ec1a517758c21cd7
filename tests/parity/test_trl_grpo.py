"""GRPO's loss and the divergences of distillation against TRL's, on the numbers kept by trl_grpo_values.py."""

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.models.divergence import Aim
from luthier.training.objectives import groups, grpo
from luthier.training.objectives.groups import Prompt
from luthier.training.objectives.grpo import GRPO

KEPT = json.loads((Path(__file__).parent / "trl_grpo_values.json").read_text(encoding="utf-8"))
PARTS = [slice(start, start + KEPT["group"]) for start in range(0, len(KEPT["rewards"]), KEPT["group"])]
AVERAGES = {"grpo": "answers", "dapo": "tokens", "dr_grpo": "constant"}


def named(values: dict) -> str:
    return "-".join(str(value) for name, value in values.items() if name not in ("loss", "gradient"))


class Held:
    """A reference whose numbers are kept."""

    def active(self):
        return nullcontext()


def form_groups(objective):
    row = Prompt("p", (1, 2), (0.0, 0.0))
    answers = [([[3] * len(one) for one in KEPT["now"][part]], {"reward": KEPT["rewards"][part]}) for part in PARTS]
    return [groups.form_group(objective, row, ids, each) for ids, each in answers]


def say(monkeypatch, *sides):
    """Let the model say what is kept under these names, one after the other."""
    left = iter([KEPT[side] for side in sides])

    def log_probs(model, rows, head):
        side = next(left)
        return [np.concatenate([[0.0, 0.0], *side[part]]) for part in PARTS]

    monkeypatch.setattr(groups, "log_probs", log_probs)


@pytest.mark.parametrize("expected", KEPT["grpo"], ids=named)
def test_the_loss_and_what_each_token_should_gain(monkeypatch, expected):
    objective = GRPO(
        rewards="exact_match",
        samples=KEPT["group"],
        max_tokens=KEPT["most"],
        beta=expected["beta"],
        standardise=expected["scale"],
        average=AVERAGES[expected["loss_type"]],
    )
    formed = form_groups(objective)
    if objective.beta:
        say(monkeypatch, "now", "start")
        formed = groups.hold(objective, formed, None, Held())
    weight = sum(group.count for group in formed)
    assert sum(group.value for group in formed) / weight == pytest.approx(expected["loss"], abs=1e-12)
    found = []
    for group in formed:
        edges = np.cumsum(group.segments)
        found += [group.weights[start:end] for start, end in pairwise(edges)]
    # the weight of a token is minus the gradient after its log-likelihood
    for gains, gradient in zip(found, expected["gradient"], strict=True):
        assert [-gain / weight for gain in gains] == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("expected", KEPT["grpo_again"], ids=named)
def test_a_second_update_from_the_same_answers(monkeypatch, expected):
    """TRL's num_iterations: 2, its second pass: ratios away from 1, some of them clipped."""
    objective = GRPO(
        rewards="exact_match",
        samples=KEPT["group"],
        max_tokens=KEPT["most"],
        beta=expected["beta"],
        standardise=expected["scale"],
        average=AVERAGES[expected["loss_type"]],
        updates=2,
        clip_high=0.28,
    )
    say(monkeypatch, "written", "start")
    held = groups.remember(objective, form_groups(objective), None, Held())
    batch = objective.batch(held, None, (0, 0))
    now_M = torch.tensor([one for row in KEPT["now"] for one in row], dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(grpo, "token_nll", lambda head, states, target: -now_M.detach())
    monkeypatch.setattr(grpo, "token_loss", lambda head, states, target, weight: -(weight * now_M).sum())
    share_M = batch.weights_N[batch.weights_N > 0]
    loss, clipped_M = objective._measure_again(None, now_M, None, share_M, batch)
    (loss.sum / loss.weight).backward()
    assert float(loss.sum.detach()) / loss.weight == pytest.approx(expected["loss"], abs=1e-7)
    gradient = [one for row in expected["gradient"] for one in row]
    assert now_M.grad.tolist() == pytest.approx(gradient, abs=1e-7)
    assert 2 <= int(clipped_M.sum()) < len(gradient) / 2
    if not objective.beta:  # what is clipped is what gets no gradient
        assert [not one for one in gradient] == clipped_M.tolist()


@pytest.mark.parametrize("expected", KEPT["jsd"], ids=named)
def test_the_divergence(expected):
    student_NV = torch.tensor(KEPT["student"], dtype=torch.float64, requires_grad=True)
    teacher_NV = torch.tensor(KEPT["teacher"], dtype=torch.float64)
    aim = Aim(expected["beta"], expected["temperature"])
    # TRL leaves the square of the temperature out.
    loss = aim.losses(student_NV, teacher_NV, torch.zeros(4, dtype=torch.long)).sum() / expected["temperature"] ** 2
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-6)
    torch.testing.assert_close(
        student_NV.grad, torch.tensor(expected["gradient"], dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
