"""Answers to learn from: drawn from their own numbers, the same whatever is written beside them."""

import numpy as np
import pytest
import torch

from luthier.engine.generate import generate
from luthier.engine.rollouts import Draw, numbers_for, roll_out
from luthier.engine.sampling import Sampling
from tiny import tiny_loaded

PROMPTS = ["hello", "what is the capital of France?", "one two", "a b c d e f g h i j"]


@pytest.fixture(scope="module")
def model():
    return tiny_loaded("qwen2")


def drawn(scores: list[float], numbers: list[float], temperature: float = 1.0) -> list[int]:
    draw = Draw(np.array(numbers)[:, None], 3, temperature)
    scores_SV = torch.tensor([scores] * len(numbers))
    left_SV = draw(torch.zeros(len(numbers), 3, dtype=torch.long), scores_SV)
    assert (left_SV > -torch.inf).sum(1).tolist() == [1] * len(numbers)
    return left_SV.argmax(1).tolist()


def test_numbers_fall_on_tokens_by_their_shares():
    # Shares 0.2, 0, 0.5, 0.3: sums 0.2, 0.2, 0.7, 1.
    scores = np.log([0.2, 1e-300, 0.5, 0.3]).tolist()
    assert drawn(scores, [0.0, 0.199, 0.201, 0.699, 0.701, 1 - 1e-12]) == [0, 0, 2, 2, 3, 3]
    assert drawn([0.0, -torch.inf], [1 - 1e-16, 0.0]) == [0, 0]
    # At temperature 0.5 shares are squared: 0.04, 0.25, 0.09 of 0.38.
    assert drawn(scores, [0.104, 0.106, 0.762, 0.764], 0.5) == [0, 2, 2, 3]


def test_numbers_are_those_of_the_seed_the_row_and_the_sample():
    same = numbers_for((1, 2), "a", 3, 5)
    assert np.array_equal(same, numbers_for((1, 2), "a", 3, 5)) and len(same) == 5
    for other in (((1, 3), "a", 3), ((2, 2), "a", 3), ((1, 2), "b", 3), ((1, 2), "a", 4)):
        assert not np.array_equal(same, numbers_for(*other, 5))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_an_answer_does_not_depend_on_what_is_beside_it(model, temperature):
    prompts = [model.renderer.prompt(text) for text in PROMPTS]
    numbers_SM = np.stack([numbers_for((0, 0), text, 0, 12) for text in PROMPTS])
    together = roll_out(model, prompts, 12, numbers_SM=numbers_SM, temperature=temperature)
    state = torch.get_rng_state()
    for at, prompt in enumerate(prompts):
        alone = roll_out(model, [prompt], 12, numbers_SM=numbers_SM[[at]], temperature=temperature)
        assert alone == [together[at]]
    assert torch.equal(state, torch.get_rng_state())  # nothing else is drawn
    assert len(set(together)) == len(together) and all(1 <= len(ids) <= 12 for ids in together)


def test_without_numbers_it_is_greedy(model):
    prompts = [model.renderer.prompt(text) for text in PROMPTS]
    expected = generate(model, PROMPTS, Sampling(max_tokens=10))
    model.module.train()
    for ids, completion in zip(roll_out(model, prompts, 10), expected):
        assert tuple(token for token in ids if token not in model.spec.stop_ids) == completion.ids
    assert model.module.training


def test_a_stop_token_ends_an_answer_and_belongs_to_it(model):
    stop = model.spec.stop_ids[0]
    prompt = model.renderer.prompt("hello")
    head = model.module.get_output_embeddings()
    numbers_SM = np.stack([numbers_for((0,), "a", at, 64) for at in range(64)])
    answers = roll_out(model, [prompt] * 64, 64, numbers_SM=numbers_SM)
    ended = [ids for ids in answers if ids[-1] in model.spec.stop_ids]
    assert head is not None and stop in {ids[-1] for ids in ended}
    assert all(len(ids) == 64 for ids in answers if ids not in ended)
    assert not any(token in model.spec.stop_ids for ids in answers for token in ids[:-1])
