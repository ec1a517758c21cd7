"""Each setting does to random logits what transformers' own processor does; a row gets nothing from the rows beside it."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from luthier.core.errors import ConfigError
from luthier.engine.choose import choose, settled, shares_of, untouched
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling

VOCABULARY = 60
ENDS = (3, 17)
PROMPT, WRITTEN = (5, 9, 9, 40), (7, 7, 21, 9)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def request(banned=(), written=WRITTEN, number=0.5, **settings) -> Request:
    sampling = Sampling(max_tokens=32, **settings)
    return Request(PROMPT, sampling, 32, 0, lambda _: number, ends=ENDS, banned=banned, written=list(written))


def by_transformers(scores_V, *processors):
    ids_1T, scores_1V = torch.tensor([[*PROMPT, *WRITTEN]]), scores_V[None].clone()
    for one in processors:
        scores_1V = one(ids_1T, scores_1V)
    return scores_1V[0]


BANNED = ((12,), (7, 21), (21, 9, 33), (40, 7, 7, 21, 9, 2), (1, 9, 50))
SETTLED = {
    "bias": ({"logit_bias": {4: 7.5, 9: -100}}, (), [theirs.SequenceBiasLogitsProcessor([[[4], 7.5], [[9], -100.0]])]),
    "repetition": ({"repetition_penalty": 1.7}, (), [theirs.RepetitionPenaltyLogitsProcessor(1.7)]),
    "banned": ({}, BANNED, [theirs.NoBadWordsLogitsProcessor([list(one) for one in BANNED], list(ENDS))]),
    "too early": ({"min_tokens": 5}, (), [theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, list(ENDS))]),
    "late enough": ({"min_tokens": 4}, (), [theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, list(ENDS))]),
}


@pytest.mark.parametrize("name", SETTLED)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_scores_are_those_of_transformers(name, temperature):
    settings, banned, processors = SETTLED[name]
    for seed in range(20):
        ours = settled(logits(seed), request(banned, temperature=temperature, **settings))
        assert torch.equal(ours, by_transformers(logits(seed), *processors))


def test_penalties_are_those_of_openai_and_count_what_was_written_alone():
    # https://platform.openai.com/docs/guides/text-generation: mu[j] - c[j] x frequency - (c[j] > 0) x presence
    expected = logits(0)
    for token, count in {7: 2, 21: 1, 9: 1}.items():
        expected[token] -= count * 0.5 + 1.25
    ours = settled(logits(0), request(presence_penalty=1.25, frequency_penalty=0.5))
    assert torch.allclose(ours, expected, atol=1e-6) and not torch.equal(ours, logits(0))
    assert torch.equal(settled(logits(0), request(written=(), presence_penalty=2, frequency_penalty=2)), logits(0))
    assert float(settled(logits(0), request(presence_penalty=-2.0))[7]) == pytest.approx(float(logits(0)[7]) + 2)


DRAWN = [
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"typical_p": 1.0},
    {"top_k": 20, "typical_p": 0.6},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.7},
]


@pytest.mark.parametrize("settings", DRAWN, ids=str)
def test_shares_are_those_of_transformers(settings):
    for seed in range(30):
        processors = [theirs.TemperatureLogitsWarper(1.4)]
        if "top_k" in settings:
            processors.append(theirs.TopKLogitsWarper(settings["top_k"]))
        if "top_p" in settings:
            processors.append(theirs.TopPLogitsWarper(settings["top_p"]))
        if "min_p" in settings:
            processors.append(theirs.MinPLogitsWarper(settings["min_p"]))
        if settings.get("typical_p", 1) < 1:
            processors.append(theirs.TypicalLogitsWarper(settings["typical_p"]))
        shares_K, tokens_K = shares_of(logits(seed), request(temperature=1.4, **settings))
        ours = torch.zeros(VOCABULARY, dtype=torch.double)
        ours[torch.arange(VOCABULARY) if tokens_K is None else tokens_K] = shares_K / shares_K.sum()
        right = by_transformers(logits(seed), *processors).double().softmax(-1)
        assert torch.equal(ours > 0, right > 0) and torch.allclose(ours, right, atol=1e-6)


def test_all_settings_together_are_applied_in_the_order_of_transformers(monkeypatch):
    # Its own list of processors, in its own order; additive penalties, which it lacks, are added between.
    from luthier.models.load import load_model
    from tiny import tiny_model

    module = load_model(str(tiny_model("gpt2"))).module
    config = GenerationConfig(
        do_sample=True, sequence_bias=[[[7], 4.0], [[30], 2.5]], repetition_penalty=1.9, bad_words_ids=[[12], [9, 33]],
        min_new_tokens=9, temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, typical_p=0.9, eos_token_id=list(ENDS),
    )  # fmt: skip
    config._eos_token_tensor = torch.tensor(ENDS)
    processors = module._get_logits_processor(config, input_ids_seq_length=len(PROMPT), device="cpu")
    names = [type(one).__name__ for one in processors]
    assert (
        names.index("SequenceBiasLogitsProcessor") < names.index("RepetitionPenaltyLogitsProcessor") and len(names) == 9
    )
    for seed in range(20):
        one = request(
            ((12,), (9, 33)), logit_bias={7: 4, 30: 2.5}, repetition_penalty=1.9, min_tokens=9, temperature=0.6, top_k=30,
            top_p=0.95, min_p=0.001, typical_p=0.9,
        )  # fmt: skip
        shares_K, tokens_K = shares_of(settled(logits(seed), one), one)
        ours = torch.zeros(VOCABULARY, dtype=torch.double)
        ours[tokens_K] = shares_K / shares_K.sum()
        right = by_transformers(logits(seed), *processors).double().softmax(-1)
        assert torch.equal(ours > 0, right > 0) and torch.allclose(ours, right, atol=1e-6)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    numbers = np.linspace(0, 0.999, 12)
    given = [
        {}, {"temperature": 1.0}, {"logit_bias": {8: 100}}, {"banned": ((8,), (9, 4))}, {"min_tokens": 9, "temperature": 2.0},
        {"presence_penalty": 2.0}, {"temperature": 1.2, "typical_p": 0.4}, {"frequency_penalty": -2.0, "temperature": 0.5},
        {"temperature": 0.9, "top_k": 4, "logit_bias": {1: 9}}, {"repetition_penalty": 3.0}, {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 3.0, "min_p": 0.2},
    ]  # fmt: skip
    requests = [request(number=number, **settings) for number, settings in zip(numbers, given)]
    together = choose(torch.stack([logits(at) for at in range(12)]), requests)
    assert together == [choose(logits(at)[None], [one])[0] for at, one in enumerate(requests)]
    assert together[2] == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_banned_never_comes_and_nothing_left_is_said(temperature):
    best = int(logits(0).argmax())
    assert choose(logits(0)[None], [request(temperature=temperature, number=0.3, banned=((best,),))]) != [best]
    assert choose(logits(0)[None], [request(temperature=temperature, banned=((9, best),))]) != [best]
    all_of_them = tuple((token,) for token in range(VOCABULARY))
    rows = torch.stack([logits(0), logits(1)])
    error, token = choose(rows, [request(temperature=temperature, banned=all_of_them), request()])
    assert isinstance(error, ConfigError) and "leave no token that may come" in str(error)
    assert token == int(logits(1).argmax())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"typical_p": 0.5}, "typical_p has no effect at temperature 0"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias"),
        ({"logit_bias": {-3: 1}}, "logit_bias"),
        ({"banned": ("a", "")}, "banned holds an empty text"),
        ({"stop_ids": (-1,)}, "stop_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, and max_tokens only 8"),
        ({"min_tokens": 2, "ignore_stop": True}, "min_tokens has no effect with ignore_stop"),
        ({"n": 2}, "2 answers would all be the same at temperature 0"),
        ({"logprobs": -1}, "logprobs"),
        ({"beams": 2, "logprobs": 0}, "logprobs are not given for a beam search"),
        ({"beams": 2, "prompt_logprobs": True}, "prompt_logprobs are not given for a beam search"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Sampling.make(settings)


def test_settings_come_from_text_and_files_too():
    made = Sampling.make({"logit_bias": {"5": "2"}, "banned": ["a"], "stop_ids": [1, 2]})
    assert made == Sampling(logit_bias={5: 2.0}, banned=("a",), stop_ids=(1, 2))


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {4: 1.0}}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
        {"banned": ((5,),)}, {"min_tokens": 5}, {"logprobs": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_touches_the_scores_is_known(settings):
    assert not untouched(request(**settings)) and untouched(request()) and untouched(request(temperature=1.0, top_k=3))
    assert untouched(request(min_tokens=4)), "as many are written"


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("mass", [0.1, 0.9, 0.999999, 1 - 1e-12])
def test_the_first_shares_are_those_of_the_sorted_vocabulary(spread, mass):
    scores_V = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * spread
    shares_K, tokens_K = shares_of(scores_V, request(temperature=1.0, top_p=mass))
    sorted_V, order_V = scores_V.double().softmax(-1).sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    kept = int((before_V < mass - 1e-9).sum()), int((before_V < mass + 1e-9).sum())
    assert kept[0] <= int((shares_K > 0).sum()) <= kept[1]
    count = kept[0]
    assert torch.equal(tokens_K[:count], order_V[:count])
    torch.testing.assert_close(shares_K[:count], sorted_V[:count], rtol=1e-9, atol=0)
    whole_V, none = shares_of(scores_V, request(temperature=1.0, top_p=1.0))
    assert none is None and torch.equal(whole_V, shares_of(scores_V, request(temperature=1.0))[0]), "all is no part"
