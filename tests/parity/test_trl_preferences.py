"""The preference losses equal TRL's on the same numbers, and the first step of DPO on a tiny model equals its trainer's.

The values were made by trl_values.py, with the versions that trl_values.json names.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.core.events import Events
from luthier.core.types import Message, Preference
from luthier.models.load import load_model
from luthier.training.objectives import OBJECTIVES
from tiny import tiny_model

VALUES = json.loads(Path(__file__).with_name("trl_values.json").read_text(encoding="utf-8"))


def pairs(name: str) -> Tensor:
    """[R, 2] of what TRL holds as all chosen, then all rejected."""
    return torch.tensor(VALUES[name], dtype=torch.float64).view(2, 4).T


SIZES_R2 = torch.tensor([VALUES["sizes"]["chosen"], VALUES["sizes"]["rejected"]], dtype=torch.float64).T


@pytest.mark.parametrize("case", VALUES["dpo"], ids=lambda one: f"{one['loss_type']}-{one['beta']}-{len(one['pairs'])}")
def test_dpo(case):
    more = {"loss": "sigmoid", "sft": 0.5} if case["loss_type"] == "rpo" else {"loss": case["loss_type"]}
    objective = OBJECTIVES.parse({"kind": "dpo", "beta": case["beta"], **more})
    logs_R2 = pairs("logs")[case["pairs"]].requires_grad_()
    loss = objective.losses(logs_R2, SIZES_R2[case["pairs"]], pairs("start")[case["pairs"]]).mean()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-9)
    gradient_R2 = torch.autograd.grad(loss, logs_R2)[0]
    assert gradient_R2.T.flatten().tolist() == pytest.approx(case["gradient"], rel=1e-9)


def test_label_smoothing():
    objective = OBJECTIVES.parse({"kind": "dpo", "beta": 0.3, "label_smoothing": 0.1})
    losses = objective.losses(pairs("logs"), SIZES_R2, pairs("start"))
    assert losses.tolist() == pytest.approx(VALUES["smoothed"], rel=1e-9)


def test_orpo():
    objective = OBJECTIVES.parse({"kind": "orpo", "beta": 0.25})
    losses = objective.losses(pairs("logs"), SIZES_R2, torch.zeros(4, 2))
    # TRL's function gives beta x log sigmoid of the log-odds ratio, in fp32; the loss of SFT is added outside of it.
    ours = -(losses + pairs("logs")[:, 0] / SIZES_R2[:, 0])
    assert ours.tolist() == pytest.approx(VALUES["orpo"], rel=1e-6)


def test_simpo():
    losses = OBJECTIVES.parse("simpo").losses(pairs("logs"), SIZES_R2, torch.zeros(4, 2))
    assert losses.tolist() == pytest.approx(VALUES["simpo"], rel=1e-9)


@pytest.mark.parametrize("case", VALUES["kto"], ids=lambda one: str(one["desirable"]))
def test_kto(case):
    objective = OBJECTIVES.parse({"kind": "kto", "beta": 0.2, "desirable": case["desirable"]})
    logs_R, start_R = pairs("logs")[:, 0].clone().requires_grad_(), pairs("start")[:, 0]
    moved = (torch.tensor(VALUES["other"]) - torch.tensor(VALUES["other_start"])).double().mean().clamp(min=0)
    loss = objective.losses(logs_R - (start_R + moved), torch.tensor(VALUES["good"]).double()).mean()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-6)
    assert torch.autograd.grad(loss, logs_R)[0].tolist() == pytest.approx(case["gradient"], rel=1e-6)


def test_reward():
    objective = OBJECTIVES.parse({"kind": "reward", "center": 0.01})
    losses = objective.losses(pairs("rewards"), torch.tensor(VALUES["margin"], dtype=torch.float64))
    assert float(losses.mean()) == pytest.approx(VALUES["reward"], rel=1e-9)


@pytest.mark.parametrize("case", VALUES["first_step"], ids=lambda one: f"{one['other_start']}-{one['beta']}")
def test_the_first_step_of_dpo(case, tmp_path):
    template = tmp_path / "parity.jinja"
    template.write_text(VALUES["template"], encoding="utf-8")
    model, start = (load_model(str(tiny_model("llama", seed=seed)), template=str(template)) for seed in (0, 1))
    assert sum(float(one.detach().double().abs().sum()) for one in model.module.parameters()) == pytest.approx(
        case["weights"], rel=1e-12
    ), "the tiny model is another one than TRL was run on; run trl_values.py again"
    objective = OBJECTIVES.parse({"kind": "dpo", "beta": case["beta"]})
    examples = [
        Preference(f"t:{at}", *((Message(role, text),) for role, text in zip(("user", "assistant", "assistant"), row)))
        for at, row in enumerate(VALUES["rows"])
    ]
    rows = objective.encode(examples, model, Events())
    referred = objective.refer(rows, start if case["other_start"] else model, Events(), tmp_path)
    logs = [row.gold for row in objective.refer(rows, model, Events(), tmp_path)]
    assert sum(one[0] for one in logs) / 4 == pytest.approx(case["logps/chosen"], rel=1e-6)
    assert sum(one[1] for one in logs) / 4 == pytest.approx(case["logps/rejected"], rel=1e-6)
    loss, _ = objective.measure(model, objective.batch(referred, model, (0, 0)))
    (loss.sum / loss.weight).backward()
    norm = torch.nn.utils.get_total_norm([one.grad for one in model.module.parameters() if one.grad is not None])
    assert float(loss.sum.detach()) / loss.weight == pytest.approx(case["loss"], rel=1e-5)
    assert float(norm) == pytest.approx(case["grad_norm"], rel=1e-4)
    # As ever, splitting the rows changes nothing.
    model.module.zero_grad()
    for row in referred:
        part, _ = objective.measure(model, objective.batch([replace(row)], model, (0, 0)))
        (part.sum / 4).backward()
    again = torch.nn.utils.get_total_norm([one.grad for one in model.module.parameters() if one.grad is not None])
    assert float(again) == pytest.approx(float(norm), rel=1e-5)
