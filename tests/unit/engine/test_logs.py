"""Log-probabilities: the model's own and those of the draw, of answers and of prompts, whatever is read beside or before."""

import math

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.engine.engine import Engine
from luthier.engine.generate import generate, stream
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from luthier.models.pages import BLOCK
from tiny import tiny_loaded, tiny_model
from writing import endless, prompts


@torch.no_grad()
def by_the_model(model, ids):
    """[T, V]: log-probabilities after each token, by one pass of the model's own."""
    return model.module(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)


def test_each_token_of_an_answer_has_its_own_and_the_likeliest():
    model = tiny_loaded("llama")
    sampling = Sampling(max_tokens=10, logprobs=3, logit_bias={50: 4.0})
    (found,) = generate(model, ["The quick brown"], sampling, raw=True)
    ids = [*model.renderer.prompt("The quick brown", raw=True), *found.ids]
    logs_TV = by_the_model(model, ids)[found.prompt_tokens - 1 :]
    assert len(found.logprobs) == len(found.ids) > 3
    for token, log, raw_V in zip(found.ids, found.logprobs, logs_TV):
        changed_V = raw_V.clone()
        changed_V[50] += 4
        changed_V = changed_V.log_softmax(-1)
        assert log.id == token and log.raw == pytest.approx(float(raw_V[token]), abs=1e-4)
        assert log.processed == pytest.approx(float(changed_V[token]), abs=1e-4)
        assert [one.id for one in log.top] == raw_V.topk(3).indices.tolist()
        for one in log.top:
            assert one.raw == pytest.approx(float(raw_V[one.id]), abs=1e-4)
            assert one.processed == pytest.approx(float(changed_V[one.id]), abs=1e-4) and one.top == ()
    assert generate(model, ["The quick brown"], Sampling(max_tokens=2, logprobs=0), raw=True)[0].logprobs[0].top == ()
    assert generate(model, ["The quick brown"], Sampling(max_tokens=2), raw=True)[0].logprobs is None


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5, "typical_p": 0.9}], ids=str)
def test_processed_ones_are_of_what_was_drawn_from(settings):
    model = endless()
    sampling = Sampling(max_tokens=12, temperature=0.7, seed=3, logprobs=390, **settings)
    (found,) = generate(model, ["One two"], sampling, raw=True)
    for log in found.logprobs:
        shares = {one.id: math.exp(one.processed) for one in log.top}
        possible = [share for share in shares.values() if share > 0]
        assert sum(possible) <= 1 + 1e-9 and log.processed > -math.inf
        assert shares.get(log.id, math.exp(log.processed)) == pytest.approx(math.exp(log.processed))
        if "top_k" in settings:
            assert len(possible) == 5 and sum(possible) == pytest.approx(1)
        if log.top[1].processed > -math.inf:
            ratio = (log.top[0].processed - log.top[1].processed) / (log.top[0].raw - log.top[1].raw)
            assert ratio == pytest.approx(1 / 0.7, rel=1e-3)


@pytest.mark.parametrize("text", ["one two three", "房间很干净 é😀"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_texts_of_tokens_add_up(family, text):
    from luthier.engine.logs import logs_of
    from luthier.engine.request import Likelihoods, Request

    model = tiny_loaded(family)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    request = Request((5,), Sampling(), 99, 0, lambda _: 0.5, written=list(ids))
    request.logs = [Likelihoods([token], [0.0], [0.0]) for token in ids]
    shown = "".join(log.text for log in logs_of(model, request, len(ids)))
    assert shown.replace("\ufffd", "").strip() == text


def test_log_probabilities_are_the_same_bits_alone_and_beside_others():
    model, sampling = endless("qwen3"), Sampling(max_tokens=14, temperature=1.1, logprobs=2, prompt_logprobs=True)
    given = prompts((1, 5, 40, 33, 64, 2, 100))

    def written(some, **settings):
        engine = Engine(model, 4096 if "room" not in settings else settings.pop("room"), **settings)
        requests = [engine.add(one, sampling, draw=numbers_of(5, at)) for at, one in some]
        engine.run()
        return [(one.written, one.logs, one.prompt_logs) for one in requests], engine

    alone = [written([(at, one)])[0][0] for at, one in enumerate(given)]
    for settings in ({}, {"tokens": 16}, {"room": 160}):
        together, engine = written(list(enumerate(given)), **settings)
        assert together == alone
        assert (engine.schedule.preempted > 0) == ("room" in settings)


def test_a_prompt_that_was_read_before_still_tells_how_likely_it_is():
    model = endless()
    (start,) = prompts((3 * BLOCK + 5,))
    right = by_the_model(model, start)
    right = [float(right[at, token]) for at, token in enumerate(start[1:])]
    engine = Engine(model, 1024, tokens=24)
    first = engine.add(start, Sampling(max_tokens=3))
    engine.run()
    again = engine.add(start, Sampling(max_tokens=3, prompt_logprobs=True))
    engine.run()
    assert again.prompt_logs == pytest.approx(right, abs=1e-4) and again.reused == 0
    assert again.written == first.written and first.prompt_logs == []
    assert engine.blocks.used == 0
    alone = engine.add([7], Sampling(max_tokens=1, prompt_logprobs=True))
    engine.run()
    assert alone.prompt_logs == []


def test_an_answer_ends_with_its_logs():
    model = load_model("mini")
    (whole,) = generate(model, ["Once upon a time"], Sampling(max_tokens=30), raw=True)
    sampling = Sampling(max_tokens=30, stop=(whole.text[10:14],), logprobs=1, prompt_logprobs=True)
    (found,) = generate(model, ["Once upon a time"], sampling, raw=True)
    assert found.finish == "stop" and len(found.logprobs) == len(found.ids) < len(whole.ids)
    assert len(found.prompt_logprobs) == found.prompt_tokens - 1
    stops = Sampling(max_tokens=30, stop_ids=(whole.ids[5],), logprobs=0)
    (ended,) = generate(model, ["Once upon a time"], stops, raw=True)
    assert len(ended.logprobs) == len(ended.ids) <= 5 and ended.finish == "stop"


def test_several_answers_share_the_reading_of_their_prompt():
    model = endless()
    draws, sampling = [0.1, 0.5, 0.9], Sampling(max_tokens=6, temperature=1.0)
    (prompt,) = prompts((2 * BLOCK + 9,))
    engine = Engine(model, 4096)
    requests = [engine.add(prompt, sampling, draw=lambda _, number=number: number) for number in draws]
    engine.run()
    assert [one.reused for one in requests] == [0, 2 * BLOCK, 2 * BLOCK]
    for number, one in zip(draws, requests):
        alone = Engine(model, 4096)
        right = alone.add(prompt, sampling, draw=lambda _, number=number: number)
        alone.run()
        assert right.written == one.written


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_several_answers_come_with_each_prompt(family):
    model = tiny_loaded(family)
    texts = ["The quick brown", "one two three four five six"]
    sampling = Sampling(max_tokens=12, temperature=1.5, seed=4)
    one = generate(model, texts, sampling, raw=True)
    many = generate(model, texts, Sampling(max_tokens=12, temperature=1.5, seed=4, n=3), raw=True)
    again = generate(model, texts, Sampling(max_tokens=12, temperature=1.5, seed=4, n=3), raw=True)
    assert many == again and [len(found.others) for found in many] == [2, 2]
    for found in many:
        answers = [found, *found.others]
        assert len({answer.ids for answer in answers}) == 3
        assert {answer.prompt_tokens for answer in answers} == {found.prompt_tokens}
        assert all(answer.others == () for answer in found.others)
    if family == "llama":
        assert [found.ids for found in many] == [found.ids for found in one], "the first is that of a draw alone"
        engine = Engine(model, 512)
        ids = model.renderer.prompt(texts[1], raw=True)
        alone = engine.add(ids, Sampling(max_tokens=12, temperature=1.5), draw=numbers_of(4, 1))
        engine.run()
        assert tuple(alone.written)[: len(one[1].ids)] == one[1].ids
        two = generate(model, texts, Sampling(max_tokens=12, temperature=1.5, seed=4, n=2), raw=True)
        assert [found.others for found in two] == [found.others[:1] for found in many]


def test_the_likelihood_of_a_prompt_stands_with_its_first_answer():
    model = endless()
    sampling = Sampling(max_tokens=4, temperature=1.0, seed=1, n=3, logprobs=0, prompt_logprobs=True)
    (found,) = generate(model, ["The quick brown fox jumps over the lazy dog. " * 3], sampling, raw=True)
    assert len(found.prompt_logprobs) == found.prompt_tokens - 1
    assert all(one.prompt_logprobs is None and len(one.logprobs) == 4 for one in found.others)


@pytest.mark.parametrize(
    "settings", [{"logprobs": 1}, {"prompt_logprobs": True}, {"n": 2, "temperature": 1.0}], ids=str
)
def test_what_is_no_text_is_not_streamed_nor_given_by_the_padded_way(settings):
    name, sampling = next(iter(settings)), Sampling(max_tokens=4, **settings)
    with pytest.raises(ConfigError, match=f"{name}: a stream is one text alone"):
        next(stream(tiny_loaded("llama"), "x", sampling, raw=True))
    if name != "n":
        with pytest.raises(ConfigError, match=f"{name}: gpt_neo models are written by transformers' own loop"):
            generate(load_model(str(tiny_model("gpt_neo"))), ["x"], sampling)


def test_one_text_alone_is_given_where_nothing_else_can_be():
    from luthier.verbs.generate import inference, load

    model, tokenizer = load(str(tiny_model("llama")))
    with pytest.raises(ConfigError, match="n: this gives one text alone"):
        inference(model, tokenizer, "x", n=2, temperature=1.0, max_tokens=2)


def test_texts_that_begin_alike_wait_for_the_one_that_reads_and_no_longer():
    model, sampling = endless(), Sampling(max_tokens=3)
    (start,) = prompts((4 * BLOCK - 60,))
    start = start[: 2 * BLOCK + 1]
    engine = Engine(model, 4096, tokens=BLOCK)
    first, second = engine.add(start, sampling), engine.add(start, sampling)
    other = engine.add(prompts((BLOCK + 5,), seed=3)[0], sampling)
    engine.step()
    assert first.read == BLOCK and second.read == 0
    engine.abort(first)
    engine.run()
    assert second.reused == BLOCK and second.finish == other.finish == "length"
    assert engine.blocks.used == 0
