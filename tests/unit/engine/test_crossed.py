"""Encoder-decoders in the engine: what each text becomes is what transformers' own loop makes of it alone, whatever comes and
goes beside it."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from crossed import PADDED, SETTINGS, crossed
from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.core.events import Events
from luthier.engine.beams import search_each
from luthier.engine.crossed import Crossed, opening_of, why_padded
from luthier.engine.door import Door
from luthier.engine.engine import Engine
from luthier.engine.generate import generate, stream, tell_engine, uses_engine
from luthier.engine.numbers import numbers_of
from luthier.engine.padded import write
from luthier.engine.pieces import complete
from luthier.engine.readers import kept_bytes
from luthier.engine.rollouts import roll_out
from luthier.engine.sampling import Sampling
from luthier.engine.structure import Structure
from luthier.models.slots import Slots, begin, go_on
from writing import prompts

FAMILIES = [family for family in SETTINGS if family not in PADDED]
SIZES = tuple(random.Random(4).randrange(1, 60) for _ in range(14))


def alone(model, given, sampling):
    """By transformers' own loop, one at a time, up to the token that ends each."""
    found = []
    for one in given:
        ids = write(model, [one], sampling)[0]
        end = next((at for at, token in enumerate(ids) if token in model.spec.stop_ids), len(ids) - 1)
        found.append(ids[: end + 1])
    return found


def drained(engine):
    while engine.busy:
        engine.step()
    assert engine.blocks.used == 0 and not engine._reader._slots.places


def written(model, given, sampling, seed=0, *, room=8192, **settings):
    """Texts that come at any time: the tokens of each, as it asks for."""
    draw, engine = random.Random(seed), Engine(model, room, **settings)
    samplings = sampling if isinstance(sampling, list) else [sampling] * len(given)
    requests = []
    for at, (one, asked) in enumerate(zip(given, samplings)):
        requests.append(engine.add(one, asked, draw=numbers_of(5, at)))
        for _ in range(draw.choice((0, 0, 1, 3))):
            engine.step()
    drained(engine)
    for one in requests:
        if one.error is not None:
            raise one.error
    return requests


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_many_that_come_and_go_are_those_of_transformers_alone(family):
    model, draw = crossed(family, ends=False), random.Random(1)
    assert uses_engine(model), why_padded(model)
    given = prompts(SIZES)
    samplings = [Sampling(max_tokens=draw.randrange(1, 20)) for _ in given]
    right = [alone(model, [one], sampling)[0] for one, sampling in zip(given, samplings)]
    assert len({tuple(one) for one in right}) > 8, "answers that are all alike show nothing"
    assert [one.written for one in written(model, given, samplings)] == right
    assert [one.written for one in written(model, given, samplings, 1, tokens=64, streams=5, room=512)] == right


@pytest.mark.parametrize("family", ["mbart", "pegasus"])
def test_rows_that_are_masked_give_what_the_kernel_gives(family):
    model, given, sampling = crossed(family, ends=False), prompts(SIZES), Sampling(max_tokens=12)
    assert Engine(model, 512)._reader._slots.way == "direct"
    right = [one.written for one in written(model, given, sampling)]
    model.slots = "masked"
    assert [one.written for one in written(model, given, sampling)] == right


@pytest.mark.parametrize("family", ["t5", "mbart", "marian"])
def test_answers_end_where_the_model_ends_them(family):
    model, given, sampling = crossed(family, ends=False), prompts(SIZES), Sampling(max_tokens=25)
    ends = tuple({one.written[-1] for one in written(model, given[:6], Sampling(max_tokens=5))})
    model.spec = model.spec.model_copy(update={"stop_ids": ends})
    found = written(model, given, sampling)
    assert [one.written for one in found] == alone(model, given, sampling)
    assert "stop" in {one.finish for one in found}


PENALTIES = [
    {"repetition_penalty": 1.4}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"logit_bias": {7: 5.0, 9: -3.0}},
    {"min_tokens": 12}, {"banned": ("the", "a fox")}, {"structure": Structure(regex="[a-f]{3,8}")},
]  # fmt: skip


@pytest.mark.parametrize("family", ["t5", "mbart", "blenderbot"])
@pytest.mark.parametrize("settings", PENALTIES, ids=lambda one: next(iter(one)))
def test_settings_mean_what_they_mean_in_transformers(family, settings):
    model, given = crossed(family), prompts((3, 20, 9, 1))
    sampling = Sampling(max_tokens=16, **settings)
    found = generate(model, [model.renderer.decode(one) for one in given], sampling)
    texts = [model.renderer.prompt(model.renderer.decode(one)) for one in given]
    right = alone(model, texts, sampling)
    stops = model.spec.stop_ids
    assert [one.ids for one in found] == [tuple(token for token in one if token not in stops) for one in right]
    assert [one.prompt_tokens for one in found] == [len(one) for one in texts]


def test_draws_are_the_same_alone_and_beside_others_and_several_answers_differ():
    model, sampling = crossed("bart", ends=False), Sampling(max_tokens=20, temperature=1.1, top_p=0.95)
    given = prompts(SIZES[:12])
    together = [one.written for one in written(model, given, sampling)]
    for at, one in enumerate(given):
        engine = Engine(model, 512)
        request = engine.add(one, sampling, draw=numbers_of(5, at))
        drained(engine)
        assert request.written == together[at]
    (found,) = generate(model, ["one two"], Sampling(max_tokens=9, temperature=1.5, n=3, seed=2))
    assert len({found.ids, *(one.ids for one in found.others)}) == 3


@torch.no_grad()
def test_logprobs_are_those_of_a_whole_forward():
    model, sampling = crossed("mt5", ends=False), Sampling(max_tokens=8, logprobs=2)
    given = prompts((5, 17, 2, 40))
    for prompt, one in zip(given, written(model, given, sampling)):
        ids = torch.tensor([[*opening_of(model), *one.written]])
        logs = model.module(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0].log_softmax(-1)
        for at, (token, log) in enumerate(zip(one.written, one.logs)):
            assert log.tokens[0] == token and log.raw[0] == pytest.approx(float(logs[at, token]), abs=1e-4)
            assert log.raw[1] == pytest.approx(float(logs[at].max()), abs=1e-4)


def test_a_stream_adds_up_to_the_answer_and_a_stop_text_ends_it():
    model = crossed("bart", ends=False)
    (whole,) = generate(model, ["The quick brown fox"], Sampling(max_tokens=30))
    assert "".join(stream(model, "The quick brown fox", Sampling(max_tokens=30))) == whole.text
    stop = whole.text[6:9]
    (cut,) = generate(model, ["The quick brown fox"], Sampling(max_tokens=30, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.find(stop)] and cut.finish == "stop"


TEXTS = ["The quick brown fox", "one", "the lazy dog jumps over it", "two three"]
SEARCHED = {
    "plain": {}, "length_penalty": {"length_penalty": 2.0}, "min_tokens": {"min_tokens": 6}, "stop": {"stop": ("e", "o")},
    "repetition": {"repetition_penalty": 1.4}, "bias": {"logit_bias": {9: 3.0, 40: -5.0}},
    "banned": {"banned": ("ab", "ay", "=")},
}  # fmt: skip


@pytest.mark.parametrize("family", ["mbart", "t5", "marian"])
@pytest.mark.parametrize("settings", list(SEARCHED))
def test_beams_are_searched_by_the_engine_everywhere(settings, family, monkeypatch):
    model, events = crossed(family), Events()
    model.spec = model.spec.model_copy(update={"stop_ids": tuple(range(5, 400, 3))})
    sampling = Sampling(max_tokens=12, beams=3, n=3, **SEARCHED[settings])
    encoded = [model.renderer.prompt(text) for text in TEXTS]
    right = [[complete(model, ids, sampling, len(one)) for ids in write(model, [one], sampling)] for one in encoded]
    monkeypatch.setattr("luthier.engine.generate.write", None)
    monkeypatch.setattr("luthier.engine.rollouts.write", None)
    tell_engine(model, sampling, events)
    assert str(events.choices["engine"]).startswith("rows")
    found = generate(model, TEXTS, sampling)
    assert [[replace(one, others=()), *one.others] for one in found] == right
    rolled = roll_out(model, encoded, 12, beams=3)
    if settings == "plain":
        assert [complete(model, ids, sampling, len(one)) for ids, one in zip(rolled, encoded)] == [
            one[0] for one in right
        ]
    with pytest.raises(ConfigError, match="beams"):
        Engine(model, 512).add(encoded[0], sampling)


@pytest.mark.parametrize("penalty", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("early", [True, False, "never"])
def test_a_search_ends_when_the_models_own_settings_say(early, penalty):
    model = crossed("bart")
    model.spec = model.spec.model_copy(update={"stop_ids": tuple(range(5, 400, 3))})
    model.module.generation_config.early_stopping = early
    sampling = Sampling(max_tokens=14, beams=4, n=4, length_penalty=penalty)
    for prompt in prompts((1, 30, 12, 45)):
        right = [complete(model, ids, sampling, len(prompt)) for ids in write(model, [prompt], sampling)]
        assert [
            complete(model, ids, sampling, len(prompt)) for ids in search_each(model, [prompt], sampling, 1)[0]
        ] == (right)


# How long answers are is asked of two families, and what each of the others computes once.
PENALISED = [(family, penalty) for family in ("bart", "t5") for penalty in (0.0, 2.0)]


@pytest.mark.parametrize(("family", "penalty"), [*((family, 1.0) for family in FAMILIES), *PENALISED])
def test_a_search_finds_what_transformers_own_loop_finds(family, penalty):
    model = crossed(family)
    model.spec = model.spec.model_copy(update={"stop_ids": tuple(range(5, 400, 3))})
    sampling = Sampling(max_tokens=14, beams=4, n=4, length_penalty=penalty)
    given, lengths = prompts((1, 30, 12, 45)), set()
    for prompt, found in zip(given, search_each(model, given, sampling, 3), strict=True):
        right = [complete(model, ids, sampling, len(prompt)) for ids in write(model, [prompt], sampling)]
        assert [complete(model, ids, sampling, len(prompt)) for ids in found] == right
        lengths |= {len(one.ids) for one in right}
    assert penalty == 2 or len(lengths) > 1, "answers of many lengths are compared"


@pytest.mark.parametrize("family", ["t5", "marian", "mbart"])
def test_a_search_is_that_of_transformers_generate(family):
    model = crossed(family)
    (prompt,) = prompts((20,))
    own = model.module.generate(
        torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=8 + len(opening_of(model)) - 1,
        do_sample=False, forced_eos_token_id=None,
    )  # fmt: skip
    found = search_each(model, [prompt], Sampling(max_tokens=8, beams=4, n=4), 1)[0]
    pad = model.tokenizer.pad_token_id
    rows = [row[len(opening_of(model)) :].tolist() for row in own]
    for ids, row in zip(found, rows, strict=True):
        assert row[: len(ids)] == ids and all(token == pad for token in row[len(ids) :])


def test_a_search_beside_texts_that_are_written_changes_none_of_them():
    model, given = crossed("bart", ends=False), prompts(SIZES[:6])
    # Two layers of keys and values, 32 numbers of four bytes each.
    assert kept_bytes(model) == 2 * 2 * 32 * 4
    engine, sampling = Engine(model, 2048), Sampling(max_tokens=12)
    right = alone(model, given, sampling)
    found = search_each(model, [given[0]], Sampling(max_tokens=12, beams=3, n=3), 1)[0]
    requests = [engine.add(one, sampling) for one in given]
    engine.step()
    searching = engine.search(given[0], Sampling(max_tokens=12, beams=3, n=3))
    assert searching.begin()
    while searching.busy:
        engine.step()
        searching.step()
    searching.leave()
    drained(engine)
    assert [one.written for one in requests] == right and searching.found == found


def test_what_cannot_go_side_by_side_is_padded_and_said_so():
    model, events = crossed("led"), Events()
    tell_engine(model, Sampling(), events)
    assert not uses_engine(model) and "at several places side by side" in str(events.choices["engine"])
    with pytest.raises(ModelError, match="do not write text by text side by side"):
        Engine(model, 512)
    assert generate(model, ["one two"], Sampling(max_tokens=3))[0].ids
    other = crossed("bart")
    other.module.generation_config.no_repeat_ngram_size = 3
    assert not uses_engine(other) and "no_repeat_ngram_size" in why_padded(other)


def test_tokens_that_the_model_bans_itself_are_not_written():
    model, given = crossed("marian", ends=False), prompts(SIZES[:6])
    first = {one.written[0] for one in written(model, given, Sampling(max_tokens=1))}
    model.module.generation_config.bad_words_ids = [[token] for token in sorted(first)]
    found = [one.written for one in written(model, given, Sampling(max_tokens=9))]
    assert found == alone(model, given, Sampling(max_tokens=9)) and not first & {one for ids in found for one in ids}


def test_settings_that_a_source_has_no_use_for_are_refused():
    engine = Engine(crossed("t5"), 256)
    with pytest.raises(ConfigError, match="prompt_logprobs"):
        engine.add([5, 6], Sampling(prompt_logprobs=True))
    with pytest.raises(ConfigError, match="adapter"):
        engine.add([5, 6], Sampling(), adapter="pirate")
    with pytest.raises(DataError, match="shorten"):
        engine.add(list(range(3, 203)), Sampling())
    engine.add(prompts((128,))[0], Sampling(max_tokens=300))
    with pytest.raises(ConfigError, match="does not fit into 128 tokens"):
        Engine(crossed("t5"), 128).add(prompts((100,))[0], Sampling(max_tokens=100))


@torch.no_grad()
@pytest.mark.parametrize(("family", "way"), [("umt5", "masked"), ("mbart", "masked"), ("mbart", "direct")])
def test_some_of_the_rows_go_on_without_the_others_and_rows_move_where_one_is_dropped(family, way):
    model = crossed(family)
    opening, given = opening_of(model), prompts((4, 30, 11, 7))
    slots = Slots(way)
    for key, source in enumerate(given):
        slots.put([key], begin(model, [source], opening)[1], [len(source)])
    said = {key: [] for key in range(4)}

    def step(*keys):
        states = go_on(model, slots, keys, [50 + key + len(said[key]) for key in keys])
        for key, state in zip(keys, states):
            said[key].append(50 + key + len(said[key]))
            _, cache = begin(model, [given[key]], [*opening, *said[key][:-1]])
            fresh = Slots()
            fresh.put([0], cache, [len(given[key])])
            assert torch.allclose(go_on(model, fresh, [0], said[key][-1:])[0], state, atol=1e-4)

    step(2, 0)
    step(3, 1, 2)
    slots.drop(1)
    assert len(slots.places) == 3 and slots.places[3] == 1
    step(0, 3)
    step(3, 2, 0)
    for key in (0, 3, 2, 2):
        slots.drop(key)
    assert not slots.places and not slots.layers


class Failing(Crossed):
    """Fails at some of its calls."""

    def __init__(self, reader, calls, error):
        self.__dict__.update(vars(reader))
        self.calls, self.error, self.sizes = calls, error, []

    def read(self, ids, *rest, **settings):
        self.sizes.append(len(ids))
        if len(self.sizes) - 1 in self.calls:
            raise self.error
        return super().read(ids, *rest, **settings)


@pytest.mark.parametrize("calls", [{0}, {4}, {2, 7}])
def test_where_memory_runs_out_fewer_are_read_at_once_and_all_is_written(calls):
    model, sampling = crossed("t5", ends=False), Sampling(max_tokens=12)
    given = prompts((30, 4, 22, 9, 15, 40))
    right = alone(model, given, sampling)
    engine = Engine(model, 4096, tokens=64)
    engine._forward._reader = Failing(engine._reader, calls, MemoryError("none"))
    engine.schedule._drop = engine._forward._reader.drop
    requests = [engine.add(one, sampling) for one in given]
    with pytest.warns(UserWarning, match="memory ran out"):
        drained(engine)
    assert [one.written for one in requests] == right


def test_what_cannot_be_read_ends_those_that_were_read_and_no_others():
    model, sampling = crossed("t5", ends=False), Sampling(max_tokens=12)
    given = prompts((30, 4, 22, 9))
    engine = Engine(model, 4096, streams=2)
    engine._forward._reader = Failing(engine._reader, {3}, RuntimeError("broken"))
    requests = [engine.add(one, sampling) for one in given]
    drained(engine)
    assert [one.finish for one in requests] == ["error", "error", "length", "length"]
    assert [one.written for one in requests[2:]] == alone(model, given[2:], sampling)
    engine = Engine(model, 4096)
    requests = [engine.add(one, sampling) for one in given]
    requests[1].draw = None
    requests[1].sampling = Sampling(max_tokens=12, temperature=1.0)
    engine.step()
    engine.abort(requests[3])
    drained(engine)
    assert [one.finish for one in requests] == ["length", "error", "length", "abort"]
    assert [requests[at].written for at in (0, 2)] == alone(model, [given[0], given[2]], sampling)


def test_what_matters_more_comes_first_and_tenants_take_turns():
    engine = Engine(crossed("t5", ends=False), 4096, streams=1)
    given = [(0, "a"), (0, "a"), (0, "b"), (5, "a")]
    added = [
        engine.add([5, 6, 7 + at], Sampling(max_tokens=3), priority=p, tenant=t) for at, (p, t) in enumerate(given)
    ]
    ended = []
    engine.run(lambda found: ended.extend(one for one in found if one.finish))
    # The one that matters more was of tenant a, so b is next.
    assert [added.index(one) for one in ended] == [3, 2, 0, 1]


def test_the_door_writes_answers_to_sources():
    model, sampling = crossed("mbart", ends=False), Sampling(max_tokens=14)
    given = prompts(SIZES[:10])
    right = alone(model, given, sampling)

    async def streamed(door, prompt):
        ids = []
        async for piece in door.stream(prompt, sampling):
            ids += piece.ids
        return ids

    async def left(door, prompt):
        async for _ in door.stream(prompt, Sampling(max_tokens=100)):
            break

    async def body(door):
        asked = [
            streamed(door, one) if at % 2 else door.complete(one, sampling, tenant="ab"[at % 3 > 0])
            for at, one in enumerate(given)
        ]
        found = await asyncio.gather(*asked, *(left(door, one) for one in given[:3]))
        return [one if isinstance(one, list) else list(one.ids) for one in found[: len(given)]]

    engine = Engine(model, 4096, streams=6)
    with Door(engine) as door:
        assert asyncio.run(body(door)) == right
    assert engine.blocks.used == 0 and not engine.busy


def test_a_model_in_bfloat16_gives_what_its_whole_forward_gives():
    from luthier.models.precision import cast_weights

    model = crossed("t5", ends=False)
    cast_weights(model, "bfloat16")
    model.slots = None
    assert uses_engine(model)
    (one,) = written(model, prompts((12,)), Sampling(max_tokens=5, logprobs=0))
    assert np.isfinite([log.raw[0] for log in one.logs]).all()
