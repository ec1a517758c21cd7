"""Guesses at what comes next: never seen in what is written, only in how soon."""

import random

import numpy as np
import pytest

from luthier.core.errors import ModelError
from luthier.engine.drafts import LONGEST, MANY, Guesser, Odds, Worth
from luthier.engine.engine import Engine
from luthier.engine.guessing import HIGHEST, LEAST, SLOPE, StepCosts
from luthier.engine.learned import AHEAD, BETWEEN, DEEP, Learned, read_learned, write_learned
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


def test_right_guesses_save_steps(monkeypatch):
    # What steps cost depends on what else the machine does.
    monkeypatch.setattr(StepCosts, "learn", lambda *_: None)
    model = endless()
    plain, steps = written(model, SAMPLINGS["greedy"], guessed=0)
    model.learned = learned([[*one.prompt, *one.written] for one in plain])
    assert written(model, SAMPLINGS["greedy"], guessed=64)[1] < steps / 2


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


def guess(guesser, written=(), most=100, texts=1, slope=0.05):
    return guesser.guess(written, most, Worth(texts, slope))


def test_a_text_that_repeats_itself_is_guessed_from_itself():
    guesser = Guesser([1, 2, 3, 4, 5, 6, 1, 2, 3], None, Odds())
    assert guess(guesser, most=8) == [4, 5, 6, 1, 2, 3, 4, 5]
    assert guess(guesser, [9, 9]) == []
    assert guess(guesser, [9, 9, 4, 5, 6], 2) == [1, 2]


def test_what_is_expected_is_guessed_from_its_beginning_and_after_what_was_left_out():
    guesser = Guesser([1, 2, 3], None, Odds(), expected=[7, 8, 9, 10, 11, 12, 13])
    assert guess(guesser, most=4) == [7, 8, 9, 10]
    assert guess(guesser, [7, 8, 50]) == []
    assert guess(guesser, [7, 8, 50, 11, 12])[:1] == [13]


def test_an_answer_is_the_same_whatever_is_expected():
    model = endless()
    (plain, *_), _ = written(model, SAMPLINGS["drawn"], guessed=0)
    for expected, most in (((*plain.written[:20], 5, 6, *plain.written[20:]), 15), (tuple(range(5, 60)), 45)):
        engine = Engine(model, 2048)
        request = engine.add(prompts()[0], SAMPLINGS["drawn"], draw=numbers_of(1, 0), expected=expected)
        count = 0
        while engine.busy:
            engine.step()
            count += 1
        assert request.written == plain.written and count <= most


def test_of_earlier_places_that_is_followed_which_is_alike_for_longest():
    guesser = Guesser([7, 1, 2, 3, 4, 9, 2, 3, 5, 0, 1, 2, 3], None, Odds())
    assert guess(guesser, most=1) == [4]
    # Of those alike for as long, the last.
    assert guess(Guesser([1, 2, 8, 1, 2, 9, 1, 2], None, Odds()), most=1) == [9]


def test_learned_rows_are_followed_to_their_end_and_by_what_is_most_frequent():
    rows = learned([[1, 2, 3, 4, 7], [9, 1, 2, 3, 4, 8, 8], [1, 2, 3, 4, 8, 5], [0, 2, 3, 4, 8, 8], [6, 6, 6, 6]])
    follow = lambda *ids: [] if (one := rows.follow(ids)) is None else list(one.walk(5))  # noqa: E731
    assert [token for token, _, _ in follow(77, 2, 3, 4)] == [8, 8]
    assert follow(77, 2, 3, 4) == [(8, 3, 4), (8, 2, 3)]
    assert follow(9, 1, 2, 3, 4) == [(8, 1, 1), (8, 1, 1)]
    assert follow(6, 6, 6, 6) == [(6, 1, 1)] and follow(5) == [] and follow() == []
    assert rows.follow([77, 3, 4]).alike == 2 and rows.follow([3, 77, 4]).alike == 1


def test_the_longest_run_that_came_before_is_found():
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 4, size).tolist() for size in (*draw.integers(1, 30, 40), 300)]
    index = learned(rows)
    flat = [token for row in rows for token in [*row, BETWEEN]]
    for size in (*range(1, 12), *range(1, 12)):
        ids = draw.integers(0, 5, size).tolist()
        after = {
            length: {
                at for at in range(length, len(flat)) if flat[at] != BETWEEN and flat[at - length : at] == ids[-length:]
            }
            for length in range(1, min(DEEP, size) + 1)
        }
        found = index.follow(ids)
        longest = max((length for length, places in after.items() if places), default=0)
        if found is None:
            assert not longest
            continue
        # One place alone is as good as what more of its tokens say.
        assert found.alike == longest or (len(after[longest]) and len(after[found.alike]) == 1)
        assert set(found.places(10_000).tolist()) == after[found.alike]


def test_where_rows_copied_from_their_beginnings_a_text_is_copied_from_its_own():
    draw = np.random.default_rng(0)
    say = lambda: draw.integers(100, 2000, 12).tolist()  # noqa: E731
    quoted = [[1, 2, *said, 3, 4, 5, *said[:6], 6] for said in (say() for _ in range(50))]
    rows, said = learned(quoted), say()
    guesser = Guesser([1, 2, *said, 3], rows, Odds())
    assert guess(guesser, [4, 5], most=6) == said[:6]
    # Rows that say something of their own copy nothing.
    assert learned([[1, 2, *say(), 3, 4, 5, *say(), 6] for _ in range(50)]).follow([3, 4, 5]).copied() is None


def test_what_is_seldom_right_is_guessed_no_more_until_it_may_be_worth_it():
    guesser = Guesser([1, 2, 3, 4] * 20, None, Odds())
    assert len(guess(guesser, slope=0.2)) == 4
    for _ in range(30):
        guesser.learn(len(guess(guesser, slope=0.2)), 0)
    assert guess(guesser, slope=0.2) == []
    # Where a row costs next to nothing it is tried even so.
    assert guess(guesser, slope=0.01)
    for _ in range(100):
        guesser.learn(len(found := guess(guesser, slope=0.01)), len(found))
    assert len(guess(guesser, slope=0.2)) > 4


def test_a_row_is_worth_what_tokens_cost_without_it():
    assert Worth(1, 0.2).weigh(iter([0.9, 0.9, 0.9]))[0] == 3
    assert Worth(1, 0.5).weigh(iter([0.45, 1.0]))[0] == 0
    # Beside many texts that fill the processor anyway, only what is nearly sure.
    assert Worth(32, 0.25).weigh(iter([0.85]))[0] == 0 and Worth(32, 0.25).weigh(iter([0.99]))[0] == 1
    count, tokens, cost = Worth(2, 0.25).weigh(iter([1.0, 0.6, 0.01]))
    assert (count, tokens, cost) == (2, 3.6, 1.75)


def test_beside_many_a_text_without_guesses_is_left_alone_for_longer_and_longer():
    looks = []

    class Watched(Guesser):
        def _look_up(self):
            looks.append(step)
            return super()._look_up()

    guesser = Watched(list(range(40)), None, Odds())
    for step in range(80):  # noqa: B007
        assert guess(guesser, texts=MANY + 1) == []
    apart = np.diff(looks)
    assert apart[0] == 2 and max(apart) == LONGEST + 1 and (np.diff(apart) >= 0).all()
    looks.clear()
    for step in range(LONGEST + 20):  # noqa: B007
        assert guess(guesser, texts=MANY) == []
    assert len(looks) > 15


def test_what_a_row_costs_is_read_off_the_steps():
    costs = StepCosts()
    assert costs.slope == SLOPE
    draw = random.Random(0)
    for _ in range(300):
        rows = draw.choice([1, 1, 4, 9, 16])
        costs.learn(rows, (0.004 + 0.001 * rows) * draw.uniform(0.95, 1.05))
    assert costs.slope == pytest.approx(0.2, abs=0.02)
    for _ in range(600):
        rows = draw.choice([1, 2, 8])
        costs.learn(rows, (0.009 + 0.0005 * rows) * draw.uniform(0.98, 1.02))
    assert costs.slope == pytest.approx(0.0005 / 0.0095, abs=0.02)
    # Steps of one size say nothing, and in time nothing is known any more.
    for _ in range(3000):
        costs.learn(1, 0.01)
    assert costs.slope == pytest.approx(SLOPE, abs=0.02)
    for one in (lambda rows: 0.02 / rows, lambda rows: 0.001 * rows**2):
        costs = StepCosts()
        for at in range(600):
            costs.learn(1 + at % 8, one(1 + at % 8))
        assert LEAST <= costs.slope <= HIGHEST


def test_learned_rows_are_kept_in_a_file(tmp_path):
    write_learned(tmp_path / "learned.npy", [[1, 2, 3, 4, 5], [7, 8]])
    found = read_learned(tmp_path / "learned.npy").follow([1, 2, 3, 4])
    assert [token for token, _, _ in found.walk(AHEAD)] == [5]
    (tmp_path / "learned.npy").write_bytes(b"x")
    with pytest.raises(ModelError, match="delete it, it only makes writing faster"):
        read_learned(tmp_path / "learned.npy")
    np.save(tmp_path / "learned.npy", np.asarray([2**21], dtype=np.int32))
    with pytest.raises(ModelError, match="id is 2097152; ids up to 2097150"):
        read_learned(tmp_path / "learned.npy")


def test_the_beginning_of_an_answer_is_guessed_with_the_end_of_its_prompt(monkeypatch):
    monkeypatch.setattr(StepCosts, "learn", lambda *_: None)
    model = endless()
    for tokens in (512, 16):
        (plain, *_), _ = written(model, SAMPLINGS["greedy"], guessed=0, tokens=tokens)
        engine = Engine(model, 2048, tokens=tokens)
        request = engine.add(prompts()[0], SAMPLINGS["greedy"], draw=numbers_of(1, 0), expected=plain.written)
        engine.step()
        assert len(request.written) > 2 and request.accepted == len(request.written) - 1
        engine.run()
        assert request.written == plain.written
