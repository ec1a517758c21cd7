"""Distillation of classifiers, regressors and encoder-decoders: its numbers by hand, what is matched, what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events, read_events
from luthier.core.types import Chat, Encoded, Labelled, Message, Pair, Preference, Text
from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.models.divergence import Aim
from luthier.models.load import load_model
from luthier.models.save import save_model
from luthier.training.encoded import key_of
from luthier.training.objectives.distil import Distil
from luthier.training.objectives.scores import taught_losses, taught_metrics
from luthier.training.objectives.seq2seq import Seq2Seq
from luthier.training.objectives.teacher import leave_open
from luthier.verbs.tune import Tune, tune, tune_model
from tiny import tiny_model

TEXTS = ["win a prize now", "see you at seven", "free cash", "lunch at noon then", "claim your prize", "ok then"]
PAIRS = [Pair(f"t:{at}", text, text[::-1]) for at, text in enumerate(TEXTS)]


def scorer(path, labels=("b", "a"), *, family="bert", multi_label=False, task="classify", **spec):
    """A teacher with these classes, its head far from zero."""
    torch.manual_seed(2)
    model = load_model(str(tiny_model(family, seed=1)), task=task, labels=labels, multi_label=multi_label)
    torch.nn.init.normal_(model.module.head.weight, std=0.7)
    model.spec = model.spec.model_copy(update=spec)
    save_model(model, path)
    return str(path)


def prepared(teacher, examples, family="bert", truncate=False, **settings):
    objective = Distil.make({"teacher": teacher, **settings})
    model = load_model(str(tiny_model(family)), truncate=truncate, **objective.load_options(examples))
    objective = objective.prepare(examples, Events())
    objective.check_model(model.spec)
    objective.adapt(model, examples)
    objective.ready(model, model.device, Events())
    return objective, model, objective.encode(examples, model, Events())


def fake(task, multi_label=False, scale=1.0):
    model = load_model(str(tiny_model("bert")), task=task, labels=("a", "b") if task == "classify" else ())
    model.spec = model.spec.model_copy(update={"multi_label": multi_label, "target_scale": scale})
    return model


def test_classes_by_hand():
    # Teacher odds 9 : 1, so at temperature 2 they are 3 : 1, p = (3/4, 1/4); the student's are even at any temperature.
    scores = torch.tensor([[0.7, 0.7], [0.7, 0.7]])
    gold = torch.tensor([[math.log(9), 0.0, 1.0, 1.0], [math.log(9), 0.0, 0.0, 0.0]])
    found = taught_losses(scores, gold, Aim(0.0, 2.0, 0.25), fake("classify"))
    soft = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    # The first row has a label, and a quarter of it counts; the second is learned from the teacher alone.
    assert found.tolist() == pytest.approx([0.75 * soft + 0.25 * math.log(2), soft])
    back = 4 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert taught_losses(scores, gold, Aim(1.0, 2.0), fake("classify")).tolist() == pytest.approx([back, back])


def test_the_gradient_at_a_high_temperature_is_that_of_the_logits():
    # Hinton et al., section 2.1: temperature^2 x the gradient comes near (student - teacher) / classes, means taken out.
    scores = torch.tensor([[0.5, -0.2, 0.3]], requires_grad=True)
    taught = torch.tensor([[1.0, 0.4, -0.8]])
    model = load_model(str(tiny_model("bert")), task="classify", labels=("a", "b", "c"))
    gold = torch.cat([taught, torch.zeros(1, 2)], 1)
    taught_losses(scores, gold, Aim(0.0, 1000.0), model).sum().backward()
    away = (scores.detach() - scores.detach().mean()) - (taught - taught.mean())
    torch.testing.assert_close(scores.grad, away / 3, rtol=2e-2, atol=1e-3)


def test_several_classes_at_once_by_hand():
    # Teacher odds of the first class 3 : 1 and of the second 1 : 1; the student's are even.
    scores = torch.zeros(1, 2)
    gold = torch.tensor([[math.log(3), 0.0, 1.0, 1.0, 1.0]])
    apart = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = taught_losses(scores, gold, Aim(0.0, 1.0, 0.5), fake("classify", multi_label=True))
    assert found.tolist() == pytest.approx([0.5 * apart / 2 + 0.5 * math.log(2)])


def test_numbers_by_hand():
    scores, gold = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert taught_losses(scores, gold, Aim(hard=0.25), fake("regress")).tolist() == pytest.approx([3.25, 4.0])
    found = taught_metrics(scores, gold, fake("regress", scale=10.0))
    assert found["mse_to_teacher"] == pytest.approx(400) and found["mse"] == pytest.approx(100)


@pytest.mark.parametrize("student", ["bert", "llama", "t5"])
def test_classes_are_matched_by_name_and_texts_read_in_each_models_own_tokens(student, tmp_path):
    teacher = scorer(tmp_path / "teacher", ("c", "a", "b"))
    rows = [Labelled("t:0", TEXTS[0], "a", TEXTS[1]), Text("t:1", TEXTS[1]), Labelled("t:2", TEXTS[2], "c")]
    objective, model, encoded = prepared(teacher, rows, student, hard=0.5)
    assert model.spec.labels == ("a", "b", "c") and objective.learned() == "classify"
    theirs = load_model(teacher)
    with torch.no_grad():
        pair = theirs.renderer.labelled(TEXTS[0], TEXTS[1])
        c, a, b = theirs.module(torch.tensor([pair.ids]), torch.ones(1, len(pair.ids)))[0].tolist()
    assert encoded[0].gold == pytest.approx((a, b, c, 0.0, 1.0), abs=1e-5)
    assert encoded[1].gold[-2:] == (0.0, 0.0) and encoded[2].gold[-2:] == (2.0, 1.0)
    assert encoded[0].ids == model.renderer.labelled(TEXTS[0], TEXTS[1]).ids
    loss, scores = objective.measure(model.module.eval() and model, objective.batch(encoded, model, (0, 0)))
    expected = 0.0
    for row, score_C in zip(encoded, scores.detach()):
        p, q = torch.tensor(row.gold[:3]).softmax(-1), score_C.softmax(-1)
        soft = (p * (p / q).log()).sum()
        expected += float(soft if not row.gold[-1] else 0.5 * soft - 0.5 * q[int(row.gold[3])].log())
    assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-4) and loss.weight == 3


def test_what_either_model_does_not_read_is_counted(tmp_path):
    """A cut, or a character outside the vocabulary; the teacher's context is the shorter."""
    teacher = scorer(tmp_path / "teacher", max_length=12)
    objective, model, _ = prepared(teacher, [Labelled("t:0", "ok", "a"), Labelled("t:1", "ok", "b")], truncate=True)
    texts = ["win a prize now " * 3, "win a prize now " * 40, "\u1234 ok", "ok"]
    events = Events()
    objective.encode([Text(f"t:{at}", text) for at, text in enumerate(texts)], model, events)
    counts = dict(events.warnings)
    theirs, ours = (
        next(one for one in counts if message in one) for message in ("teacher's context of 12", "to the context")
    )
    assert (counts.pop(theirs), counts.pop(ours)) == (2, 1)
    assert sorted(counts.values()) == [1, 1] and all("does not know" in message for message in counts)


def test_numbers_are_learned_in_the_teachers_unit(tmp_path):
    teacher = scorer(tmp_path / "teacher", (), task="regress", target_mean=50.0, target_scale=20.0)
    rows = [Labelled("t:0", TEXTS[0], 70.0, meta={"weight": 2.0}), Text("t:1", TEXTS[1])]
    objective, model, encoded = prepared(teacher, rows, "llama", hard=0.5)
    assert (model.spec.target_mean, model.spec.target_scale, objective.learned()) == (50.0, 20.0, "regress")
    assert encoded[0].gold[1:] == (1.0, 1.0) and encoded[1].gold[1:] == (0.0, 0.0)
    assert objective.batch(encoded, model, (0, 0)).weight == 3.0


def tell_apart(objective, model, rows, change):
    """The teacher as it is, and with `change` made to it, whose other spec it may return."""
    before, teacher = key_of(rows, objective, model), objective._teacher
    assert key_of(rows, objective, model) == before
    with torch.no_grad():
        spec = change(teacher)
    teacher.spec = teacher.spec.model_copy(update=spec if isinstance(spec, dict) else {})
    assert key_of(rows, objective, model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda teacher: teacher.module.head.weight.neg_(),
        lambda teacher: teacher.module.head.bias.add_(1),
        lambda teacher: next(teacher.network.parameters()).neg_(),
        lambda teacher: teacher.module.bfloat16(),
        lambda teacher: teacher.tokenizer.add_tokens(["prize"]),
        lambda teacher: {"labels": teacher.spec.labels[::-1]},
        lambda teacher: {"target_mean": 3.0},
        lambda teacher: {"max_length": 12},
        lambda teacher: {"pooling": "first"},
    ],
)
def test_the_cache_tells_teachers_that_score_apart(change, tmp_path):
    """A directory may hold another teacher tomorrow."""
    rows = [Labelled("t:0", TEXTS[0], "a"), Labelled("t:1", TEXTS[1], "b")]
    objective, model, _ = prepared(scorer(tmp_path / "teacher"), rows)
    tell_apart(objective, model, rows, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda teacher: teacher.module.lm_head.weight.neg_(),
        lambda teacher: {"template": {"name": "raw", "source": ""}},
        lambda teacher: setattr(teacher.network.config, "rope_theta", 5.0),
    ],
)
def test_the_cache_tells_teachers_that_write_apart(change):
    objective, model, _ = prepared(str(tiny_model("llama", seed=1)), PAIRS, "llama", answers="teacher", max_tokens=4)
    tell_apart(objective, model, PAIRS, change)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Labelled("t:1", "x", "d"), r"t:1: the teacher .* does not know the class 'd', only a, b"),
        (Labelled("t:1", "x", ("a", "b")), "t:1: the teacher .* gives one class, and the row has a list"),
        (Pair("t:1", "x", "y"), "t:1: the teacher .* gives classes or numbers to texts, and this is a Pair"),
    ],
)
def test_rows_that_the_teacher_cannot_judge(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        prepared(scorer(tmp_path / "teacher"), [Labelled("t:0", "x", "a"), row])


def test_a_label_for_a_teacher_of_numbers(tmp_path):
    teacher = scorer(tmp_path / "teacher", (), task="regress")
    with pytest.raises(DataError, match="gives numbers, and the row has the label 'a'"):
        prepared(teacher, [Labelled("t:0", "x", "a")])
    with pytest.raises(ConfigError, match="gives numbers, which have no distribution"):
        prepared(teacher, [Labelled("t:0", "x", 1.0)], temperature=2.0)


def test_settings_and_teachers_that_do_not_fit(tmp_path):
    teacher = scorer(tmp_path / "teacher")
    rows = [Labelled("t:0", "x", "a"), Labelled("t:1", "y", "b")]
    with pytest.raises(ConfigError, match="writes answers where it learns what 'sft' does, not 'classify'"):
        prepared(teacher, rows, on_policy=0.5)
    with pytest.raises(ConfigError, match="the rows hold no prompts that the teacher could answer"):
        prepared(teacher, rows, answers="teacher")
    with pytest.raises(DataError, match="labelled rows are learned from a teacher tuned with 'classify' or 'regress'"):
        prepared(str(tiny_model("llama")), rows)
    for settings, message in (
        ({"hard": 1.0}, "hard: 1 learns nothing from the teacher"),
        ({"beams": 2}, "beams are for answers that the teacher writes"),
    ):
        with pytest.raises(ConfigError, match=message):
            Distil.make({"teacher": teacher, **settings})
    objective, model, _ = prepared(teacher, rows)
    model.spec = model.spec.model_copy(update={"labels": ("a", "z")})
    with pytest.raises(ConfigError, match=r"sort into other classes \('b' is a class of one alone\)"):
        objective.ready(model, model.device, Events())
    rewards = scorer(tmp_path / "rewards", (), task="regress", learned="reward")
    with pytest.raises(ConfigError, match="gives rewards for conversations"):
        prepared(rewards, rows)
    with pytest.raises(ConfigError, match=r"is an encoder-decoder, and .* is none"):
        prepared(str(tiny_model("bart")), PAIRS, "llama")
    with pytest.raises(ValueError, match=r"learns from .* rows, this is Preference"):
        objective.check_examples([Preference("x", (), (), ())])


@pytest.mark.parametrize("family", ["bart", "t5", "marian"])
def test_an_encoder_decoder_is_that_of_both_models_logits(family):
    objective, model, rows = prepared(str(tiny_model(family, seed=1)), PAIRS, family, temperature=1.5, hard=0.25)
    teacher = load_model(str(tiny_model(family, seed=1)))
    loss, _ = objective.measure(model, objective.batch(rows, model, (0, 0)))
    expected = 0.0
    for row in rows:
        ids, target = torch.tensor([row.ids]), torch.tensor([row.target])
        start = torch.full((1, 1), model.network.config.decoder_start_token_id)
        before = torch.cat([start, target[:, :-1]], 1)
        with torch.no_grad():
            mine, theirs = (
                one.module(input_ids=ids, decoder_input_ids=before).logits[0].float() for one in (model, teacher)
            )
        p, q = (theirs / 1.5).softmax(-1), (mine / 1.5).softmax(-1)
        soft = 2.25 * (p * (p / q).log()).sum()
        nll = -mine.log_softmax(-1).gather(1, target.T).sum()
        expected += float(0.75 * soft + 0.25 * nll)
    assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-3)
    assert objective.learned() == "seq2seq"


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_that_the_teacher_writes(beams):
    teacher = load_model(str(tiny_model("bart", seed=1)))
    said = generate(teacher, [pair.source for pair in PAIRS], Sampling(max_tokens=6, beams=beams))
    events = Events()
    settings = {"answers": "teacher", "beams": beams, "max_tokens": 6, "hard": 1.0}
    objective, model, _ = prepared(teacher.spec.source, PAIRS, "bart", **settings)
    rows = objective.encode(PAIRS, model, events)
    written = [replace(pair, target=one.text.strip() or pair.target) for pair, one in zip(PAIRS, said)]
    assert [row.target for row in rows] == [row.target for row in Seq2Seq().encode(written, model, Events())]
    silent = sum(not one.text.strip() for one in said)
    cut = sum(one.finish == "length" and bool(one.text.strip()) for one in said)
    assert list(events.warnings.values()) == [count for count in (silent, cut) if count]
    assert sum(row.target_weights[-1] == 0 for row in rows) == cut
    batch = objective.batch(rows, model, (0, 0))
    mine, plain = (one.measure(model, batch)[0] for one in (objective, Seq2Seq()))
    assert float(mine.sum.detach()) == float(plain.sum.detach()) and mine.weight == plain.weight


@pytest.mark.parametrize("family", ["qwen2", "llama", "bart"])
def test_an_answer_that_was_cut_does_not_teach_to_stop(family, monkeypatch):
    """The student would learn to end in the middle of a sentence."""
    events = Events()
    objective, model, _ = prepared(
        str(tiny_model(family, seed=1)), PAIRS, family, answers="teacher", hard=1.0, max_tokens=4
    )
    text, end = model.tokenizer("so", add_special_tokens=False)["input_ids"], model.spec.stop_ids[0]
    said = [(*text, end), tuple(text), (end,)]
    monkeypatch.setattr("luthier.training.objectives.teacher.roll_out", lambda *rest, **more: said)
    rows = objective.encode(PAIRS[:3], model, events)
    for row, ends in zip(rows, (1.0, 0.0, 1.0)):
        ids, weights = (row.target, row.target_weights) if row.target else (row.ids, row.weights)
        last = max(at for at, token in enumerate(ids) if token == end)
        assert weights[last] == ends and not any(weights[last + 1 :]) and weights[last - 1] == 1.0
    warned = {message.split(" ")[0]: count for message, count in events.warnings.items()}
    assert warned == {"answers": 1, "prompts": 1}


def test_of_a_cut_row_the_end_of_an_earlier_turn_is_still_learned():
    row = Encoded("t:0", (1, 2, 9, 3, 4), (0.0, 1.0, 1.0, 0.0, 1.0))
    assert leave_open(row, (9,)) == row
    assert leave_open(replace(row, ids=(1, 2, 3, 4, 9)), (9,)).weights == (0.0, 1.0, 1.0, 0.0, 0.0)


def test_a_teacher_that_writes_may_have_another_tokenizer():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    settings = {"answers": "teacher", "hard": 1.0, "max_tokens": 5}
    teacher = str(tiny_model("llama", seed=1))
    _, model, rows = prepared(teacher, [Chat("t:0", turns)], "qwen2", **settings)
    theirs = load_model(teacher)
    said = generate(theirs, [turns[:3]], Sampling(max_tokens=5))[0].text.strip()
    answered = Chat("t:0", (*turns[:3], Message("assistant", said)))
    assert rows[0].ids == model.renderer.chat(answered).ids
    with pytest.raises(ConfigError, match="has another tokenizer"):
        prepared(teacher, [Chat("t:0", turns)], "qwen2", answers="teacher", max_tokens=5)
    with pytest.raises(DataError, match=r"t:0: the prompt has \d+ tokens"):
        prepared(teacher, [Chat("t:0", (Message("user", "word " * 200), turns[1]))], "qwen2", **settings)


def values(teacher, **other):
    rows = [{"text": text, "label": "ba"[at % 2]} for at, text in enumerate(TEXTS * 3)]
    return {
        "model": str(tiny_model("bert")),
        "data": {"train": rows[:14], "validation": rows[14:]},
        "objective": {"kind": "distil", "teacher": teacher, "temperature": 2.0, "hard": 0.02},
        "steps": 40,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "schedule": "constant",
        "name": "one",
        **other,
    }


def test_a_classifier_comes_near_and_is_judged(tmp_path, runs):
    teacher = scorer(tmp_path / "teacher", family="llama")
    record, model = tune_model(resolve(Tune, values=values(teacher, pooling="first", steps=120)))
    events = list(read_events(runs / "one" / "events.jsonl"))
    looks = [event for event in events if event["event"] == "validate"]
    assert looks[-1]["agreement"] == 1.0 and looks[-1]["loss"] < looks[0]["loss"] and "macro_f1" in looks[-1]
    assert model.spec.learned == "classify" and model.spec.pooling == "first" and "accuracy" in record.metrics
    assert load_model("run:one").spec.labels == ("a", "b")
    # And it learns on from another teacher with its head kept.
    more = values(teacher, model="run:one", name="two", steps=1, learning_rate=1e-9)
    _, again = tune_model(resolve(Tune, values=more))
    assert torch.allclose(again.module.head.weight, model.module.head.weight, atol=1e-6)


def test_rows_without_any_label_are_learned_and_not_judged(tmp_path, runs):
    teacher = scorer(tmp_path / "teacher")
    data = {"train": [{"text": text} for text in TEXTS], "validation": [{"text": text} for text in TEXTS[:3]]}
    record = tune(resolve(Tune, values=values(teacher, data=data, steps=3)))
    assert record.state == "finished" and not record.metrics
    assert any("have no labels, so the tuned model was not judged" in one for one in record.warnings)


def test_labelled_and_unlabelled_sources_together(tmp_path, runs):
    teacher = scorer(tmp_path / "teacher")
    files = {"some": values(teacher)["data"]["train"], "more": [{"text": text + "!"} for text in TEXTS]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = [{"source": str(tmp_path / f"{name}.jsonl")} for name in files]
    data = {"train": sources, "split": {"validation": 0.25}}
    record = tune(resolve(Tune, values=values(teacher, data=data, steps=3)))
    assert record.state == "finished" and "accuracy" in record.metrics


def test_two_processes_give_what_one_gives(tmp_path, runs, cache):
    """One process of the machine asks the teacher; the other reads what it said."""
    teacher = scorer(tmp_path / "teacher")
    for name, rows in values(teacher)["data"].items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    quick = {"data": data, "steps": 4, "baselines": False}
    found = []
    for processes in (1, 2):
        name = f"of-{processes}"
        tune(resolve(Tune, values=values(teacher, **quick, processes=processes, name=name)))
        events = read_events(runs / name / "events.jsonl")
        found.append([event["loss"] for event in events if event["event"] in ("step", "validate")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
