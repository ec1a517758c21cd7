"""Calls that special tokens mark: written by id, seen in the text, and read the same however the answer is cut."""

import json
import re

import pytest

from luthier.core.errors import ConfigError
from luthier.core.types import Message
from luthier.engine.calling import structure_of_calls
from luthier.engine.generate import generate
from luthier.engine.pieces import pieces
from luthier.engine.sampling import Sampling
from luthier.engine.structure import matcher_for
from luthier.text.called import CallReader, read_calls
from luthier.text.calls import find_form
from marking import MARKS, TEMPLATES, marked_model

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {key: {"enum": [1, "a"]}}, "additionalProperties": False},
        },
    }
    for name, key in (("look", "city"), ("news", "topic"))
]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def marked(request):
    model = marked_model(request.param)
    return model, find_form(model.renderer), MARKS[request.param]


def test_the_form_names_its_special_tokens(marked):
    model, form, spelled = marked
    assert form.marks == tuple((one, model.tokenizer.convert_tokens_to_ids(one)) for one in spelled)
    assert form.numbered == (form.before == "[TOOL_CALLS] [" or "[CALL_ID]" in spelled)


@pytest.mark.parametrize("said", ["", "Let me see."])
@pytest.mark.parametrize("count", [1, 2])
def test_what_the_template_writes_is_allowed_and_read_again(marked, said, count):
    model, form, _ = marked
    call = {"id": "abcdefgh9", "type": "function", "function": {"name": "look", "arguments": {"city": "a"}}}
    asked = Message("user", "How is it?")
    whole = model.renderer.render((asked, Message("assistant", said, (call,) * count)))[1]
    ids = list(whole[len(model.renderer.render((asked,), opened=True)[1]) :])
    ids = ids[: ids.index(model.tokenizer.eos_token_id)]
    matcher = matcher_for(model, structure_of_calls(form, TOOLS))
    for token in ids:
        matcher.take(token)
    sampling = Sampling(shown_ids=tuple(id for _, id in form.marks))
    grown = list(pieces(model, ids, sampling))
    assert "".join(grown) == model.renderer.decode(ids, sampling.shown_ids)
    text, calls = read_calls(form, "".join(grown), TOOLS)
    assert text == said and calls == [{"name": "look", "arguments": '{"city": "a"}'}] * count
    for cut in range(1, len("".join(grown))):
        reader = CallReader(form, TOOLS)
        whole_text = "".join(grown)
        parts = [*reader.feed(whole_text[:cut]), *reader.feed(whole_text[cut:]), *reader.end()]
        assert "".join(one.text for one in parts if one.kind == "text") == said
        assert "".join(one.text for one in parts if one.kind == "arguments") == '{"city": "a"}' * count
    # Left out of the text where nobody asked for it.
    assert all(mark not in model.renderer.decode(ids) for mark, _ in form.marks)


def test_text_that_spells_a_mark_is_none(marked):
    model, form, _ = marked
    if not form.marks:
        pytest.skip("its marks are letters")
    mark, id = form.marks[0]
    matcher = matcher_for(model, structure_of_calls(form, TOOLS))
    spelled = [
        token
        for letter in "So " + mark[:-1]
        for token in model.tokenizer(letter, add_special_tokens=False)["input_ids"]
    ]
    assert id not in spelled
    for token in spelled:
        matcher.take(token)
    last = model.tokenizer(mark[-1], add_special_tokens=False)["input_ids"][0]
    matcher.fill()
    assert not matcher.bits[last // 32] >> (last % 32) & 1


def test_a_model_that_must_call_does(marked):
    model, form, _ = marked
    structure = structure_of_calls(form, TOOLS, "required", parallel=False)
    sampling = Sampling(max_tokens=90, structure=structure, shown_ids=tuple(id for _, id in form.marks))
    found = generate(model, [[Message("user", "How is it?")]], sampling)[0]
    assert all(id in found.ids for _, id in form.marks[:1]) and found.finish == "stop"
    text, (call,) = read_calls(form, found.text, TOOLS)
    assert text == "" and call["name"] in ("look", "news") and isinstance(json.loads(call["arguments"]), dict)


@pytest.fixture(scope="module", params=["marked", "keys"])
def valued(request):
    model = marked_model(request.param)
    return model, find_form(model.renderer)


def allowed(model, form, parameters, text):
    """Whether a call with that text behind its name may be the whole answer."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    matcher = matcher_for(model, structure_of_calls(form, [tool], "required"))
    said = form.opening + "f" + text
    try:
        for token in model.renderer.tokens(said)[0]:
            matcher.take(token)
    except ConfigError:
        return False
    matcher.fill()
    stop = model.spec.stop_ids[0]
    good = bool(matcher.bits[stop // 32] >> (stop % 32) & 1)
    if good:
        # What is allowed is read as JSON, and each value as it was written.
        for key, value in json.loads(read_calls(form, said, [tool])[1][0]["arguments"]).items():
            assert (value if isinstance(value, str) else json.dumps(value)) in text, key
    return good


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["a", "", "3", "{", 'x "y"\n</par\nz', "a\n"], []),
        ({"type": "string", "maxLength": 3}, ["abc", "é日"], ["abcd"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab"], ["a"]),
        ({"enum": ["red", "reddish", ""]}, ["red", "reddish", ""], ["redd", '"red"']),
        ({"const": "a/b"}, ["a/b"], ["a"]),
        ({"type": "string", "pattern": "^a/\\d+$|[)|]b"}, ["a/12", "x)b", "|bb"], ["a/", "b", "a/٣"]),
        ({"type": "string", "pattern": "^[\\w|]{2}$", "maxLength": 5}, ["a|", "__"], ["a", "a-"]),
        ({"type": "string", "format": "date"}, ["2026-02-28"], ["2026-02-29", "today"]),
        ({"type": "string", "format": "uuid"}, ["12345678-1234-1234-1234-1234567890ab"], ["12345678"]),
        ({"type": "string", "format": "email"}, ["a.b@c.example"], ["a@", "a b@c.de"]),
        (
            {"type": "string", "format": "ipv6"},
            ["::1", "1::", "1:2:3:4:5:6:7:8", "fe80::1:2", "::"],
            ["1:2", "1::2::3"],
        ),
        ({"type": "string", "format": "ipv4"}, ["10.0.255.1"], ["10.0.256.1", "10.0.0"]),
        ({"type": "string", "format": "uri"}, ["https://a.b:80/c?d=e#f", "mailto:a@b.c"], ["a b:c", "//a"]),
        ({"type": "string", "format": "duration"}, ["P1Y", "PT1M", "P1W"], ["P", "PT", "1D"]),
        ({"type": "integer"}, ["3", "-12"], ["3.5", "a", "", '"3"']),
        ({"type": "integer", "minimum": 5}, ["5", "70"], ["4"]),
        ({"type": "array", "items": {"type": "string"}}, ['["a", "b\\n"]', "[]"], ["a", "[1]"]),
        ({"type": "boolean"}, ["true"], ["True"]),
        ({"$ref": "#/$defs/one"}, ['{"next": {"next": null}}'], ['{"next": 3}']),
        ({"type": ["string", "null"]}, ["null", "a", "3"], []),
        ({"type": ["string", "null"], "maxLength": 2}, ["null", "a", "3"], ["abc"]),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}, ["123", "a", "-"], ["1.5", "abc"]),
        ({"anyOf": [{"enum": ["a"]}, {"type": "array", "items": {"type": "integer"}}]}, ["a", "[1, 2]"], ["[a]", "b"]),
        (
            {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^x"}]},
            ["ab", "xyz"],
            ["xy", "abc"],
        ),
        ({"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b$"}]}, ["ab", "a b"], ["ba", "b"]),
        ({"enum": [1, "a", None, True]}, ["1", "a", "null", "true"], ["2", "false"]),
        ({}, ["a", "1", "[1]", '{"a": 1}'], []),
    ],
)
def test_values_between_marks_satisfy_their_schemas(valued, schema, good, bad):
    model, form = valued
    first, middle, _, last, _ = form.joined
    one = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/one"}, {"type": "null"}]}}}
    parameters = {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": {"one": one}}
    for text in good:
        assert allowed(model, form, parameters, f"{first}v{middle}{text}{last}"), text
    for text in bad:
        assert not allowed(model, form, parameters, f"{first}v{middle}{text}{last}"), text


def test_arguments_between_marks_stand_in_their_order(valued):
    model, form = valued
    first, middle, following, last, none = form.joined
    words = {"type": "string"}
    parameters = {"properties": {"a": words, "b": words, "c": words}, "required": ["b"], "additionalProperties": False}
    free = {"type": "object", "properties": {"a": words, "b": {"type": "integer"}}}

    def say(*keys):
        return first + following.join(f"{key}{middle}1" for key in keys) + last if keys else none

    for keys in ("b", "ab", "bc", "abc"):
        assert allowed(model, form, {"type": "object", **parameters}, say(*keys)), keys
    for keys in ("", "a", "ba", "bb", "bd"):
        assert not allowed(model, form, {"type": "object", **parameters}, say(*keys)), keys
    for keys in ("", "a", "b", "ab"):
        assert allowed(model, form, free, say(*keys)), keys
    assert allowed(model, form, {"type": "object", "properties": {}}, none)
    held = {"$ref": "#/$defs/it", "$defs": {"it": free | {"required": ["b"]}}}
    assert allowed(model, form, held, say("b")) and not allowed(model, form, held, none)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "`anyOf` cannot be kept to in the calls"),
        ({"type": "object", "required": ["b"]}, "`required` cannot be kept to in the calls"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "`additionalProperties` cannot be kept to"),
        ({"properties": {"v": {"type": ["string", "integer"], "minimum": 3}}}, "a text beside a number within bounds"),
        ({"properties": {"v": {"type": "string", "pattern": "a^b"}}}, "has ^ or $ in the middle"),
        ({"properties": {"v": False}}, "no value satisfies its schema"),
    ],
)
def test_what_cannot_be_kept_to_between_marks_is_refused(valued, parameters, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        allowed(*valued, parameters, "")


def test_the_digits_of_numbers_in_calls_come_to_an_end(marked):
    model, form, _ = marked
    number = {
        "type": "object",
        "properties": {"n": {"type": "number"}, "s": {"type": "string"}},
        "required": ["n", "s"],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": number}}
    call = {"id": "abcdefgh9", "type": "function", "function": {"name": "f", "arguments": {"n": 77177, "s": "88188"}}}
    asked = Message("user", "How is it?")
    long = "1" * 40
    whole = model.renderer.render((asked, Message("assistant", long, (call,))))[0]
    said = whole.removeprefix(model.renderer.render((asked,), opened=True)[0]).partition(model.renderer.turn_end)[0]
    matcher = matcher_for(model, structure_of_calls(form, [tool]))
    digit = model.renderer.tokens("1")[0][-1]

    def take(text):
        # A token each letter, so that no number is cut otherwise than digit by digit.
        for part in re.split("|".join(map(re.escape, [*MARKS["keys"], *MARKS["ids"]])).join("()"), text):
            ids = model.renderer.tokens(part)[0] if part in (*MARKS["keys"], *MARKS["ids"]) else None
            for token in (
                ids if ids is not None else [one for letter in part for one in model.renderer.tokens(letter)[0]]
            ):
                matcher.take(token)

    def more():
        matcher.fill()
        return bool(matcher.bits[digit // 32] >> (digit % 32) & 1)

    before, after = said.split("77177")
    take(before)
    for _ in range(34):
        assert more()
        matcher.take(digit)
    other = matcher.copy()
    assert not more()
    other.fill()
    assert not other.bits[digit // 32] >> (digit % 32) & 1
    middle, _ = after.split("88188")
    take(middle + long)
    assert more()
