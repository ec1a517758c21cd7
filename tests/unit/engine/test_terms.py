"""Settings in the tokens of a model: bans, ends and least tokens, by the engine and by transformers' own loop alike."""

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.engine.generate import generate, stream
from luthier.engine.padded import write
from luthier.engine.pieces import complete, pieces
from luthier.engine.sampling import Sampling
from luthier.engine.terms import banned_of
from luthier.models.load import load_model
from tiny import tiny_loaded
from writing import endless, prompts

SIZES = (1, 5, 33, 12)
OBEYED = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    {"logit_bias": {50: 2.0, 61: -3.0}, "repetition_penalty": 1.4},
    {"banned": ()},
    {"stop_ids": ()},
    {"min_tokens": 9},
    {"min_tokens": 9, "stop_ids": (), "ignore_stop": True},
    {"ignore_stop": True},
]
TEXTS = ["The quick brown", "one two three four five six", "a"]


def ending(family, settings):
    """A model that ends some of its answers, the settings with what it would write banned or ending, and those without."""
    model = endless(family)
    plain = Sampling(max_tokens=20, **{name: settings[name] for name in ("temperature", "seed") if name in settings})
    found = generate(model, TEXTS, plain, raw=True)
    ends = tuple(one.ids[3] for one in found)
    if "banned" in settings:
        words = [model.renderer.decode([token]) for one in found for token in one.ids]
        settings = {**settings, "banned": tuple(word for word in words if word.strip() and "\ufffd" not in word)[:2]}
        assert settings["banned"]
    elif "stop_ids" in settings:
        settings = {**settings, "stop_ids": ends}
    elif "ignore_stop" in settings or "min_tokens" in settings:
        model.spec = model.spec.model_copy(update={"stop_ids": ends})
    return model, Sampling(max_tokens=20, **settings), plain


@pytest.mark.parametrize("settings", OBEYED, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_ways_obey(family, settings):
    model, sampling, plain = ending(family, settings)
    found = generate(model, TEXTS, sampling, raw=True)
    for text, one in zip(TEXTS, found):
        ids = model.renderer.prompt(text, raw=True)
        assert complete(model, write(model, [ids], sampling)[0], sampling, len(ids)) == one
        assert "".join(stream(model, text, sampling, raw=True)) == one.text
    assert found != generate(model, TEXTS, plain, raw=True)


@pytest.mark.parametrize(
    "settings", [*OBEYED[:2], *OBEYED[3:], {"typical_p": 0.2, "temperature": 1.0, "seed": 1}], ids=str
)
def test_an_encoder_decoder_obeys(settings):
    model, sampling, plain = ending("t5", settings)
    found = generate(model, TEXTS, sampling, raw=True)
    assert found != generate(model, TEXTS, plain, raw=True)
    assert all(len(one.ids) >= sampling.min_tokens for one in found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "qwen2"])
def test_a_banned_text_is_known_with_and_without_a_space_in_front(family):
    model = tiny_loaded(family)
    for text in ("fox", " fox", "capital of France"):
        forms = banned_of(model, Sampling(banned=(text,)))
        shown = {
            model.renderer.decode([*model.tokenizer("a", add_special_tokens=False)["input_ids"], *form])
            for form in forms
        }
        word = text.strip()
        assert {f"a {word}", f"a{word}"} <= shown | ({f"a{word}"} if family == "t5" else set())
        assert all(one.replace(" ", "") == f"a{word}".replace(" ", "") for one in shown)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_banned_is_not_written(temperature):
    model = load_model("mini")
    settings = {"max_tokens": 60, "temperature": temperature, **({"seed": 2} if temperature else {})}
    (before,) = generate(model, ["Once upon a time"], Sampling(**settings), raw=True)
    words = {word.strip(".,") for word in before.text.split()} - {""}
    common = tuple(sorted(words)[:3])
    assert common
    (after,) = generate(model, ["Once upon a time"], Sampling(**settings, banned=common), raw=True)
    for form in banned_of(model, Sampling(banned=common)):
        assert not any(after.ids[at : at + len(form)] == form for at in range(len(after.ids)))
    assert after.ids != before.ids


def test_no_end_comes_before_the_least_tokens():
    model = load_model("mini")
    (whole,) = generate(model, ["Once upon a time"], Sampling(max_tokens=40), raw=True)
    stop = whole.text[4:8]
    (cut,) = generate(model, ["Once upon a time"], Sampling(max_tokens=40, stop=(stop,)), raw=True)
    sampling = Sampling(max_tokens=40, stop=(stop, whole.text[30:34]), min_tokens=len(cut.ids) + 1)
    (later,) = generate(model, ["Once upon a time"], sampling, raw=True)
    assert later.text == whole.text[: whole.text.find(whole.text[30:34], 8)] and later.finish == "stop"
    assert stop in later.text and len(later.ids) > len(cut.ids)
    assert "".join(stream(model, "Once upon a time", sampling, raw=True)) == later.text
    ids = model.renderer.prompt("Once upon a time", raw=True)
    assert complete(model, write(model, [ids], sampling)[0], sampling, len(ids)).text == later.text


def test_a_stop_text_counts_from_the_least_tokens_on_whole_or_in_pieces():
    model = tiny_loaded("gpt2")
    ids = model.tokenizer("one END two END three", add_special_tokens=False)["input_ids"]
    ends = [at for at in range(1, len(ids) + 1) if model.renderer.decode(ids[:at]).count("END") == 1]
    for least, right in (
        (0, "one "),
        (ends[0], "one "),
        (ends[0] + 1, "one END two "),
        (len(ids), "one END two END three"),
    ):
        sampling = Sampling(stop=("END",), min_tokens=least)
        assert complete(model, ids, sampling, 1).text == right
        assert "".join(pieces(model, ids, sampling)) == right


def test_asked_for_ends_are_not_part_of_the_answer():
    model = endless()
    (whole,) = generate(model, ["One two"], Sampling(max_tokens=20), raw=True)
    token = whole.ids[7]
    (cut,) = generate(model, ["One two"], Sampling(max_tokens=20, stop_ids=(token,)), raw=True)
    assert cut.ids == whole.ids[: whole.ids.index(token)] and cut.finish == "stop"


def test_one_goes_on_past_the_end_tokens_of_the_model():
    model = endless()
    (whole,) = generate(model, ["One two"], Sampling(max_tokens=20), raw=True)
    model.spec = model.spec.model_copy(update={"stop_ids": (whole.ids[4],)})
    assert generate(model, ["One two"], Sampling(max_tokens=20), raw=True)[0].finish == "stop"
    assert generate(model, ["One two"], Sampling(max_tokens=20, ignore_stop=True), raw=True) == [whole]
    ids = model.renderer.prompt("One two", raw=True)
    assert tuple(write(model, [ids], Sampling(max_tokens=20, ignore_stop=True))[0]) == whole.ids


def test_models_whose_own_settings_name_an_end_go_on_past_it_too():
    model = endless()
    ids = prompts((9,))[0]
    right = write(model, [ids], Sampling(max_tokens=12))[0]
    model.module.generation_config.eos_token_id = right[3]
    assert write(model, [ids], Sampling(max_tokens=12))[0] == right and len(right) == 12
    assert model.module.generation_config.eos_token_id == right[3]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_terms_that_a_model_does_not_have_are_refused(family):
    model = tiny_loaded(family)
    end = model.tokenizer.decode([model.spec.stop_ids[0]])
    for settings, said in (
        ({"stop_ids": (9999,)}, "stop_ids: there is no token 9999"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias: there is no token 9999"),
        ({"banned": (end,)}, "is a token that ends an answer"),
    ):
        with pytest.raises(ConfigError, match=said):
            generate(model, ["a"], Sampling(max_tokens=4, **settings), raw=True)
    generate(model, ["a"], Sampling(max_tokens=4, banned=(end,), ignore_stop=True), raw=True)


def test_least_tokens_that_cannot_be_are_refused():
    model = endless()
    with pytest.raises(ConfigError, match="min_tokens has no effect: this model has no end token"):
        generate(model, ["a"], Sampling(min_tokens=2), raw=True)
    with pytest.raises(DataError, match="min_tokens is 126, and the prompt leaves room for"):
        generate(model, ["one two three"], Sampling(min_tokens=126, stop=("x",)), raw=True)
    with pytest.raises(ConfigError, match="logprobs: 9999 tokens are asked for"):
        generate(model, ["a"], Sampling(logprobs=9999), raw=True)
