"""Structured answers: of the form that was asked for whatever the model thinks, and nothing beside them changes."""

import json
import random
import re
import sys
import threading

import numpy as np
import pytest
import torch

from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.engine.engine import Engine
from luthier.engine.generate import generate, stream
from luthier.engine.learned import BETWEEN, Learned
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.engine.schemas import prepare
from luthier.engine.structure import Matcher, Structure, matcher_for
from luthier.faces.cli.flags import add_structure, make_parser, read_structure
from luthier.models.load import load_model
from luthier.verbs.generate import Generate, answer_texts
from tiny import tiny_loaded, tiny_model

llguidance = pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "born": {"type": "string", "format": "date"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(text):
    one = json.loads(text)
    assert set(one) <= set(PERSON["properties"]) and set(one) >= set(PERSON["required"])
    assert isinstance(one["name"], str) and 1 <= len(one["name"]) <= 6
    assert type(one["age"]) is int and 0 <= one["age"] <= 130
    assert 1 <= len(one["tags"]) <= 3 and all(tag in ("a", "b", None) for tag in one["tags"])
    return True


def ask(model, structure, seeds, max_tokens=110, **settings):
    """The answers to one prompt under each seed, all at once."""
    sampling = Sampling(max_tokens=max_tokens, temperature=settings.pop("temperature", 1.0), structure=structure)
    engine = Engine(model, settings.pop("room", 16384), **settings)
    requests = [engine.add([5 + at, 9], sampling, draw=numbers_of(seed)) for at, seed in enumerate(seeds)]
    engine.run()
    return requests, engine


def text_of(model, request):
    return model.renderer.decode([one for one in request.written if one not in model.spec.stop_ids])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_random_weights_write_what_satisfies_a_schema(family):
    model = tiny_loaded(family)
    requests, _ = ask(model, {"json_schema": PERSON}, range(40))
    ended = [text_of(model, one) for one in requests if one.finish == "stop"]
    assert all(is_person(one) for one in ended) and len(ended) > 10 and len(set(ended)) == len(ended)


def test_choices_regexes_and_grammars_are_kept_to():
    model = tiny_loaded("llama")
    words = ["yes", "no", 'say "no"', "不\n"]
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,2}/'
    for structure, kept in (
        ({"choices": words}, lambda text: text in words),
        ({"regex": "[a-c]{2}-[0-9]+(x|é)"}, lambda text: re.fullmatch("[a-c]{2}-[0-9]+(x|é)", text)),
        ({"grammar": grammar}, lambda text: re.fullmatch(r"[0-9]{1,2}(\+[0-9]{1,2})*", text)),
    ):
        requests, _ = ask(model, structure, range(30))
        ended = [text_of(model, one) for one in requests if one.finish == "stop"]
        assert len(ended) > 10 and all(kept(one) for one in ended), structure
    assert {text_of(model, one) for one in ask(model, {"choices": words}, range(60))[0]} == set(words)


def test_a_choice_that_begins_another_can_end_or_go_on():
    model = tiny_loaded("qwen2")
    requests, _ = ask(model, {"choices": ["a", "ab", "abc"]}, range(80))
    assert {text_of(model, one) for one in requests} == {"a", "ab", "abc"}
    assert all(one.finish == "stop" for one in requests)


def test_an_answer_that_is_whole_ends_without_a_stop_token():
    model = tiny_loaded("llama")
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    requests, _ = ask(model, {"choices": ["Paris", "quick"]}, range(8))
    assert {text_of(model, one) for one in requests} == {"Paris", "quick"}
    assert {one.finish for one in requests} == {"stop"}
    whole = generate(model, ["x"], Sampling(structure={"choices": ["Paris"]}), raw=True)[0]
    assert (whole.text, whole.finish) == ("Paris", "stop")
    cut = generate(model, ["x"], Sampling(max_tokens=2, structure={"choices": ["Paris" * 4]}), raw=True)[0]
    assert cut.finish == "length" and ("Paris" * 4).startswith(cut.text) and len(cut.ids) == 2


def test_greedy_takes_the_likeliest_of_what_may_come():
    model = tiny_loaded("llama")
    (request,), _ = ask(model, {"json_schema": PERSON}, [0], temperature=0.0)
    matcher = matcher_for(model, Structure(json_schema=PERSON))
    ids = list(request.prompt)
    for token in request.written:
        with torch.no_grad():
            logits_V = model.module(torch.tensor([ids])).logits[0, -1]
        matcher.fill()
        bits = [at for at in range(len(logits_V)) if matcher.bits[at // 32] >> (at % 32) & 1]
        assert token == max(bits, key=lambda at: float(logits_V[at]))
        ids.append(token)
        if token not in model.spec.stop_ids:
            matcher.take(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_that_give_their_blocks_up_go_on_where_they_were(temperature):
    model = tiny_loaded("qwen3")
    roomy, _ = ask(model, {"json_schema": PERSON}, range(10), temperature=temperature)
    tight, engine = ask(model, {"json_schema": PERSON}, range(10), temperature=temperature, room=160)
    assert engine.schedule.preempted > 0
    assert [one.written for one in tight] == [one.written for one in roomy]
    assert all(is_person(text_of(model, one)) for one in tight if one.finish == "stop")


def test_texts_without_a_structure_do_not_change_beside_those_with_one():
    model = tiny_loaded("llama")
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 390) for _ in range(size)] for size in (3, 20, 40, 7)]

    def write(structures):
        engine = Engine(model, 4096, tokens=32)
        found = []
        for at, (prompt, structure) in enumerate(zip(prompts, structures)):
            sampling = Sampling(max_tokens=30, temperature=1.0 if at % 2 else 0.0, structure=structure)
            found.append(engine.add(prompt, sampling, draw=numbers_of(at)))
        engine.run()
        return [one.written for one in found]

    plain, mixed = write([None] * 4), write([None, {"regex": "[0-9]+"}, None, {"json_schema": PERSON}])
    assert mixed[0] == plain[0] and mixed[2] == plain[2]
    assert mixed[1] != plain[1] and model.renderer.decode(mixed[1]).isdigit()


def test_a_stream_and_the_whole_are_one():
    model = load_model("mini")
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=4, structure={"json_schema": PERSON})
    whole = generate(model, ["A person:"], sampling, raw=True)[0]
    assert "".join(stream(model, "A person:", sampling, raw=True)) == whole.text and whole.text.startswith("{")


@pytest.mark.parametrize("family", ["t5", "bart", "gpt_neo"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_models_that_are_padded_keep_to_it_too(family, temperature):
    model = tiny_loaded(family)
    sampling = Sampling(max_tokens=16, temperature=temperature, structure={"regex": "[ab]{2,4}|quick"})
    for one in generate(model, ["one", "two three four", "x"], sampling, raw=True):
        assert one.finish == "stop" and re.fullmatch("[ab]{2,4}|quick", one.text)


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({}, r"set one of json_schema, regex, choices and grammar \(got none\)"),
        ({"regex": "a", "choices": ["b"]}, r"\(got regex, choices\)"),
        ({"choices": []}, "one text at least"),
        ({"choices": ["a", ""]}, "none that is empty"),
        ({"regex": "a("}, "structure: `regex` cannot be followed"),
        ({"regex": "(?=a)b"}, "`regex` cannot be followed"),
        ({"grammar": "begin: 3"}, "`grammar` cannot be followed"),
        ({"json_schema": "nowhere.json"}, r"nowhere.json: cannot be read \(No such file or directory\)"),
        ({"json_schema": {"properties": {"a/b": {"not": {}}}}}, "#/properties/a~1b: `not` cannot be kept to .* enum"),
        ({"json_schema": {"items": {"uniqueItems": True}}}, "#/items: `uniqueItems` cannot be kept to"),
        ({"json_schema": {"minLenght": 3}}, "no keyword `minLenght` .* did you mean 'minLength'"),
        ({"json_schema": {"$ref": "http://a.b/c"}}, "`[$]ref` 'http://a.b/c' is no path in this schema"),
        ({"json_schema": {"$ref": "#/$defs/a"}}, "points to nothing"),
        ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"if": {}}}}}, "#/[$]defs/a: `if` cannot .* anyOf"),
        ({"json_schema": {"format": "dat"}}, "`format` 'dat' is not known; did you mean 'date'"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"minimum": 2}]}}, "#: `oneOf` cannot be kept to"),
        ({"json_schema": {"items": {"pattern": "(?!a)b"}}}, "#/items: `pattern` cannot be kept to"),
        ({"json_schema": {"const": 2**60}}, "`const` cannot be kept to .* numbers below"),
        ({"json_schema": {"pattern": r"^\W"}}, "`pattern` cannot be kept to .* write the characters out"),
        ({"json_schema": {"items": {"enum": ["a\x00b"]}}}, "#/items: `enum` cannot be kept to .* control characters"),
        ({"json_schema": {"pattern": r"a\x01"}}, "`pattern` cannot be kept to .* control characters"),
        ({"json_schema": {"minProperties": 3}}, "`minProperties` cannot .* required"),
        ({"json_schema": False}, "which nothing satisfies"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_before_anything_is_written(structure, said):
    with pytest.raises(ConfigError, match=said):
        Sampling.make({"structure": structure})


def test_beams_and_a_structure_do_not_go_together():
    with pytest.raises(ConfigError, match="structure and beams do not go together"):
        Sampling.make({"structure": {"regex": "a"}, "beams": 2})


def test_what_has_no_effect_is_no_reason_to_refuse():
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "t", "uniqueItems": False, "x-note": 1}
    assert prepare({"pattern": r"^[^\x00-\x1f]+$", "const": "a\nb\\0"})
    assert prepare({**schema, "deprecated": True, "properties": {"not": {"type": "null"}}})["properties"]
    Sampling(structure={"json_schema": {**schema, "deprecated": True, "default": {"not": 1}}})


def test_leap_days_are_those_of_the_calendar():
    from datetime import date

    pattern = re.compile(prepare({"format": "date"})["pattern"])
    for year in (1, 4, 100, 400, 1900, 1999, 2000, 2024, 2100, 9996):
        for month in range(14):
            for day in range(33):
                try:
                    real = bool(date(year, month, day))
                except ValueError:
                    real = False
                assert bool(pattern.search(f"{year:04}-{month:02}-{day:02}")) == real


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"pip install 'luthier\[structure\]'"):
        Sampling(structure={"regex": "abc"})


def test_settings_that_leave_nothing_over_are_an_error():
    model = tiny_loaded("llama")
    (request,), _ = ask(model, {"choices": ["quick"]}, [0])
    engine = Engine(model, 512)
    again = engine.add([5], Sampling(structure={"choices": ["quick"]}))
    again.matcher.fill = lambda: again.matcher.bits.fill(0)
    with pytest.raises(ConfigError, match="no token is left"):
        engine.run()
    assert request.finish == "stop"


def test_flags_take_their_values_as_they_stand(tmp_path):
    (tmp_path / "g.lark").write_text('start: "a"', encoding="utf-8")
    parser = make_parser("generate", "")
    add_structure(parser)
    for words, found in (
        (["--regex", "[0-9] # a: b"], {"regex": "[0-9] # a: b"}),
        (["--choice", "yes", "--choice", "12"], {"choices": ["yes", "12"]}),
        (["--json-schema", "a.json"], {"json_schema": "a.json"}),
        (["--grammar", str(tmp_path / "g.lark")], {"grammar": 'start: "a"'}),
    ):
        assert read_structure(parser.parse(words)) == {"structure": found}
    assert read_structure(parser.parse([])) == {}
    with pytest.raises(ConfigError, match="give a file of Lark rules"):
        read_structure(parser.parse(["--grammar", "nowhere"]))


def test_a_name_of_the_schema_cannot_be_written_in_another_way():
    model = tiny_loaded("llama")
    schema = {"properties": {"a": {"type": "integer"}, "b\n": {"type": "integer"}}}
    for text, may in (
        ('{"a":1,"c\\n":""}', True),
        ('{"\\u0061":""}', False),
        ('{"b\\n":1}', True),
        ('{"b\\u000a":""}', False),
    ):
        matcher = matcher_for(model, Structure(json_schema=schema))
        taken = [
            matcher._state.consume_token(one) for one in model.tokenizer(text, add_special_tokens=False)["input_ids"]
        ]
        assert all(taken) == may, text


def test_what_patterns_and_other_schemas_close_out_does_not_come():
    model = tiny_loaded("llama")
    pattern = {"patternProperties": {"^a": {"type": "integer"}}}
    for schema, texts in (
        ({"allOf": [pattern, {"additionalProperties": False}]}, {'{"a":1}': False, "{}": True}),
        ({**pattern, "enum": [{"b": 1}]}, {'{"b":1,"a":1}': False, '{"b":1}': True}),
        ({"allOf": [pattern, {"additionalProperties": {"minimum": 5}}]}, {'{"a":1}': False, '{"a":7}': True}),
        ({"minProperties": 2, "required": ["a"]}, {'{"a":1}': False, '{"a":1,"b":1}': True}),
    ):
        for text, may in texts.items():
            matcher = matcher_for(model, Structure(json_schema=schema))
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert (all(matcher._state.consume_token(one) for one in ids) and matcher._state.is_accepting()) == may, (
                text
            )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_are_held_to_the_structure_too(temperature):
    model, structure = tiny_loaded("llama"), {"json_schema": PERSON}
    plain, _ = ask(model, structure, range(4), temperature=temperature, guessed=0)
    # What it writes, so that most guesses are right, and then goes on otherwise.
    rows = [[5 + at, 9, *one.written, 7, 7] for at, one in enumerate(plain)]
    model.learned = Learned(np.asarray([token for row in rows for token in [*row, BETWEEN]]))
    guessed, _ = ask(model, structure, range(4), temperature=temperature, guessed=64)
    assert [(one.written, one.finish) for one in guessed] == [(one.written, one.finish) for one in plain]
    assert sum(one.accepted for one in guessed) > 20


def test_masks_are_made_while_the_model_reads(monkeypatch):
    model = tiny_loaded("llama")
    engine, made, own = Engine(model, 512), threading.Event(), Matcher.fill
    monkeypatch.setattr(Matcher, "fill", lambda matcher: (own(matcher), made.set())[0])
    read = engine._reader.read

    def wait_and_read(*given, **more):
        assert made.wait(20), "no mask came while the model was reading"
        made.clear()
        return read(*given, **more)

    monkeypatch.setattr(engine._reader, "read", wait_and_read)
    request = engine.add([5], Sampling(max_tokens=3, structure={"regex": "[0-9]+"}))
    engine.run()
    assert model.renderer.decode(request.written).isdigit()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_are_the_same_made_ahead_or_by_a_thread(temperature, monkeypatch):
    model, found, filled = tiny_loaded("llama"), [], []
    own = Matcher.fill
    monkeypatch.setattr(Matcher, "fill", lambda matcher: (filled.append(threading.current_thread()), own(matcher))[1])
    for threads in (10**6, 0):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        filled.clear()
        requests, _ = ask(model, {"json_schema": PERSON}, range(6), temperature=temperature, guessed=0)
        found.append([(one.written, one.finish) for one in requests])
        here = sum(one is threading.main_thread() for one in filled)
        # Before its first token nothing was taken that a mask could be made after.
        assert len(filled) - here == (6 if threads else len(filled))
    assert found[0] == found[1]


def test_a_mask_that_cannot_be_made_is_an_error():
    engine = Engine(tiny_loaded("llama"), 512)
    engine.add([5], Sampling(structure={"regex": "[0-9]+"})).matcher._state = Broken()
    with pytest.raises(ModelError, match=r"structure: the next token cannot be found \(too many states\); simplify it"):
        engine.run()


class Broken:
    """A state of llguidance that has run into one of its limits."""

    def unsafe_compute_mask_ptr(self, *place):
        return

    def is_error(self):
        return True

    def get_error(self):
        return "too many states\nin the lexer"


def test_models_that_write_nothing_refuse_a_structure():
    config = Generate.make({"model": str(tiny_model("bert")), "sampling": {"structure": {"choices": ["a"]}}})
    with pytest.raises(ConfigError, match="is made to masked and writes no text; leave it out"):
        answer_texts(config, ["one [MASK] three"])


def test_a_structure_that_cannot_be_followed_ends_its_own_text(monkeypatch):
    model, structures = load_model("mini"), [Structure(regex="[a-z]{30}"), Structure(regex="[0-9]{30}")]
    samplings = [Sampling(max_tokens=20, temperature=1.0, structure=one) for one in [*structures, None]]

    def write(engine):
        return [engine.add([5 + at, 9], one, draw=numbers_of(at)) for at, one in enumerate(samplings)]

    alone = Engine(model, 1024)
    right = write(alone)
    alone.run()
    engine = Engine(model, 1024)
    found, fill = write(engine), Matcher.fill

    def broken(matcher):
        if matcher is found[0].matcher and len(found[0].written) == 3:
            raise ModelError("too much")
        fill(matcher)

    monkeypatch.setattr(Matcher, "fill", broken)
    while engine.busy:
        engine.step()
    assert found[0].finish == "error" and str(found[0].error) == "too much" and engine.blocks.used == 0
    assert found[0].written == right[0].written[:3]
    assert [one.written for one in found[1:]] == [one.written for one in right[1:]]


@pytest.mark.parametrize(
    "schema, digits",
    [
        ({"type": "integer"}, 34),
        ({"type": "number"}, 68),
        ({"type": "array", "items": {"type": "integer", "minimum": 5}, "minItems": 2, "maxItems": 2}, 68),
        # All that can follow is a digit until the number is one of these.
        ({"type": "integer", "multipleOf": 7}, 34),
        # Of a text they may be as many as it likes.
        ({"type": "string", "pattern": "^\"?[0-9]{60}$"}, 60),
        ({"type": "object", "properties": {"a\\1": {"type": "number"}}, "required": ["a\\1"], "additionalProperties": False}, 69),
        ({}, 68),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_only_writes_digits_comes_to_an_end(schema, digits):
    model = tiny_loaded("llama")
    ones = [token for token in range(200) if model.renderer.decode([token]) in ("1", "11", "111")]
    sampling = Sampling(max_tokens=200, structure={"json_schema": schema}, logit_bias=dict.fromkeys(ones, 100.0))
    engine = Engine(model, 512)
    request = engine.add([5, 9], sampling)
    engine.run()
    text = text_of(model, request)
    assert request.finish == "stop", text
    json.loads(text)
    assert digits <= sum(one in "0123456789" for one in text) <= digits + 4, text
    # A place that is copied is the same place.
    one = matcher_for(model, Structure(json_schema=schema))
    for token in request.written[:40]:
        if token not in model.spec.stop_ids:
            one.take(token)
    other = one.copy()
    one.fill(), other.fill()
    assert (one.bits == other.bits).all()
