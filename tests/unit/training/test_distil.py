"""Distillation: it comes near to the teacher, says what does not fit, and learns from the student's own answers."""

import numpy as np
import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.core.events import Events, read_events
from luthier.core.types import Chat, Message, Pair, Text
from luthier.models.load import load_model
from luthier.training.objectives.causal import causal_loss
from luthier.training.objectives.distil import Distil, Written
from luthier.verbs.tune import Tune, tune, tune_model
from tiny import tiny_model

PAIRS = [Pair(f"t:{at}", text, text[::-1]) for at, text in enumerate(("say one", "say it in two", "what is three?"))]
TEACHER = str(tiny_model("qwen2", seed=1))


def prepared(examples=PAIRS, student: str = "qwen2", **settings):
    objective = Distil.make({"teacher": TEACHER, **settings}).prepare(examples, Events())
    model = load_model(str(tiny_model(student)))
    objective.check_model(model.spec)
    objective.ready(model, model.device, Events())
    return objective, model, objective.encode(examples, model, Events())


@pytest.mark.parametrize(
    ("settings", "beta"),
    [
        ({}, 0.0),
        ({"divergence": "reverse_kl"}, 1.0),
        ({"divergence": "jsd"}, 0.5),
        ({"divergence": "jsd", "beta": 0.2}, 0.2),
    ],
)
def test_the_loss_is_that_of_both_models_logits(settings, beta):
    objective, model, rows = prepared(**settings, temperature=1.5)
    teacher = load_model(TEACHER)
    loss, _ = objective.measure(model, objective.batch(rows, model, (0, 0)))
    expected, weight = 0.0, 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            q, p = ((one.module(input_ids=ids).logits[0, :-1] / 1.5).softmax(-1) for one in (model, teacher))
        m = beta * p + (1 - beta) * q
        if beta in (0, 1):
            far, near = (p, q) if beta == 0 else (q, p)
            apart = (far * (far / near).log()).sum(-1)
        else:
            apart = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        expected += float((2.25 * apart * torch.tensor(row.weights[1:])).sum())
        weight += sum(row.weights)
    assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-4) and loss.weight == weight


def test_hard_is_the_share_of_cross_entropy():
    found = []
    for hard in (0.0, 0.25, 0.5):
        objective, model, rows = prepared(hard=hard)
        found.append(float(objective.measure(model, objective.batch(rows, model, (0, 0)))[0].sum.detach()))
    plain = float(causal_loss(model, objective.batch(rows, model, (0, 0))).sum.detach())
    assert found[1:] == pytest.approx([0.75 * found[0] + 0.25 * plain, 0.5 * found[0] + 0.5 * plain], rel=1e-5)


def test_plain_text_is_read_as_pretraining_does():
    texts = [Text(f"t:{at}", text * 3) for at, text in enumerate(("a quick fox. ", "lazy dogs. "))]
    objective, model, rows = prepared(texts)
    assert objective.learned() == "pretrain" and any(len(row.segments) > 1 for row in rows)
    loss, _ = objective.measure(model, objective.batch(rows, model, (0, 0)))
    assert 0 < float(loss.sum.detach()) / loss.weight < 1
    with pytest.raises(ConfigError, match="plain text has no prompt to answer"):
        prepared(texts, on_policy=0.5)


def test_on_policy_rows_hold_the_students_answers():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d e f"))
    chats = [Chat(f"t:{at}", turns) for at in range(40)]
    objective, model, rows = prepared(chats, on_policy=0.5, max_tokens=5)
    drawn = objective.draw(rows, model, (0, 3))
    assert drawn == objective.draw(rows, model, (0, 3)) != objective.draw(rows, model, (0, 4))
    written = [row for row in drawn if isinstance(row, Written)]
    assert 10 <= len(written) <= 30
    prompt = model.renderer.prompt(turns[:3])
    for row in written:
        assert row.ids[: len(prompt)] == prompt and 1 <= row.answer_tokens <= 5
        assert row.weights == (0.0,) * len(prompt) + (1.0,) * row.answer_tokens
    assert [row for row in drawn if not isinstance(row, Written)] == [
        row for row, other in zip(rows, drawn) if row is other
    ]
    tally = objective.tally(drawn)
    assert tally["answer_tokens"] == (sum(row.answer_tokens for row in written), len(written))
    assert objective.tally([row for row in drawn if not isinstance(row, Written)]) == {}
    objective.measure(model, objective.batch(drawn, model, (0, 3)))[0].sum.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.3}, "beta belongs to jsd and has no effect on forward_kl"),
        ({"hard": 0.5, "on_policy": 0.5}, "hard is learned from the rows' own answers"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        Distil.make({"teacher": TEACHER, **settings})


def test_a_teacher_that_does_not_fit_is_refused():
    model = load_model(str(tiny_model("qwen2")))
    with pytest.raises(ConfigError, match=r"has another tokenizer than .*tokens differ, '.*' among them"):
        Distil(teacher=str(tiny_model("llama"))).ready(model, model.device, Events())
    model.spec = model.spec.model_copy(update={"max_length": 500})
    with pytest.raises(ConfigError, match="reads 128 tokens, and rows may have 500; set max_length: 128"):
        Distil(teacher=TEACHER).ready(model, model.device, Events())


def test_a_teacher_whose_head_is_padded_teaches_the_same():
    objective, model, rows = prepared()
    batch = objective.batch(rows, model, (0, 0))
    before = float(objective.measure(model, batch)[0].sum.detach())
    # a head with rows that no token uses, whatever they hold
    objective._teacher.module.resize_token_embeddings(448, mean_resizing=False)
    assert len(objective._teacher.module.get_output_embeddings().weight) == 448
    assert float(objective.measure(model, batch)[0].sum.detach()) == pytest.approx(before, rel=1e-5)
    model.module.resize_token_embeddings(464, mean_resizing=False)
    after = objective.measure(model, batch)[0]
    after.sum.backward()
    assert float(after.sum.detach()) < before * 1.5


def values(**other):
    rows = [
        {"prompt": f"say {word}", "completion": word}
        for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    ]
    return {
        "model": str(tiny_model("qwen2")),
        "data": {"train": rows, "validation": [{"prompt": "say nine", "completion": "nine"}]},
        "objective": {"kind": "distil", "teacher": TEACHER, "on_policy": 0.5, "max_tokens": 6},
        "steps": 60,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "schedule": "constant",
        "baselines": False,
        "name": "one",
        **other,
    }


def test_a_student_comes_near_and_the_teacher_stays(runs):
    record, model = tune_model(resolve(Tune, values=values()))
    events = list(read_events(runs / "one" / "events.jsonl"))
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert np.mean(losses[-5:]) < 0.25 * losses[0]
    looks = [event["loss"] for event in events if event["event"] == "validate"]
    assert looks[-1] < 0.5 * losses[0]
    assert model.spec.learned == "sft" and "MiB beside the student" in record.choices["teacher"]
    assert not list((runs / "one" / "artefacts" / "model").glob("*teacher*"))


def test_a_tuned_run_teaches():
    tune(resolve(Tune, values=values(objective="sft", steps=2, name="teacher")))
    record = tune(resolve(Tune, values=values(objective={"kind": "distil", "teacher": "run:teacher"}, steps=2)))
    assert record.state == "finished"


@pytest.mark.parametrize(("example", "form"), [(Text("t:1", "a"), "pretrain"), (Pair("t:1", "a", "b"), "sft")])
def test_what_a_student_counts_as_does_not_hang_on_who_encoded_its_rows(example, form):
    """Rows may come from a cache, or from another process."""
    objective = Distil(teacher=TEACHER).prepare([example], Events())
    assert objective.learned() == form
