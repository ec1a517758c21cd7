"""GRPO: its numbers by hand, its gradient against the formula over all logits, and rewards that rise."""

import json
import os
import signal
from dataclasses import replace
from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.core.events import Events, read_events
from luthier.core.types import Chat, Message, Pair
from luthier.models.load import load_model
from luthier.training.objectives.gains import advantages, pull
from luthier.training.objectives.groups import Group, form_group
from luthier.training.objectives.grpo import GRPO
from luthier.training.reference import Reference, log_probs
from luthier.verbs.tune import Tune, tune, tune_model
from tiny import tiny_loaded, tiny_model

PAIRS = [Pair(f"t:{at}", text, "7") for at, text in enumerate(("say one", "say it in two", "what is three?"))]


def prepared(objective: GRPO, examples=PAIRS, family: str = "llama"):
    model = tiny_loaded(family)
    objective.check_model(model.spec)
    objective.ready(model, model.device, Events())
    objective.keep_start(model, Events())
    return model, objective.encode(examples, model, Events())


def test_advantages_by_hand():
    # mean 1, squares 1 + 0 + 0 + 1 over n - 1 = 3: standard deviation sqrt(2/3)
    scale = sqrt(2 / 3) + 1e-4
    assert advantages([0.0, 1.0, 1.0, 2.0]) == pytest.approx([-1 / scale, 0, 0, 1 / scale])
    assert advantages([0.0, 1.0, 1.0, 2.0], standardise=False) == pytest.approx([-1, 0, 0, 1])
    assert advantages([0.3, 0.1 + 0.2, 0.3]) == [0.0, 0.0, 0.0]


def test_the_pull_by_hand():
    # p now 1/2, at the start 1/4: r = 1/2; gain r - 1, KL r - 1 - log r
    gain_T, kl_T = pull(np.log([0.5, 0.2]), np.log([0.25, 0.2]))
    assert gain_T.tolist() == pytest.approx([-0.5, 0])
    assert kl_T.tolist() == pytest.approx([0.5 - 1 + log(2), 0])


def test_weights_of_a_group_by_hand():
    _, rows = prepared(GRPO(rewards="exact_match", samples=2, max_tokens=10))
    judged = {"reward": [1.0, 0.0]}
    answers = [(5, 6), (7, 8, 9, 10)]
    gain = 0.5 / (sqrt(0.5) + 1e-4)
    size = len(rows[0].ids)
    for average, shares, count in (("answers", (1 / 2, 1 / 4), 2), ("tokens", (1, 1), 6), ("constant", (0.1, 0.1), 2)):
        objective = GRPO(rewards="exact_match", samples=2, max_tokens=10, average=average)
        group = form_group(objective, rows[0], answers, judged)
        assert group.ids == (*rows[0].ids, 5, 6, 7, 8, 9, 10)
        assert group.segments == (size, 2, 4) and group.parents == (-1, 0, 0)
        assert group.weights[:size] == (0.0,) * size and group.count == count
        assert list(group.weights[size:]) == pytest.approx([gain * shares[0]] * 2 + [-gain * shares[1]] * 4)
        # the value of -A summed at ratio 1
        assert group.value == pytest.approx(-gain * shares[0] * 2 + gain * shares[1] * 4)
    # Dr. GRPO: neither lengths nor the standard deviation
    plain = GRPO(rewards="exact_match", samples=2, max_tokens=10, average="constant", standardise=False)
    assert list(form_group(plain, rows[0], answers, judged).weights[size:]) == pytest.approx([0.05] * 2 + [-0.05] * 4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("average", ["answers", "tokens", "constant"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_value_and_gradient_are_those_of_the_formula(digits, temperature, average, beta):
    objective = GRPO(
        rewards=[digits, {"kind": "length", "tokens": 3, "weight": 0.2}], samples=3, max_tokens=6, beta=beta,
        temperature=temperature, average=average,
    )  # fmt: skip
    model, rows = prepared(objective)
    start = tiny_loaded("llama")
    with torch.no_grad():  # away from the start, so that the KL is above 0
        for one in model.module.parameters():
            one += 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(len(one)))
    groups = objective.draw(rows, model, (0, 4))
    loss, _ = objective.measure(model, objective.batch(groups, model, (0, 4)))
    (loss.sum / loss.weight).backward()
    found = {name: one.grad.clone() for name, one in model.module.named_parameters()}
    model.module.zero_grad()

    def log_likelihoods(one, prompt, answer):
        logits_TV = one.module(input_ids=torch.tensor([[*prompt, *answer]])).logits[0] / temperature
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return logits_TV.log_softmax(-1)[places, torch.tensor(answer)]

    terms, tokens, answers = [], 0, 0
    for group, row in zip(groups, rows):
        pieces = np.split(np.array(group.ids), np.cumsum(group.segments)[:-1])
        prompt, written = pieces[0].tolist(), [piece.tolist() for piece in pieces[1:]]
        assert tuple(prompt) == row.ids
        texts = [model.renderer.decode([t for t in ids if t not in model.spec.stop_ids]).strip() for ids in written]
        worth = [
            sum(c in "0123456789" for c in text) / max(1, len(text)) + 0.2 * min(1, max(0, 2 - len(ids) / 3))
            for text, ids in zip(texts, written)
        ]
        for ids, gain in zip(written, advantages(worth)):
            now_T = log_likelihoods(model, prompt, ids)
            with torch.no_grad():
                start_T = log_likelihoods(start, prompt, ids)
            ratio_T = (now_T - now_T.detach()).exp()
            clipped_T = torch.min(ratio_T * gain, ratio_T.clamp(0.8, 1.2) * gain)
            kl_T = (start_T - now_T).exp() - (start_T - now_T) - 1
            terms.append((-clipped_T + beta * kl_T, len(ids)))
            tokens, answers = tokens + len(ids), answers + 1
    if average == "answers":
        expected = sum(term.mean() for term, _ in terms) / answers
    elif average == "tokens":
        expected = sum(term.sum() for term, _ in terms) / tokens
    else:
        expected = sum(term.sum() for term, _ in terms) / (answers * 6)
    expected.backward()
    assert float(loss.sum.detach()) / loss.weight == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, one in model.module.named_parameters():
        torch.testing.assert_close(found[name], one.grad, rtol=1e-3, atol=2e-6)
    assert any(float(one.abs().max()) > 1e-3 for one in found.values())


def test_groups_that_are_all_alike_teach_nothing_and_count():
    objective = GRPO(rewards={"kind": "pattern", "pattern": "never such a text"}, samples=3, max_tokens=4)
    model, rows = prepared(objective)
    groups = objective.draw(rows, model, (0, 0))
    tally = objective.tally(groups)
    assert tally["no_signal"] == (len(groups), len(groups)) and tally["reward"] == (0, len(groups))
    assert 1 <= tally["answer_tokens"][0] / tally["answer_tokens"][1] <= 4
    assert objective.draw([], model, (0, 0)) == [] and objective.tally([]) == {}
    loss, _ = objective.measure(model, objective.batch(groups, model, (0, 0)))
    assert loss.weight == 9 and float(loss.sum.detach()) == 0
    loss.sum.backward()
    assert all(float(one.grad.abs().max()) == 0 for one in model.module.parameters() if one.grad is not None)
    assert any(one.grad is not None for one in model.module.parameters())


def test_answers_are_drawn_anew_each_step_and_the_same_again():
    objective = GRPO(rewards="chrf", samples=2, max_tokens=8)
    model, rows = prepared(objective)
    first, again = (objective.draw(rows, model, (3, 5)) for _ in range(2))
    assert first == again
    # each row's answers are its own, whoever stands beside it
    alone = [objective.draw([row], model, (3, 5))[0] for row in rows]
    assert [group.ids for group in alone] == [group.ids for group in first]
    numbers = GRPO(rewards={"kind": "length", "tokens": 4}, samples=2, max_tokens=8, beta=0.0)
    others = [numbers.draw(rows, model, seed) for seed in ((3, 6), (4, 5))]
    assert len({tuple(group.ids for group in one) for one in others}) == 2


def test_a_row_that_is_a_conversation_is_answered_from_before_its_last_turn():
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "gold")]
    objective = GRPO(rewards="exact_match")
    model, (row,) = prepared(objective, [Chat("t:1", tuple(turns))], "qwen2")
    assert row.ids == model.renderer.prompt(turns[:3]) and row.gold_answer == "gold"
    assert row.shown == "user: a\nassistant: b\nuser: c"


def test_the_reference_is_the_start_and_leaves_the_weights_alone():
    model = tiny_loaded("llama")
    rows = [replace(row, weights=()) for row in (model.renderer.pair(PAIRS[0]), model.renderer.pair(PAIRS[1]))]
    before = log_probs(model, rows)
    reference = Reference(model)
    with torch.no_grad():
        for one in model.module.parameters():
            one *= 1.5
    moved = {name: one.clone() for name, one in model.module.state_dict().items()}
    with reference.active():
        inside = log_probs(model, rows)
    assert all(np.array_equal(one, other) for one, other in zip(before, inside))
    assert not np.allclose(log_probs(model, rows)[0], before[0])
    assert all(torch.equal(one, moved[name]) for name, one in model.module.state_dict().items())
    assert before[0][0] == 0 and all(0 < exp(value) < 1 for value in before[0][1:])
    assert reference.size == 4 * sum(one.numel() for one in model.module.parameters())


def test_a_classifier_and_an_encoder_decoder_are_refused():
    with pytest.raises(ConfigError, match="objective 'grpo' needs a decoder-only model"):
        GRPO(rewards="chrf").check_model(tiny_loaded("t5").spec)


def test_a_template_that_ends_no_turn_is_refused(tmp_path):
    path = tmp_path / "endless.jinja"
    path.write_text("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}", encoding="utf-8")
    model = load_model(str(tiny_model("llama")), template=str(path))
    with pytest.raises(ConfigError, match="no special token ends an answer in the chat template 'endless'"):
        GRPO(rewards="chrf").ready(model, model.device, Events())


def settings(digits, **other):
    rows = [
        {"prompt": f"say {word}", "completion": "1"}
        for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    ]
    objective = {"kind": "grpo", "rewards": digits, "samples": 8, "max_tokens": 6}
    return {
        "model": str(tiny_model("qwen2")),
        "data": {"train": rows, "validation": [{"prompt": "say nine", "completion": "2"}]},
        "objective": objective,
        "steps": 30,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "baselines": False,
        "validate_every": 15,
        "name": "one",
        **other,
    }


def test_rewards_rise_from_chance(digits, runs):
    record, model = tune_model(resolve(Tune, values=settings(digits)))
    events = list(read_events(runs / "one" / "events.jsonl"))
    rewards = [event["tally"]["reward"] for event in events if event["event"] == "step"]
    assert rewards[0] < 0.15 and np.mean(rewards[-5:]) > 0.7
    looks = [event for event in events if event["event"] == "validate"]
    assert [look["judged_by"] for look in looks] == ["reward"] * 2 and looks[-1]["reward"] > 0.7
    assert looks[-1]["loss"] == -looks[-1]["reward"]
    assert record.state == "finished" and model.spec.learned == "grpo"
    page = (runs / "one" / "report.html").read_text(encoding="utf-8")
    assert "No signal" in page and "Answer tokens" in page


def test_an_adapter_is_held_to_its_own_start(digits, runs):
    objective = settings(digits)["objective"] | {"beta": 0.05}
    values = settings(digits, objective=objective, adapter={"kind": "lora", "rank": 8}, learning_rate=3e-2, steps=15)
    record, model = tune_model(resolve(Tune, values=values))
    tallies = [event["tally"] for event in read_events(runs / "one" / "events.jsonl") if event["event"] == "step"]
    assert tallies[0]["kl"] == pytest.approx(0, abs=1e-6) and tallies[-1]["kl"] > 0.005
    small = sum(one.numel() for name, one in model.module.named_parameters() if "lora_" in name)
    assert f": {4 * small / 2**20:.1f} MiB," in record.choices["reference"]


def test_a_run_that_goes_on_writes_the_same_answers(digits, runs, tmp_path):
    stop = 7

    def interrupt(event):
        if event["event"] == "step" and event["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in settings(digits)["data"]["train"]), encoding="utf-8")
    data = {"train": str(path), "split": {"validation": 0.25}}
    values = settings(digits, data=data, steps=9, objective=settings(digits)["objective"] | {"beta": 0.02})
    tune(resolve(Tune, values=values | {"name": "whole"}))
    with pytest.raises(KeyboardInterrupt):
        tune(resolve(Tune, values=values | {"name": "parts"}), sinks=[interrupt])
    tune(resume="run:parts")

    def steps(name):
        events = read_events(runs / name / "events.jsonl")
        return {one["step"]: (one["loss"], one["grad_norm"], one["tally"]) for one in events if one["event"] == "step"}

    assert json.dumps(steps("whole")) == json.dumps(steps("parts"))


def test_a_run_without_any_signal_ends_well(runs, digits):
    objective = {"kind": "grpo", "rewards": {"kind": "pattern", "pattern": "never such"}, "samples": 2, "max_tokens": 3}
    record = tune(resolve(Tune, values=settings(digits, objective=objective, steps=3)))
    assert record.state == "finished"


def test_undrawn_rows_are_no_batch():
    objective = GRPO(rewards="chrf")
    model, rows = prepared(objective)
    assert not isinstance(rows[0], Group)
    with pytest.raises(AssertionError):
        objective.batch(rows, model, (0, 0))
