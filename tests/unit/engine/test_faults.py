"""What goes wrong with one text ends that text: the others become what they would have been, and no block is lost."""

from functools import cache

import numpy as np
import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.types import Encoded
from luthier.engine.drafts import Guesser
from luthier.engine.engine import Engine
from luthier.engine.generate import generate, stream
from luthier.engine.likeliest import most_likely
from luthier.engine.likelihood import score
from luthier.engine.numbers import numbers_of
from luthier.engine.padded import write
from luthier.engine.rollouts import roll_out
from luthier.engine.sampling import Sampling
from writing import endless, prompts

SIZES = (40, 5, 70, 3, 33)
DRAWN = Sampling(max_tokens=20, temperature=1.1)
GREEDY = Sampling(max_tokens=20)


class Fault(Exception):
    pass


def fail(*_, **__):
    raise Fault("this text alone")


def added(engine, samplings, sizes=SIZES):
    return [
        engine.add(prompt, sampling, draw=numbers_of(3, at) if sampling.temperature else None)
        for at, (prompt, sampling) in enumerate(zip(prompts(sizes), samplings))
    ]


def drained(engine):
    """Step to the end, errors or not; how each step went."""
    told = []
    while engine.busy:
        told += engine.step()
    assert engine.blocks.used == 0
    assert {one for one in told if one.finish == "error"} == {one for one in told if one.error is not None}
    return told


def alone(model, samplings, sizes=SIZES):
    engine = Engine(model, 4096)
    requests = added(engine, samplings, sizes)
    drained(engine)
    return [(one.written, one.logs, one.prompt_logs) for one in requests]


@cache
def two_alone(family):
    return [one[0] for one in alone(endless(family), [DRAWN] * 2, (17, 33))]


def goes_on(engine, model):
    """An engine after a fault writes as a new one does."""
    again = added(engine, [DRAWN] * 2, (17, 33))
    drained(engine)
    assert [one.written for one in again] == two_alone(model.spec.family)


def late_draw(engine, request):
    draw = request.draw
    request.draw = lambda place: fail() if place == 7 else draw(place)


def nothing_left(engine, request):
    vocabulary = engine.model.network.get_input_embeddings().weight.shape[0]
    request.ends, request.sampling = tuple(range(vocabulary)), request.sampling.model_copy(update={"min_tokens": 20})


def broken_stop(engine, request):
    renderer, request.sampling = engine.model.renderer, request.sampling.model_copy(update={"stop": ("nowhere",)})
    renderer.decode = lambda ids, whole=renderer.decode: fail() if len(request.written) > 4 else whole(ids)


def broken_guess(engine, request):
    request.guesser.guess = fail


def broken_lesson(engine, request):
    request.guesser.guess, request.guesser.learn = (lambda *_: [5, 6]), fail


def broken_name(engine, request):
    name = engine.blocks.name
    engine.blocks.name = lambda block, *one: fail() if block in request.table else name(block, *one)


def broken_logs(engine, request):
    request.sampling = request.sampling.model_copy(update={"logprobs": 10**6})


FAULTS = [late_draw, nothing_left, broken_stop, broken_guess, broken_lesson, broken_name, broken_logs]


MIXED = [DRAWN, GREEDY, DRAWN, DRAWN.model_copy(update={"logprobs": 2}), GREEDY]


@pytest.fixture(scope="module")
def mixed_alone():
    return alone(endless("qwen3"), MIXED)


@pytest.mark.parametrize("break_it", FAULTS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("settings", [{}, {"tokens": 16}, {"streams": 3}], ids=str)
def test_a_fault_of_one_text_ends_that_text_alone(break_it, settings, mixed_alone):
    model, right = endless("qwen3"), mixed_alone
    decode = model.renderer.decode
    engine = Engine(model, 4096, **settings)
    requests = added(engine, MIXED)
    break_it(engine, requests[2])
    told = drained(engine)
    model.renderer.decode = decode
    assert requests[2].finish == "error" and told.count(requests[2]) <= len(requests[2].written) + 1
    assert requests[2].written == right[2][0][: len(requests[2].written)]
    for one, (written, logs, _) in zip(requests, right):
        if one is not requests[2]:
            assert (one.written, one.logs, one.finish, one.error) == (written, logs, "length", None)
    vars(engine.blocks).pop("name", None)
    goes_on(engine, model)


def test_likelihoods_of_a_prompt_that_fail_are_that_texts_alone(monkeypatch):
    model, sampling = endless(), GREEDY.model_copy(update={"prompt_logprobs": True})
    right = alone(model, [sampling] * 5)
    engine = Engine(model, 4096)
    requests = added(engine, [sampling] * 5)
    whole = "luthier.engine.forward.prompt_logs"
    from luthier.engine.forward import prompt_logs

    bad = list(requests[2].prompt[1:])
    monkeypatch.setattr(whole, lambda rows, ids: fail() if list(ids) == bad else prompt_logs(rows, ids))
    drained(engine)
    assert [one.finish for one in requests] == ["length", "length", "error", "length", "length"]
    assert [one.written for one in requests if one.error is None] == [right[at][0] for at in (0, 1, 3, 4)]
    assert [one.prompt_logs for one in requests if one.error is None] == [right[at][2] for at in (0, 1, 3, 4)]


class Failing:
    """A reader that fails at some of its calls."""

    def __init__(self, reader, error, calls):
        self.reader, self.error, self.calls, self.sizes = reader, error, calls, []

    def read(self, ids, *rest, **settings):
        self.sizes.append(len(ids))
        if len(self.sizes) - 1 in self.calls:
            held = torch.zeros(10)  # noqa: F841  what a frame holds
            raise self.error
        return self.reader.read(ids, *rest, **settings)


def failing(engine, error, *calls):
    engine._forward._reader = Failing(engine._forward._reader, error, calls)
    return engine._forward._reader


@pytest.mark.parametrize("error", [Fault("reading"), RuntimeError("CUDA error: unspecified launch failure")], ids=repr)
def test_a_step_that_cannot_be_read_ends_its_texts_and_no_others(error):
    model = endless("qwen3")
    right = alone(model, [DRAWN] * 5)
    engine = Engine(model, 4096, streams=2)
    requests = added(engine, [DRAWN] * 5)
    failing(engine, error, 4)
    drained(engine)
    assert [one.finish for one in requests] == ["error", "error", "length", "length", "length"]
    assert all(one.error is error for one in requests[:2])
    assert [one.written for one in requests] == [right[0][0][:4], right[1][0][:4], *(one[0] for one in right[2:])]
    goes_on(engine, model)


OUT = [MemoryError("no memory for a step"), torch.OutOfMemoryError("out"), RuntimeError("can't allocate memory: x")]


@pytest.mark.parametrize("error", OUT, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("call", [0, 3])
def test_where_memory_runs_out_half_is_read_at_once_and_all_is_written(error, call):
    model = endless("qwen3")
    right = alone(model, [DRAWN] * 5)
    engine = Engine(model, 4096, tokens=64)
    requests = added(engine, [DRAWN] * 5)
    reader = failing(engine, error, call)
    with pytest.warns(UserWarning, match="memory ran out, so .* tokens go through the model at once from now on"):
        drained(engine)
    assert [one.written for one in requests] == [one[0] for one in right]
    assert max(reader.sizes[call + 1 :]) <= reader.sizes[call] // 2 == engine.schedule.tokens
    goes_on(engine, model)


def test_after_many_steps_more_is_read_at_once_again(monkeypatch):
    monkeypatch.setattr("luthier.engine.tide.CALM", 4)
    model = endless("qwen3")
    right = alone(model, [DRAWN] * 5)
    engine = Engine(model, 4096, tokens=64, guessed=0)
    requests = added(engine, [DRAWN] * 5)
    reader = failing(engine, MemoryError("none"), 0)
    with pytest.warns(UserWarning) as said:
        drained(engine)
    told = [str(one.message) for one in said]
    assert ["32 tokens go through" in told[0], told[1]] == [
        True, "memory was enough for 4 steps, so 64 tokens go through the model at once again; the result is the same",
    ]  # fmt: skip
    assert (
        len(told) == 2
        and (engine._forward._tide.fallen, engine._forward._tide.risen) == (1, 1)
        and engine.schedule.tokens == 64
    )
    assert [one.written for one in requests] == [one[0] for one in right] and max(reader.sizes[1:5]) <= 32
    # What ran out again waits twice as long.
    reader.calls, reader.sizes = {0}, []
    again = added(engine, [DRAWN] * 5)
    with pytest.warns(UserWarning) as said:
        drained(engine)
    assert "memory was enough for 8 steps" in str(said[1].message)
    assert [one.written for one in again] == [one[0] for one in right]


def test_guesses_are_dropped_from_the_half_that_is_read():
    model = endless()
    right = alone(model, [GREEDY] * 5)
    engine = Engine(model, 4096)
    requests = added(engine, [GREEDY] * 5)
    for at, one in enumerate(requests):
        said = list(right[at][0])
        one.guesser.guess = lambda written, most, _, said=said: said[len(written) : len(written) + most]
    failing(engine, MemoryError(), 1)
    with pytest.warns(UserWarning, match="memory ran out"):
        drained(engine)
    assert [one.written for one in requests] == [one[0] for one in right]
    assert sum(one.accepted for one in requests) > 0


def test_where_memory_runs_out_for_half_as_well_those_that_were_read_end():
    model = endless("qwen3")
    right = alone(model, [DRAWN] * 5)
    engine = Engine(model, 4096)
    requests = added(engine, [DRAWN] * 5)
    failing(engine, MemoryError("none"), 3, 4)
    with pytest.warns(UserWarning, match="so 2 tokens go"):
        drained(engine)
    assert [one.finish for one in requests] == ["error", "error", "length", "length", "length"]
    assert [one.written for one in requests[2:]] == [one[0] for one in right[2:]]
    goes_on(engine, model)


def test_where_no_step_can_be_planned_every_text_ends(monkeypatch):
    model = endless()
    engine = Engine(model, 4096, streams=2)
    requests = added(engine, [DRAWN] * 5)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(engine.schedule, "plan", fail)
        assert set(engine.step()) == set(requests)
    assert not engine.busy and engine.blocks.used == 0
    assert all(isinstance(one.error, Fault) for one in requests)
    goes_on(engine, model)


def test_an_error_keeps_its_place_but_nothing_of_the_step():
    engine = Engine(endless(), 4096)
    requests = added(engine, [DRAWN] * 5)
    failing(engine, Fault("reading"), 5)
    late_draw(engine, requests[1])
    requests[1].draw = lambda place: fail() if place == 2 else 0.5
    drained(engine)
    for one in requests:
        places, tensors, at = [], [], one.error.__traceback__
        while at is not None:
            places.append(at.tb_frame.f_code.co_name)
            tensors += [value for value in at.tb_frame.f_locals.values() if isinstance(value, torch.Tensor)]
            at = at.tb_next
        assert ("fail" if one is requests[1] else "read") in places and not tensors


def test_who_waits_for_a_text_gets_its_error(monkeypatch):
    model = endless()
    monkeypatch.setattr(Guesser, "guess", fail)
    with pytest.raises(Fault):
        generate(model, ["a", "b"], Sampling(max_tokens=4))
    engine = Engine(model, 512)
    with pytest.raises(Fault):
        list(stream(model, "a", Sampling(max_tokens=4), engine=engine))
    assert engine.blocks.used == 0 and not engine.busy
    monkeypatch.undo()
    with pytest.raises(IndexError):
        roll_out(model, prompts((5, 9)), 8, numbers_SM=np.random.default_rng(0).random((2, 5)))
    with pytest.raises(ConfigError, match="leave no token that may come"):
        vocabulary = model.network.get_input_embeddings().weight.shape[0]
        generate(model, ["a"], Sampling(max_tokens=4, min_tokens=2, stop_ids=tuple(range(vocabulary))))


def test_a_fault_that_is_nobodys_ends_all(monkeypatch):
    model = endless()
    engine = Engine(model, 4096)
    requests = added(engine, [DRAWN] * 3)
    with monkeypatch.context() as broken:
        broken.setattr("luthier.engine.engine.choose", fail)
        drained(engine)
    assert all(isinstance(one.error, Fault) for one in requests)
    goes_on(engine, model)


NO_NUMBERS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "top_p": DRAWN.model_copy(update={"top_p": 0.9}),
    "top_k": DRAWN.model_copy(update={"top_k": 9, "min_p": 0.1}),
    "min_p": DRAWN.model_copy(update={"min_p": 0.1}),
    "typical": DRAWN.model_copy(update={"typical_p": 0.5}),
    "penalised": GREEDY.model_copy(update={"presence_penalty": 1.0}),
    "logs": GREEDY.model_copy(update={"logprobs": 2}),
    "prompt": GREEDY.model_copy(update={"prompt_logprobs": True}),
    "structure": Sampling(max_tokens=20, structure={"regex": "[a-z0-9 ]{200,}"}),
    "drawn structure": Sampling(max_tokens=20, temperature=1.1, structure={"regex": "[a-z0-9 ]{200,}"}),
}
# A token whose embedding is no number, so that nothing after it is.
BAD = 391


def damaged(value, family="llama"):
    model = endless(family)
    with torch.no_grad():
        model.network.get_input_embeddings().weight[BAD, 3] = value
    return model


@pytest.mark.parametrize("sampling", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_text_whose_logits_are_no_numbers_ends_alone(sampling, value):
    model = damaged(value)
    right = alone(endless(), [sampling] * 4, SIZES[:4])
    engine = Engine(model, 4096)
    bad = engine.add([7, BAD, 9], sampling, draw=numbers_of(3, 9) if sampling.temperature else None)
    others = added(engine, [sampling] * 4, SIZES[:4])
    drained(engine)
    assert bad.finish == "error" and bad.written == [] and isinstance(bad.error, ModelError)
    assert "the model's logits are not numbers" in str(bad.error)
    assert [(one.written, one.logs, one.prompt_logs) for one in others] == right
    # What it had read lies in blocks that others take over, or begin with.
    (whole,) = prompts(SIZES[:1])
    late = engine.add([*whole, BAD], sampling, draw=numbers_of(3, 9) if sampling.temperature else None)
    drained(engine)
    assert late.finish == "error"
    again = added(engine, [sampling] * 4, SIZES[:4])
    drained(engine)
    assert [one.written for one in again] == [one[0] for one in right]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_logits_that_are_no_numbers_are_told_wherever_they_are_used(family):
    model = damaged(torch.nan, family)
    said = {"match": "the model's logits are not numbers"}
    for beams in (1, 2):
        with pytest.raises(ModelError, **said):
            roll_out(model, [[7, 9], [7, BAD, 9]], 5, beams=beams)
        with pytest.raises(ModelError, **said):
            write(model, [[7, BAD, 9]], Sampling(max_tokens=5, beams=beams))
    if family == "llama":
        engine = Engine(model, 512)
        with pytest.raises(ModelError, **said):
            engine.score([7, BAD, 9], [[5], [6]])
        assert engine.score([7, 9], [[5], [6]])
        row = Encoded("a", (7, BAD, 9, 11), (0.0, 1.0, 1.0, 1.0))
        with pytest.raises(ModelError, **said):
            score(model, [row])


def test_an_impossible_token_alone_is_no_fault():
    # Padded vocabularies of some models have logits of minus infinity.
    logits_RV = torch.tensor([[0.0, -torch.inf, 2.0], [torch.nan, 1.0, 0.0], [0.0, torch.inf, 1.0], [-torch.inf] * 3])
    assert most_likely(logits_RV).tolist() == [2, -1, -1, -1]


def test_a_guess_right_after_a_prompt_that_fails_ends_that_text_alone():
    model = endless()
    right = alone(model, [GREEDY] * 5)
    engine = Engine(model, 4096)
    requests = added(engine, [GREEDY] * 5)
    requests[1].guesser.guess = fail
    drained(engine)
    assert [one.finish for one in requests] == ["length", "error", "length", "length", "length"]
    assert [one.written for one in requests if one.error is None] == [one[0] for at, one in enumerate(right) if at != 1]
    assert isinstance(requests[1].error, Fault)
    goes_on(engine, model)
