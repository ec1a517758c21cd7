"""Beam search by blocks finds what transformers' own finds, whatever is searched beside it, and gives every block back."""

import pytest
import torch

from luthier.engine import beams
from luthier.engine.beams import search, search_each
from luthier.engine.blocks import Blocks
from luthier.engine.generate import _generate_padded, generate
from luthier.engine.padded import write
from luthier.engine.paged import Paged
from luthier.engine.pieces import complete
from luthier.engine.rollouts import roll_out
from luthier.engine.sampling import Sampling
from luthier.models.pages import BLOCK
from tiny import tiny_loaded
from writing import endless, prompts

SIZES = (1, 30, 33, 3, 64, 70)


def by_transformers(model, given, sampling):
    """What its own loop gives to each prompt alone."""
    rows = [write(model, [one], sampling)[0] for one in given]
    return [complete(model, row, sampling, len(one)) for row, one in zip(rows, given)]


def by_blocks(model, given, sampling, at_once=3):
    return [
        complete(model, row, sampling, len(one)) for row, one in zip(search(model, given, sampling, at_once), given)
    ]


def often_ending(family="llama"):
    """A model that ends some texts early, so that answers of many lengths are compared."""
    model = tiny_loaded(family)
    model.spec = model.spec.model_copy(update={"stop_ids": tuple(range(5, 400, 3))})
    return model


# Every width with one family, every family with one width.
@pytest.mark.parametrize(
    ("width", "family"), [(2, "llama"), (3, "llama"), (5, "llama"), (3, "gpt2"), (5, "qwen3"), (2, "gemma")]
)
def test_answers_are_those_of_transformers(family, width):
    # Sums of random models tie sooner or later, and which comes first then is nobody's rule.
    for model, tokens in ((endless(family), 16), (often_ending(family), 24), (often_ending(family), 3)):
        sampling = Sampling(max_tokens=tokens, beams=width)
        assert by_blocks(model, prompts(SIZES), sampling) == by_transformers(model, prompts(SIZES), sampling)
    if family == "llama" and width < 5:
        found = by_blocks(often_ending(family), prompts(SIZES), Sampling(max_tokens=24, beams=width))
        assert len({len(one.ids) for one in found}) > 2, "answers of many lengths are compared"


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 2.0])
def test_all_answers_and_their_order_are_those_of_transformers(penalty):
    model, sampling = often_ending(), Sampling(max_tokens=24, beams=4, n=4, length_penalty=penalty)
    found = search_each(model, prompts(SIZES), sampling, 3)
    for prompt, own in zip(prompts(SIZES), found, strict=True):
        theirs = write(model, [prompt], sampling)
        assert [complete(model, one, sampling, len(prompt)) for one in own] == [
            complete(model, one, sampling, len(prompt)) for one in theirs
        ]


def test_a_higher_penalty_of_length_gives_longer_answers():
    assert _mean_length(0.0) < _mean_length(2.0)


def _mean_length(penalty):
    model = often_ending()
    found = search(model, prompts(SIZES), Sampling(max_tokens=24, beams=4, length_penalty=penalty), 3)
    return sum(map(len, found)) / len(found)


def test_several_answers_by_either_loop_are_the_same():
    model, sampling = often_ending(), Sampling(max_tokens=12, beams=3, n=2)
    texts = ["The quick brown", "one two three"]
    own = generate(model, texts, sampling, raw=True)
    encoded = [model.renderer.prompt(one, raw=True) for one in texts]
    padded = _generate_padded(model, encoded, sampling, 4, None)
    assert [len(one.others) for one in own] == [1, 1]
    assert own == padded


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"beams": 2, "n": 3}, "n is 3"),
        ({"beams": 2, "logprobs": 1}, "logprobs are not given"),
        ({"length_penalty": 2.0}, "without a beam search"),
    ],
)
def test_what_goes_with_no_search_is_said(settings, why):
    with pytest.raises(ValueError, match=why):
        Sampling(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"logit_bias": {60: 3.0, 61: 3.0}},
        {"min_tokens": 9},
        {"stop_ids": tuple(range(6, 400, 3))},
        {"ignore_stop": True},
        {"banned": ()},
    ],
    ids=str,
)
def test_settings_are_obeyed_as_by_transformers(settings):
    model = often_ending()
    if "banned" in settings:
        tokens = [token for one in search(model, prompts(SIZES), Sampling(max_tokens=24, beams=3), 6) for token in one]
        words = [model.renderer.decode([token]) for token in tokens if token not in model.spec.stop_ids]
        settings = {"banned": tuple(word for word in words if word.isascii() and word.isalpha())[:4]}
        assert settings["banned"]
    sampling = Sampling(max_tokens=24, beams=3, **settings)
    found = by_blocks(model, prompts(SIZES), sampling)
    assert found == by_transformers(model, prompts(SIZES), sampling)
    assert found != by_blocks(model, prompts(SIZES), Sampling(max_tokens=24, beams=3))


def test_a_search_does_not_depend_on_those_beside_it(monkeypatch):
    model, sampling = often_ending("qwen2"), Sampling(max_tokens=30, beams=4)
    together = search(model, prompts(SIZES), sampling, 6)
    assert together == [search(model, [one], sampling, 1)[0] for one in prompts(SIZES)]
    for tokens in (16, 3):  # fewer at once than texts are searched
        monkeypatch.setattr(beams, "TOKENS", tokens)
        assert search(model, prompts(SIZES), sampling, 2) == together


def test_every_block_is_given_back_and_what_is_shared_is_held_once(monkeypatch):
    made, most = [], []

    class Watched(Blocks):
        def __init__(self, count, **more):
            super().__init__(count, **more)
            made.append(self)

        def take(self):
            most.append(self.used + 1)
            return super().take()

    monkeypatch.setattr(beams, "Blocks", Watched)
    (prompt,) = prompts((2 * BLOCK + 5,))
    search(endless(), [prompt], Sampling(max_tokens=BLOCK, beams=4), 1)
    assert made[0].used == 0 and len({made[0].take() for _ in range(made[0].count)}) == made[0].count
    assert max(most[: -made[0].count]) <= 2 + 4 * 2, "the two full blocks of the prompt are held once"


def test_a_copied_block_is_another_of_its_own():
    model = endless()
    reader = Paged(model, 4)
    ids = prompts((20,))[0]
    with torch.inference_mode():
        reader.read(ids, [[0]], [0], [20], [])
        reader.copy(0, 2)
        right = reader.read([7], [[0]], [20], [1], [0])
        reader.read([9, 9], [[0]], [19], [2], [])
        assert torch.equal(reader.read([7], [[2]], [20], [1], [0]), right)
        assert not torch.equal(reader.read([7], [[0]], [20], [1], [0]), right)


def test_beams_are_searched_by_the_engine_everywhere(monkeypatch):
    model = often_ending()
    monkeypatch.setattr("luthier.engine.generate.write", None)
    monkeypatch.setattr("luthier.engine.rollouts.write", None)
    texts, sampling = ["The quick brown", "one two three"], Sampling(max_tokens=12, beams=3)
    told = []
    found = generate(model, texts, sampling, raw=True, on_progress=lambda done, total: told.append((done, total)))
    encoded = [model.renderer.prompt(text, raw=True) for text in texts]
    assert found == by_blocks(model, encoded, sampling) and told[-1] == (2, 2)
    rolled = roll_out(model, encoded, 12, beams=3)
    assert [complete(model, ids, sampling, len(one)) for ids, one in zip(rolled, encoded)] == found
