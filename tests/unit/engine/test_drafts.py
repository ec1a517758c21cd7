"""Guesses at what comes next: never seen in what is written, only in how soon."""

import random

import numpy as np
import pytest

from luthier.core.errors import ModelError
from luthier.engine.drafts import (
    ALIKE,
    BETWEEN,
    FIRST,
    MISSES,
    MOST,
    PAUSE,
    Guesser,
    Learned,
    read_learned,
    write_learned,
)
from luthier.engine.engine import Engine
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from tiny import tiny_loaded

SAMPLINGS = {
    "greedy": Sampling(max_tokens=40),
    "drawn": Sampling(max_tokens=40, temperature=1.0),
    "sharp": Sampling(max_tokens=40, temperature=0.2, top_k=5),
    "penalised": Sampling(max_tokens=40, repetition_penalty=1.3, frequency_penalty=0.2),
    "logs": Sampling(max_tokens=40, logprobs=2),
}


def endless(family="llama"):
    model = tiny_loaded(family)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    return model


def prompts():
    draw = random.Random(0)
    return [[draw.randrange(5, 390) for _ in range(size)] for size in (3, 40, 17, 64)]


def written(model, sampling, *, guessed, room=2048, **settings):
    engine = Engine(model, room, guessed=guessed, **settings)
    requests = [engine.add(one, sampling, draw=numbers_of(1, at)) for at, one in enumerate(prompts())]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert engine.blocks.used == 0
    return requests, steps


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("settings", [{}, {"tokens": 8}, {"room": 224}, {"streams": 2}], ids=str)
def test_what_is_written_is_the_same_with_guesses(sampling, settings):
    model = endless()
    plain, _ = written(model, sampling, guessed=0, **settings)
    # What it will write, so that guesses are right, and other rows, so that some are wrong.
    model.learned = learned([[*one.prompt, *one.written] for one in plain[:2]] + prompts())
    guessed, _ = written(model, sampling, guessed=64, **settings)
    assert [one.written for one in guessed] == [one.written for one in plain]
    assert [one.logs for one in guessed] == [one.logs for one in plain]
    assert sum(one.accepted for one in guessed) > 10


def learned(rows):
    return Learned(np.asarray([token for row in rows for token in [*row, BETWEEN]]))


def test_right_guesses_save_steps():
    model = endless()
    plain, steps = written(model, SAMPLINGS["greedy"], guessed=0)
    model.learned = learned([[*one.prompt, *one.written] for one in plain])
    assert written(model, SAMPLINGS["greedy"], guessed=64)[1] < steps / 3


def test_an_end_inside_a_guess_ends_the_text():
    model = endless()
    plain, _ = written(model, SAMPLINGS["greedy"], guessed=0)
    model.learned = learned([[*one.prompt, *one.written] for one in plain])
    end = plain[0].written[9]
    ended = Sampling(max_tokens=40, stop_ids=(end,))
    without, _ = written(model, ended, guessed=0)
    found, _ = written(model, ended, guessed=64)
    assert [(one.written, one.finish) for one in found] == [(one.written, one.finish) for one in without]
    assert found[0].finish == "stop" and found[0].written[-1] == end


def test_a_text_that_repeats_itself_is_guessed_from_itself():
    guesser = Guesser([1, 2, 3, 4, 5, 6, 1, 2, 3], None)
    assert guesser.guess([], 9, 10) == [4, 5, 6, 1][:FIRST]
    assert guesser.guess([9, 9], 9, 10) == []
    assert guesser.guess([9, 9, 4, 5, 6], 9, 2) == [1, 2]


def test_learned_rows_are_followed_to_their_end_and_by_what_is_most_frequent():
    rows = learned([[1, 2, 3, 4, 7], [9, 1, 2, 3, 4, 8, 8], [1, 2, 3, 4, 8, 5], [6, 6, 6, 6]])
    assert rows.follow([0, 1, 2, 3, 4], 5) == [8, 8]
    assert rows.follow([6, 6, 6, 6], 5) == []
    assert rows.follow([4, 7, 9, 1], 5) == []
    assert rows.follow([3, 4], 5) == []


def test_guesses_grow_where_they_are_right_and_pause_where_they_are_not():
    guesser = Guesser(list(range(40)) * 2, None)
    for _ in range(3):
        guesser.learn(1, 1)
    assert len(guesser.guess([], 80, 100)) == MOST
    for _ in range(MISSES):
        guesser.learn(3, 0)
    assert [len(guesser.guess([], 80, 100)) for _ in range(PAUSE + 1)] == [0] * PAUSE + [FIRST]
    assert ALIKE < FIRST


def test_learned_rows_are_kept_in_a_file(tmp_path):
    write_learned(tmp_path / "learned.npy", [[1, 2, 3, 4, 5], [7, 8]])
    assert read_learned(tmp_path / "learned.npy").follow([1, 2, 3, 4], 3) == [5]
    (tmp_path / "learned.npy").write_bytes(b"x")
    with pytest.raises(ModelError, match="delete it, it only makes writing faster"):
        read_learned(tmp_path / "learned.npy")
