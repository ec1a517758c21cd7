"""GRPO with several updates from the same answers: the formula, what is kept, and runs that stop in between."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from luthier.core.config import resolve
from luthier.core.events import Events, read_events
from luthier.core.types import Pair
from luthier.data.batches import deal
from luthier.training.checkpoint import read_checkpoint
from luthier.training.objectives.gains import clipped
from luthier.training.objectives.groups import Group
from luthier.training.objectives.grpo import GRPO
from luthier.training.repeats import repeated, take_share
from luthier.training.world import World
from luthier.verbs.tune import Tune, plan, tune
from tiny import tiny_loaded, tiny_model

PAIRS = [Pair(f"t:{at}", text, "7") for at, text in enumerate(("say one", "say it in two", "what is three?"))]


def test_clipping_by_hand():
    # Ratios 1.5, 1.1, 0.5 and again 1.5, 0.9, 0.5; better answers (A = 2) and worse ones (A = -2); bounds 0.8 and 1.3.
    written = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.2]).log()
    now = torch.tensor([0.3, 0.22, 0.1, 0.3, 0.18, 0.1]).log()
    gain = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    found = clipped(now, written, gain, 0.2, 0.3)
    assert found.clipped_M.tolist() == [True, False, False, False, False, True]
    assert found.loss_M.tolist() == pytest.approx([-2.6, -2.2, -1.0, 3.0, 1.8, 1.6])
    assert found.gain_M.tolist() == pytest.approx([0.0, 2.2, 1.0, -3.0, -1.8, 0.0])


def test_the_gains_are_the_derivative():
    torch.manual_seed(0)
    now = torch.randn(50, dtype=torch.float64, requires_grad=True)
    written, gain = now.detach() + 0.5 * torch.randn(50), torch.randn(50)
    found = clipped(now, written, gain, 0.2, 0.28)
    (derivative,) = torch.autograd.grad(found.loss_M.sum(), now)
    torch.testing.assert_close(found.gain_M.detach(), -derivative)
    assert 0 < int(found.clipped_M.sum()) < 25


def prepared(objective: GRPO, family: str = "llama"):
    model = tiny_loaded(family)
    objective.ready(model, model.device, Events())
    objective.keep_start(model, Events())
    return model, objective.encode(PAIRS, model, Events())


def move(model, size):
    with torch.no_grad():
        for one in model.module.parameters():
            one += size * torch.randn(one.shape, generator=torch.Generator().manual_seed(len(one)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("average", ["answers", "tokens", "constant"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_value_and_gradient_are_those_of_the_formula(digits, temperature, average, beta):
    objective = GRPO(
        rewards=[digits, {"kind": "length", "tokens": 3, "weight": 0.2}], samples=3, max_tokens=6, beta=beta,
        temperature=temperature, average=average, updates=3, clip_low=0.02, clip_high=0.03,
    )  # fmt: skip
    model, rows = prepared(objective)
    start, wrote = tiny_loaded("llama"), tiny_loaded("llama")
    for one in (model, wrote):
        move(one, 0.02)
    groups = objective.draw(rows, model, (0, 4))
    move(model, 0.015)
    loss, seen = objective.measure(model, objective.batch(groups, model, (0, 4)))
    (loss.sum / loss.weight).backward()
    found = {name: one.grad.clone() for name, one in model.module.named_parameters()}
    model.module.zero_grad()

    def log_likelihoods(one, prompt, answer):
        logits_TV = one.module(input_ids=torch.tensor([[*prompt, *answer]])).logits[0] / temperature
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return logits_TV.log_softmax(-1)[places, torch.tensor(answer)]

    terms, over = [], 0
    for group, row in zip(groups, rows):
        pieces = np.split(np.array(group.ids), np.cumsum(group.segments)[:-1])
        at = len(row.ids)
        for piece in pieces[1:]:
            ids, gain = piece.tolist(), group.told[at][0]
            at += len(ids)
            now_T = log_likelihoods(model, row.ids, ids)
            with torch.no_grad():
                start_T, wrote_T = (log_likelihoods(one, row.ids, ids) for one in (start, wrote))
            ratio_T = (now_T - wrote_T).exp()
            kept_T = torch.min(ratio_T * gain, ratio_T.clamp(0.98, 1.03) * gain)
            over += int(((ratio_T * gain - kept_T) > 0).sum())
            terms.append(-kept_T + beta * ((start_T - now_T).exp() - (start_T - now_T) - 1))
    if average == "answers":
        expected = sum(term.mean() for term in terms) / len(terms)
    elif average == "tokens":
        expected = sum(term.sum() for term in terms) / sum(len(term) for term in terms)
    else:
        expected = sum(term.sum() for term in terms) / (len(terms) * 6)
    expected.backward()
    assert float(loss.sum.detach()) / loss.weight == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, one in model.module.named_parameters():
        torch.testing.assert_close(found[name], one.grad, rtol=1e-3, atol=3e-6)
    tally = objective.observe(seen)
    assert tally["clipped"] == (over, sum(len(term) for term in terms)) and over >= 2


def test_the_first_update_is_that_of_one(digits):
    """At the weights that wrote, the ratio is 1 but for rounding, and nothing is clipped."""
    found = []
    for updates in (1, 2):
        objective = GRPO(rewards=digits, samples=3, max_tokens=6, beta=0.2, updates=updates)
        model, rows = prepared(objective)
        loss, seen = objective.measure(model, objective.batch(objective.draw(rows, model, (0, 4)), model, (0, 4)))
        loss.sum.backward()
        found.append((float(loss.sum.detach()), model.module.lm_head.weight.grad.clone()))
        assert seen is None or not seen.any()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_groups_without_signal_are_kept_too():
    objective = GRPO(rewards={"kind": "pattern", "pattern": "never such"}, samples=3, max_tokens=4, updates=2)
    model, rows = prepared(objective)
    groups = objective.draw(rows, model, (0, 0))
    loss, seen = objective.measure(model, objective.batch(groups, model, (0, 0)))
    assert loss.weight == 9 and float(loss.sum.detach()) == 0 and objective.observe(seen) == {}


def test_the_order_of_fresh_and_again():
    assert list(repeated(iter(["a", "b", "c"]), 3, 0, 7)) == ["a", None, None, "b", None, None, "c"]
    assert list(repeated(iter(["b", "c"]), 3, 2, 7)) == [None, "b", None, None, "c"]


def test_shares_of_other_processes():
    shares = [[Group("a", (1, 2)), Group("b", (1,))], [Group("c", (1, 2, 3))]]
    assert take_share(shares, World()) == [*shares[0], *shares[1]]
    two = World(rank=1, size=2)
    assert take_share(shares, two) == shares[1]
    flat = [Group("a", (1,)), Group("b", (1, 2)), Group("c", (1, 2, 3))]
    assert take_share([flat], two) == [flat[at] for at in deal([1, 2, 3], 2)[1]]


def settings(digits, tmp_path, **other):
    rows = [
        {"prompt": f"say {word}", "completion": "1"}
        for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    objective = {"kind": "grpo", "rewards": digits, "samples": 4, "max_tokens": 6, "updates": 3, "beta": 0.02}
    return {
        "model": str(tiny_model("qwen2")),
        "data": {"train": str(path), "split": {"validation": 0.25}},
        "objective": objective,
        "steps": 12,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "baselines": False,
        "validate_every": 5,
        "name": "one",
        **other,
    }


def steps(runs, name):
    events = read_events(runs / name / "events.jsonl")
    return {one["step"]: (one["loss"], one["grad_norm"], one["tally"]) for one in events if one["event"] == "step"}


def test_answers_are_written_once_in_so_many_steps(digits, runs, tmp_path, monkeypatch):
    drawn = []
    draw = GRPO.draw
    monkeypatch.setattr(GRPO, "draw", lambda self, rows, *rest: drawn.append(len(rows)) or draw(self, rows, *rest))
    asked = resolve(Tune, values=settings(digits, tmp_path, steps=8))
    tune(asked)
    assert drawn == [3, 3, 3]  # steps 1, 4 and 7
    found = steps(runs, "one")
    rewards = [tally["reward"] for _, _, tally in found.values()]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3] == rewards[5]
    assert found[1][2]["clipped"] == 0 and max(tally["clipped"] for _, _, tally in found.values()) > 0
    epochs = settings(digits, tmp_path, epochs=2)
    del epochs["steps"]
    # six rows in steps of three, each learned from three times, in two passes
    assert plan(resolve(Tune, values=epochs))["steps"] == 12


def stop_at(step):
    def sink(event):
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return sink


def test_a_run_that_stops_between_updates_goes_on_the_same(digits, runs, tmp_path):
    values = settings(digits, tmp_path, steps=9)
    tune(resolve(Tune, values=values | {"name": "whole"}))
    for stop in (4, 5, 6):
        name = f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            tune(resolve(Tune, values=values | {"name": name}), sinks=[stop_at(stop)])
        _, state = read_checkpoint(runs / name / "checkpoints" / f"step-{stop:08d}")
        assert ("rows" in state) == (stop % 3 != 0)
        tune(resume=f"run:{name}")
        assert json.dumps(steps(runs, "whole")) == json.dumps(steps(runs, name)), stop


def test_two_processes_give_what_one_gives_and_stop_between_updates(digits, runs, tmp_path, cache):
    values = settings(digits, tmp_path, steps=8, learning_rate=2e-3)
    tune(resolve(Tune, values=values | {"name": "whole"}))
    with pytest.raises(KeyboardInterrupt):
        tune(resolve(Tune, values=values | {"name": "parts", "processes": 2}), sinks=[stop_at(5)])
    tune(resume="run:parts")
    one, two = steps(runs, "whole"), steps(runs, "parts")
    assert one.keys() == two.keys()
    for step, (loss, norm, tally) in one.items():
        assert two[step][0] == pytest.approx(loss, abs=1e-5) and two[step][1] == pytest.approx(norm, rel=1e-3)
        assert two[step][2] == pytest.approx(tally, abs=1e-4)
