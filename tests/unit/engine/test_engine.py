"""The engine: what each text becomes does not depend on when it came, what is beside it, or how little room there is."""

from functools import cache

import numpy as np
import pytest
import torch

from decoders import decoder_model
from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.engine.engine import Engine
from luthier.engine.numbers import numbers_of
from luthier.engine.padded import write
from luthier.engine.paged import Paged
from luthier.engine.sampling import Sampling
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.pages import BLOCK, FEWEST
from luthier.models.precision import cast_weights
from tiny import FAMILIES, tiny_model
from writing import endless, prompts

FAMILIES_BY_PAGES = [family for family in FAMILIES["decoder"] if family != "gpt_neo"]
SIZES = (1, 5, 17, 3, 33, 8, 64, 40, 2, 31, 32, 50)


def written(model, given, sampling, *, room=4096, waves=((0, 10**6),), draw=None, **settings):
    """What each prompt becomes when prompts come in waves: (steps before, how many)."""
    engine = Engine(model, room, **settings)
    requests, left = [], list(given)
    for steps, count in waves:
        for _ in range(steps):
            engine.step()
        while left and count:
            at = len(requests)
            requests.append(engine.add(left.pop(0), sampling, draw=None if draw is None else draw(at)))
            count -= 1
    engine.run()
    assert engine.blocks.used == 0 and not engine.busy
    return [one.written for one in requests], engine


@pytest.mark.parametrize("family", FAMILIES_BY_PAGES)
def test_greedy_tokens_are_those_of_transformers(family):
    model, sampling = endless(family), Sampling(max_tokens=12)
    right = [write(model, [one], sampling)[0] for one in prompts(SIZES)]
    waves = ((0, 3), (4, 2), (1, 5), (7, 2))
    assert written(model, prompts(SIZES), sampling, waves=waves)[0] == right
    assert written(model, prompts(SIZES), sampling, waves=waves, tokens=16, streams=3)[0] == right


DRAWN = Sampling(max_tokens=30, temperature=1.3)


@cache
def drawn_alone(dtype):
    """What each prompt becomes with nothing beside it."""
    model = endless("qwen3", dtype=dtype)
    return [
        written(model, [one], DRAWN, draw=lambda _, at=at: numbers_of(7, at))[0][0]
        for at, one in enumerate(prompts(SIZES))
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"tokens": 16}, {"streams": 2}, {"room": 128}], ids=str)
def test_drawn_tokens_are_the_same_bits_alone_and_beside_others(dtype, settings):
    model, draw = endless("qwen3", dtype=dtype), lambda at: numbers_of(7, at)
    together, engine = written(model, prompts(SIZES), DRAWN, draw=draw, waves=((0, 5), (3, 7)), **settings)
    assert together == drawn_alone(dtype)
    assert (engine.schedule.preempted > 0) == ("room" in settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 97, 288])
def test_products_of_enough_rows_round_alike(dtype, width):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(96, width, generator=draw).to(dtype), torch.randn(131, width, generator=draw).to(dtype)
    whole = torch.nn.functional.linear(x, weight)
    for rows in range(FEWEST.get(dtype, 1), 96):
        assert torch.equal(torch.nn.functional.linear(x[:rows], weight), whole[:rows]), rows


def test_a_prompt_that_begins_like_another_is_not_read_again():
    model, sampling = endless(), Sampling(max_tokens=4)
    (start,) = prompts((3 * BLOCK + 5,))
    engine = Engine(model, 1024)
    first = engine.add(start, sampling)
    engine.run()
    second = engine.add([*start[: 2 * BLOCK + 3], 9, 8, 7], sampling)
    other = engine.add(start, sampling, salt="another tenant")
    third = engine.add([*start, *first.written], sampling)
    engine.run()
    assert (first.reused, second.reused, other.reused, third.reused) == (0, 2 * BLOCK, 0, 3 * BLOCK)
    assert second.written == written(model, [second.prompt], sampling)[0][0]
    assert other.written == first.written


def test_a_text_that_is_let_go_leaves_nothing_behind():
    engine = Engine(endless(), 512)
    requests = [engine.add(one, Sampling(max_tokens=50)) for one in prompts((40, 3, 60))]
    for _ in range(3):
        engine.step()
    held = engine.blocks.used
    engine.abort(requests[0])
    engine.abort(requests[0])
    assert engine.blocks.used < held and requests[0].finish == "abort"
    engine.run()
    assert engine.blocks.used == 0 and [len(one.written) for one in requests[1:]] == [50, 50]


def test_long_prompts_do_not_stop_those_that_write():
    engine = Engine(endless(), 1024, tokens=24, guessed=0)
    short = engine.add([5, 6, 7], Sampling(max_tokens=30))
    engine.step()
    long = engine.add(prompts((100,))[0], Sampling(max_tokens=2))
    steps = 0
    while not long.written:
        before = len(short.written)
        engine.step()
        steps += 1
        assert len(short.written) == before + 1
    assert steps == 5  # 23 of 100 tokens at a time


def test_what_matters_more_comes_first():
    engine = Engine(endless(), 1024, streams=1)
    order = [engine.add([5 + at], Sampling(max_tokens=2), priority=priority) for at, priority in enumerate((0, 0, 5))]
    ended = []
    engine.run(lambda found: ended.extend(one for one in found if one.finish))
    assert [order.index(one) for one in ended] == [2, 0, 1]


def test_stop_texts_and_tokens_end_an_answer():
    model = load_model("mini")
    ids = model.renderer.prompt("Once upon a time", raw=True)
    whole = written(model, [ids], Sampling(max_tokens=40))[0][0]
    text = model.renderer.decode(whole)
    engine = Engine(model, 512)
    cut = engine.add(ids, Sampling(max_tokens=40, stop=(text[10:14],)))
    engine.run()
    said = model.renderer.decode(cut.written)
    assert cut.finish == "stop" and text[10:14] in said and text[10:14] not in model.renderer.decode(cut.written[:-1])


def test_an_adapter_writes_as_it_does_in_transformers():
    model = endless()
    ADAPTERS.parse({"kind": "lora", "rank": 4}).apply(model)
    with torch.no_grad():
        for name, one in model.module.named_parameters():
            if name.endswith("lora_b"):
                one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    sampling = Sampling(max_tokens=12)
    right = [write(model, [one], sampling)[0] for one in prompts((3, 20))]
    assert written(model, prompts((3, 20)), sampling)[0] == right


def test_draws_follow_the_distribution_of_transformers():
    model = endless()
    sampling = Sampling(max_tokens=1, temperature=0.8, top_k=6, top_p=0.9, min_p=0.05)
    prompt = prompts((7,))[0]
    with torch.no_grad():
        logits = model.module(torch.tensor([prompt])).logits[0, -1].double() / 0.8
    top = logits.topk(6)
    shares = top.values.softmax(-1)
    shares = torch.where(shares.cumsum(-1) - shares < 0.9, shares, 0.0)
    shares = torch.where(shares >= 0.05 * shares.max(), shares, 0.0)
    expected = dict(zip(top.indices.tolist(), (shares / shares.sum()).tolist()))
    grid = (np.arange(400) + 0.5) / 400
    found = written(model, [prompt] * 400, sampling, room=40000, streams=64, draw=lambda at: lambda place: grid[at])[0]
    counts = {token: sum(one == [token] for one in found) / 400 for token in expected}
    assert sum(counts.values()) == pytest.approx(1)
    for token, share in expected.items():
        assert counts[token] == pytest.approx(share, abs=0.006)


def test_the_penalty_is_that_of_transformers():
    model, sampling = endless("qwen2"), Sampling(max_tokens=16, repetition_penalty=1.4)
    right = [write(model, [one], sampling)[0] for one in prompts((5, 30))]
    assert written(model, prompts((5, 30)), sampling)[0] == right


def test_what_does_not_fit_is_refused_with_the_numbers():
    model = endless()
    engine = Engine(model, 64)
    with pytest.raises(ConfigError, match=r"a prompt of 60 tokens with 10 to write does not fit into 64 tokens"):
        engine.add(prompts((60,))[0], Sampling(max_tokens=10))
    with pytest.raises(DataError, match=r"has 128 tokens, and the context is 128"):
        engine.add(prompts((128,))[0], Sampling())
    with pytest.raises(DataError, match="one token at least"):
        engine.add([], Sampling())
    with pytest.raises(ConfigError, match="beams"):
        engine.add([5], Sampling(beams=2))
    with pytest.raises(ModelError, match="gpt_neo models do not write"):
        Engine(load_model(str(tiny_model("gpt_neo"))), 64)
    assert not engine.busy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wide_model_reads_one_token_as_it_reads_many(dtype):
    model = decoder_model(
        "llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )
    cast_weights(model, dtype)
    ids = prompts((40,))[0]
    whole = Paged(model, 2).read(ids, [[0, 1]], [0], [40], list(range(40)))
    for many in (1, 2, 3, 7):
        reader, found = Paged(model, 2), []
        for start in range(0, 40, many):
            part = ids[start : start + many]
            found.append(reader.read(part, [[1, 0]], [start], [len(part)], list(range(len(part)))))
        assert torch.equal(torch.cat(found), whole)
