"""Calls of tools: their form read off templates, and answers read the same however they are cut."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.types import Message
from luthier.data.turns import read_messages
from luthier.models.load import load_model
from luthier.text.calls import CallForm, CallReader, find_form, read_calls
from luthier.text.render import Renderer
from luthier.text.template import TEMPLATES, Template

OWN = CallForm("\nCall: ", "\nCall: ", "", "arguments", "\nCall: ")
HERMES = CallForm("\n<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments", "<tool_call>\n")
LIST = CallForm("[TOOL_CALLS] [", ", ", "]", "arguments", "[TOOL_CALLS] [")
BARE = CallForm("", "", "", "parameters", "")
ARGUMENTS = '{"city": "Pa{r\\"is", "x": [1, {}]}'


def write(form, *names):
    calls = (f'{{"name": "{name}", "{form.arguments}": {ARGUMENTS}}}' for name in names)
    return form.between.join(calls) + form.after


def read(form, pieces):
    reader, found = CallReader(form), {}
    for part in [part for piece in pieces for part in reader.feed(piece)] + reader.end():
        key = part.kind, part.index
        found[key] = found.get(key, "") + part.text
    return found


@pytest.mark.parametrize("form", [OWN, HERMES, LIST])
def test_text_and_calls_are_told_apart(form):
    text, calls = read_calls(form, "Let me see." + form.before + write(form, "weather", "news"))
    assert text == "Let me see."
    assert calls == [{"name": name, "arguments": ARGUMENTS} for name in ("weather", "news")]
    assert read_calls(form, form.opening + write(form, "weather"))[0] == ""
    assert read_calls(form, "No calls: {}")[0] == "No calls: {}"
    lost = f"a{form.before}{{but}} no call"
    assert read_calls(form, lost) == (lost, [])


def test_calls_that_nothing_marks_stand_alone():
    assert read_calls(BARE, write(BARE, "weather")) == ("", [{"name": "weather", "arguments": ARGUMENTS}])
    for text in ("It is " + write(BARE, "weather"), '{"city": 3}', "{", ""):
        assert read_calls(BARE, text) == (text, [])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_however_an_answer_is_cut_it_is_read_the_same(data):
    form = data.draw(st.sampled_from([OWN, HERMES, LIST, BARE]))
    whole = form.opening + write(form, "weather", *(["news"] if form.between else []))
    texts = [
        whole,
        "Sure." + form.before + write(form, "weather"),
        "a { b" + form.before[:4],
        whole[:-9],
        whole + " and",
    ]
    text = data.draw(st.sampled_from([*texts, "x" + form.before + "no" + form.before + write(form, "weather")]))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    assert read(form, pieces) == read(form, [text])


@pytest.fixture(scope="module")
def renderer():
    return load_model("mini").renderer


HERMES_TEMPLATE = (
    "{%- for m in messages -%}{{ '[' ~ m.role ~ ']' ~ '\\n' ~ (m.content or '') }}"
    "{%- for c in m.tool_calls or [] -%}{%- if m.content or not loop.first %}{{ '\\n' }}{% endif -%}"
    '{{ \'<tool_call>\\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) '
    "~ '}\\n</tool_call>' }}{%- endfor -%}{{ eos_token ~ '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]\\n' }}{%- endif -%}"
)


def with_template(renderer, source):
    return Renderer(renderer.tokenizer, kind="decoder", template=Template("test", source), max_length=512)


def test_the_form_is_read_off_a_template(renderer):
    assert find_form(renderer) == replace(OWN, opening="Call: ")
    assert find_form(with_template(renderer, TEMPLATES["plain"])) == OWN
    assert find_form(with_template(renderer, HERMES_TEMPLATE)) == HERMES


def test_a_template_without_calls_has_no_form(renderer):
    silent = HERMES_TEMPLATE.replace("m.tool_calls or []", "[]")
    assert find_form(with_template(renderer, silent)) is None
    # As XML, which is no JSON.
    other = HERMES_TEMPLATE.replace('{\\"name\\": \\"', "<name>").replace('\\", \\"arguments\\": ', "</name>")
    assert (
        find_form(with_template(renderer, other.replace('{"name": "', "<name>").replace('", "arguments"', "<"))) is None
    )


def test_what_a_template_writes_is_read_again(renderer):
    for source in (renderer.template.source, HERMES_TEMPLATE):
        own = with_template(renderer, source)
        form = find_form(own)
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Wien"}}}
        for said in ("", "Let me see."):
            asked = Message("user", "How is it?")
            whole = own.render((asked, Message("assistant", said, (call, call))))[0]
            answer = whole.removeprefix(own.render((asked,), opened=True)[0]).partition(own.turn_end)[0]
            text, calls = read_calls(form, answer)
            assert text == said and calls == [{"name": "weather", "arguments": '{"city": "Wien"}'}] * 2


def test_the_arguments_may_be_named_otherwise():
    other = replace(HERMES, arguments="parameters")
    assert read_calls(other, other.opening + write(other, "weather"))[1][0]["name"] == "weather"
    assert read_calls(HERMES, other.opening + write(other, "weather"))[1] == []


def test_arguments_sent_as_text_are_rendered_as_an_object(renderer):
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Wien"}'}}
    sent = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = with_template(renderer, HERMES_TEMPLATE).render(read_messages(sent, "messages"))[0]
    assert '{"name": "weather", "arguments": {"city": "Wien"}}' in text
    broken = [sent[0], {**sent[1], "tool_calls": [{"function": {"name": "weather", "arguments": "{"}}]}]
    assert read_messages(broken, "messages")[1].tool_calls[0]["function"]["arguments"] == "{"
