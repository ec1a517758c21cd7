"""What every objective must hold, whatever it learns: an entry in the catalog is checked without a test of its own."""

from functools import cache
from pathlib import Path

import pytest
import torch

from luthier.core.events import Events
from luthier.core.types import Chat, Example, Feedback, Labelled, Message, Pair, Preference, Text
from luthier.models.load import load_model
from luthier.models.save import save_model
from luthier.models.spec import LoadedModel
from luthier.training.objectives import OBJECTIVES
from luthier.training.objectives.part import Objective
from luthier.training.validation import validate
from tiny import tiny_model

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Win a free prize now!",
    "Ok, see you at the station at seven. Do not forget the tickets.",
    "房间很干净，服务员非常热情，下次还会来。",
    "酒店的位置不好。",
    "One two three four five six seven eight nine ten.",
    "A tuned model answers briefly.",
    "Call 0800 123 456 before midnight.",
]
FAMILY = {"seq2seq": "bart", "distil of seq2seq": "bart"}
# What an objective cannot do without.
SETTINGS = {
    "grpo": {"rewards": {"kind": "length", "tokens": 4}, "samples": 3, "max_tokens": 6, "beta": 0.1},
    "distil": {"teacher": str(tiny_model("llama", seed=1))},
    "distil of seq2seq": {"teacher": str(tiny_model("bart", seed=1)), "temperature": 0.25},
    "distil of classify": {"hard": 0.02, "temperature": 2.0},
    "distil of regress": {"hard": 0.3},
}
# What learns in several ways is checked in each.
CASES = [*OBJECTIVES.names(), *(name for name in SETTINGS if " of " in name)]
# Those that learn from the model's own answers have a reward that rises, and no loss that falls: see their own tests.
FALLING = [name for name in CASES if not OBJECTIVES.load(name.split()[0]).idle]


@cache
def scorer(task: str) -> str:
    """A teacher with a head for what the rows carry, at random, and larger scores than a new head gives."""
    torch.manual_seed(3)
    labels = ("odd", "even") if task == "classify" else ()
    model = load_model(str(tiny_model("llama", seed=1)), task=task, labels=labels)
    torch.nn.init.normal_(model.module.head.weight, std=1.0)
    model.spec = model.spec.model_copy(update={"target_mean": 40.0, "target_scale": 15.0})
    folder = tiny_model("llama", seed=1).with_name(f"teacher-{task}")
    save_model(model, folder)
    return str(folder)


def settings_of(name: str) -> dict:
    settings = SETTINGS.get(name, {})
    of = name.partition(" of ")[2]
    return settings | ({"teacher": scorer(of)} if of in ("classify", "regress") else {})


def examples_for(name: str) -> list[Example]:
    name = name.partition(" of ")[2] or name
    if name == "pretrain":
        return [Text(f"t:{at}", text) for at, text in enumerate(SENTENCES)]
    if name in ("sft", "grpo", "distil"):
        turns = [(Message("user", text), Message("assistant", text[::-1][:12])) for text in SENTENCES]
        return [Chat(f"t:{at}", messages) for at, messages in enumerate(turns)]
    if name in ("dpo", "orpo", "simpo", "reward"):
        return [
            Preference(
                f"t:{at}", (Message("user", text),), (Message("assistant", text[:9]),), (Message("assistant", "No"),)
            )
            for at, text in enumerate(SENTENCES)
        ]
    if name == "kto":
        return [
            Feedback(f"t:{at}", (Message("user", text),), (Message("assistant", text[: 9 + at]),), at % 2 == 0)
            for at, text in enumerate(SENTENCES)
        ]
    if name == "seq2seq":
        return [Pair(f"t:{at}", text, text[:10]) for at, text in enumerate(SENTENCES)]
    if name == "regress":
        return [Labelled(f"t:{at}", text, float(len(text))) for at, text in enumerate(SENTENCES)]
    return [Labelled(f"t:{at}", text, ("even", "odd")[at % 2]) for at, text in enumerate(SENTENCES)]


def prepared(name: str, folder: Path) -> tuple[Objective, LoadedModel, list]:
    objective = OBJECTIVES.parse({"kind": name.split()[0], **settings_of(name)})
    examples = examples_for(name)
    torch.manual_seed(0)
    model = load_model(str(tiny_model(FAMILY.get(name, "llama"))), **objective.load_options(examples))
    objective = objective.prepare(examples, Events())
    objective.check_model(model.spec)
    objective.adapt(model, examples)
    objective.ready(model, model.device, Events())
    objective.keep_start(model, Events())
    rows = objective.encode(examples, model, Events())
    return objective, model, objective.refer(rows, model, Events(), folder)


@pytest.mark.parametrize("name", CASES)
def test_sum_and_weight_add_up_over_any_split_of_the_rows(name, tmp_path):
    objective, model, rows = prepared(name, tmp_path)
    rows = objective.draw(rows, model, (0, 0))
    model.module.eval()

    def measure(part):
        batch = objective.batch(part, model, (0, 0))
        loss, _ = objective.measure(model, batch)
        assert loss.weight == pytest.approx(batch.weight)
        return float(loss.sum), loss.weight

    with torch.no_grad():
        whole = measure(rows)
        alone = [measure([row]) for row in rows]
    assert sum(one[0] for one in alone) == pytest.approx(whole[0], rel=1e-5)
    assert sum(one[1] for one in alone) == pytest.approx(whole[1], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_pad_id_does_not_matter(name, tmp_path):
    objective, model, rows = prepared(name, tmp_path)
    model.module.eval()
    values = []
    for pad in (0, 7):
        model.tokenizer.pad_token = model.tokenizer.convert_ids_to_tokens(pad)
        drawn = objective.draw(rows, model, (0, 0))
        with torch.no_grad():
            values.append(float(objective.measure(model, objective.batch(drawn, model, (0, 0)))[0].sum))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_validation_does_not_depend_on_what_goes_through_at_once(name, tmp_path):
    objective, model, rows = prepared(name, tmp_path)
    found = [validate(model, objective, rows, tokens=tokens) for tokens in (1, 50, 100_000)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", FALLING)
def test_it_learns_eight_rows(name, tmp_path):
    objective, model, rows = prepared(name, tmp_path)
    model.module.train()
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=5e-3)
    values = []
    for _ in range(60):
        drawn = objective.draw(rows, model, (0, 0))
        loss, _ = objective.measure(model, objective.batch(drawn, model, (0, 0)))
        (loss.sum / loss.weight).backward()
        moved = [parameter for parameter in model.module.parameters() if parameter.grad is not None]
        assert any(float(parameter.grad.abs().max()) > 0 for parameter in moved)
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(loss.sum.detach()) / loss.weight)
    assert values[-1] < 0.35 * values[0]


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_rows_of_another_kind_are_refused_with_a_way_out(name):
    objective = OBJECTIVES.parse({"kind": name, **SETTINGS.get(name, {})})
    answer = (Message("assistant", "a"),)
    others = (Labelled("x:1", "a", "b"), Pair("x:1", "a", "b"), Preference("x:1", answer, answer, answer))
    other = next(one for one in others if not isinstance(one, objective.wants))
    with pytest.raises(ValueError, match=r"^x:1: objective '\w+' learns from .*; .* fit"):
        objective.check_examples([other])


@pytest.mark.parametrize("name", CASES)
def test_what_is_drawn_is_a_function_of_the_seed(name, tmp_path):
    objective, model, rows = prepared(name, tmp_path)
    first, again = (objective.draw(rows, model, (1, 2)) for _ in range(2))
    assert first == again and [row.id for row in first] == [row.id for row in rows]
