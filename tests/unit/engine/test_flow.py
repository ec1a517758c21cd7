"""Rows through one engine: the answers of `generate`, in order, in fewer steps than by batches, a window of rows at a time."""

import pytest

from luthier.engine.engine import Engine
from luthier.engine.flow import AHEAD, room_in_order, write_in_order
from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.engine.structure import Structure
from luthier.models.load import load_model

WORDS = ["The fox", "One day a", "春江潮水", "a", "Once upon a time there was", "When", "酒店的", "He said"]
PROMPTS = [f"{word} {'and ' * (at % 5)}" for at, word in enumerate(WORDS * 3)]
# Answers of a few tokens and of many.
MIXED = Sampling(max_tokens=48, temperature=1.2, seed=5, stop=("e", "，"))


@pytest.fixture
def steps(monkeypatch):
    """How many steps engines took."""
    found, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: found.append(1) or step(self))
    return found


def ask(model, sampling=MIXED, streams=4, prompts=PROMPTS):
    encoded = [model.renderer.prompt(one, raw=True) for one in prompts]
    room = room_in_order(model, [len(one) for one in encoded], sampling, streams)
    return write_in_order(model, enumerate(encoded), sampling, room=room, streams=streams)


def test_answers_are_those_of_generate_in_order_and_a_long_one_holds_up_nobody(steps):
    model = load_model("mini")
    batches = [
        generate(model, PROMPTS[at : at + 4], MIXED, raw=True, keys=range(at, at + 4))
        for at in range(0, len(PROMPTS), 4)
    ]
    by_batch = len(steps)
    found = [one for ready in ask(model) for one in ready]
    assert found == [one for batch in batches for one in batch]
    lengths = [len(one.ids) for one in found]
    assert min(lengths) < 6 and max(lengths) > 20
    assert len(steps) - by_batch < 0.8 * by_batch, (by_batch, len(steps) - by_batch)


def test_several_answers_to_a_prompt_come_together():
    model = load_model("mini")
    three = MIXED.model_copy(update={"n": 3})
    assert [one for ready in ask(model, three) for one in ready] == generate(model, PROMPTS, three, raw=True)


def test_no_more_than_a_window_of_prompts_is_taken():
    model, taken, done = load_model("mini"), 0, 0

    def prompts():
        nonlocal taken
        for at in range(200):
            taken += 1
            yield at, model.renderer.prompt("a", raw=True)

    most = 0
    for ready in write_in_order(model, prompts(), Sampling(max_tokens=2), room=256, streams=2):
        done += len(ready)
        most = max(most, taken - done)
    assert done == taken == 200 and most <= 4 and most < AHEAD * 2


def test_a_long_answer_holds_back_no_more_than_a_window_of_those_behind_it():
    model, taken, one, two = load_model("mini"), 0, "Once upon a time", "春江潮水连海平，"
    first = generate(model, [one], Sampling(max_tokens=150), raw=True)[0]
    second = generate(model, [two], Sampling(max_tokens=4), raw=True)[0]
    # What ends the second at once and is nowhere in the first.
    stop = next(letter for letter in second.text if letter not in first.text)
    assert len(first.ids) > 100

    def prompts():
        nonlocal taken
        for at in range(400):
            taken += 1
            yield at, model.renderer.prompt(two if at else one, raw=True)

    found = write_in_order(model, prompts(), Sampling(max_tokens=150, stop=(stop,)), room=1024, streams=2)
    assert next(found)[0].text == first.text and 8 < taken <= 2 * AHEAD


def test_an_error_comes_after_the_answers_before_it():
    model, handed = load_model("mini"), []
    # The third may write nothing that its structure allows.
    text = Sampling(max_tokens=6, structure=Structure(regex="[a-z]{4}"))
    encoded = [model.renderer.prompt("a", raw=True)] * 3

    def prompts():
        yield from enumerate(encoded[:2])
        yield 2, (*encoded[2], model.spec.max_length * 1000)

    with pytest.raises(Exception, match="index"):
        for ready in write_in_order(model, prompts(), text, room=256, streams=1):
            handed += ready
    assert len(handed) == 2
