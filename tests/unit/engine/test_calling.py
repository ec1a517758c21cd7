"""Calls that special tokens mark: written by id, seen in the text, and read the same however the answer is cut."""

import json

import pytest

from luthier.core.types import Message
from luthier.engine.calling import structure_of_calls
from luthier.engine.generate import generate
from luthier.engine.pieces import pieces
from luthier.engine.sampling import Sampling
from luthier.engine.structure import matcher_for
from luthier.text.calls import CallReader, find_form, read_calls
from marking import MARKS, TEMPLATES, marked_model

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {key: {"enum": [1, "a"]}}}},
    }
    for name, key in (("look", "city"), ("news", "topic"))
]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def marked(request):
    model = marked_model(request.param)
    return model, find_form(model.renderer)


def test_the_form_names_its_special_tokens(marked):
    model, form = marked
    spelled = [one for one in MARKS if one in form.before + form.after]
    assert [one for one, _ in form.marks] == spelled
    assert form.marks == tuple((one, model.tokenizer.convert_tokens_to_ids(one)) for one in spelled)
    assert form.numbered == ("[TOOL_CALLS]" in spelled)


@pytest.mark.parametrize("said", ["", "Let me see."])
@pytest.mark.parametrize("count", [1, 2])
def test_what_the_template_writes_is_allowed_and_read_again(marked, said, count):
    model, form = marked
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
    text, calls = read_calls(form, "".join(grown))
    assert text == said and calls == [{"name": "look", "arguments": '{"city": "a"}'}] * count
    for cut in range(1, len("".join(grown))):
        reader = CallReader(form)
        whole_text = "".join(grown)
        parts = [*reader.feed(whole_text[:cut]), *reader.feed(whole_text[cut:]), *reader.end()]
        assert "".join(one.text for one in parts if one.kind == "text") == said
        assert "".join(one.text for one in parts if one.kind == "arguments") == '{"city": "a"}' * count
    # Left out of the text where nobody asked for it.
    assert all(mark not in model.renderer.decode(ids) for mark, _ in form.marks)


def test_text_that_spells_a_mark_is_none(marked):
    model, form = marked
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
    model, form = marked
    structure = structure_of_calls(form, TOOLS, "required", parallel=False)
    sampling = Sampling(max_tokens=90, structure=structure, shown_ids=tuple(id for _, id in form.marks))
    found = generate(model, [[Message("user", "How is it?")]], sampling)[0]
    assert form.marks[0][1] in found.ids and found.finish == "stop"
    text, (call,) = read_calls(form, found.text)
    assert text == "" and call["name"] in ("look", "news") and isinstance(json.loads(call["arguments"]), dict)
