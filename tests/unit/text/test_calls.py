"""Calls of tools: their form read off templates, and answers read the same however they are cut."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import marking
from luthier.core.types import Message
from luthier.data.turns import read_messages
from luthier.models.load import load_model
from luthier.text.called import CallReader, read_calls
from luthier.text.calls import CallForm, find_form
from luthier.text.render import Renderer
from luthier.text.template import TEMPLATES, Template

OWN = CallForm("\nCall: ", "\nCall: ", "", "arguments", "\nCall: ")
HERMES = CallForm("\n<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments", "<tool_call>\n")
LIST = CallForm("[TOOL_CALLS] [", ", ", "]", "arguments", "[TOOL_CALLS] [")
BARE = CallForm("", "", "", "parameters", "")
ARGUMENTS = '{"city": "Pa{r\\"is", "x": [1, {}]}'


NAMED = CallForm("[TOOL_CALLS]", "[TOOL_CALLS]", "", "", "[TOOL_CALLS]", kind="named", joined=("[ARGS]",))
IDS = replace(NAMED, numbered=True, joined=("[CALL_ID]", "[ARGS]"))
CODER = CallForm(
    "\n\n<tool_call>\n<function=", "\n<tool_call>\n<function=", "", "", "<tool_call>\n<function=", kind="marked",
    joined=(
        ">\n<parameter=", ">\n", "\n</parameter>\n<parameter=", "\n</parameter>\n</function>\n</tool_call>",
        ">\n</function>\n</tool_call>",
    ),
)  # fmt: skip
GLM = CallForm(
    "\n<tool_call>", "\n<tool_call>", "", "", "\n<tool_call>", kind="marked",
    joined=(
        "\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n<arg_key>", "</arg_value>\n</tool_call>",
        "\n</tool_call>",
    ),
)  # fmt: skip
FORMS = [OWN, HERMES, LIST, NAMED, IDS, CODER, GLM]
GIVEN = {"city": 'Pa{r"is\n</param', "x": [1, {}, '</b"r'], "n": -12, "either": "3 or 4", "so": None}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"$ref": "#/$defs/name"},
                    "x": {"type": "array"},
                    "n": {"type": "number"},
                    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                    "so": {"type": ["string", "null"]},
                },
                "$defs": {"name": {"type": "string"}},
            },
        },
    }
    for name in ("weather", "news")
]


def write(form, *names, given=GIVEN):
    if form.kind == "marked":
        first, middle, following, last, none = form.joined
        values = [f"{key}{middle}{one if isinstance(one, str) else json.dumps(one)}" for key, one in given.items()]
        calls = [f"{name}{first}{following.join(values)}{last}" if values else name + none for name in names]
    elif form.kind == "named":
        calls = [name + "abcdefgh9".join(form.joined) + ARGUMENTS for name in names]
    else:
        calls = [f'{{"name": "{name}", "{form.arguments}": {ARGUMENTS}}}' for name in names]
    return form.between.join(calls) + form.after


def read(form, pieces):
    reader, found = CallReader(form, TOOLS), {}
    for part in [part for piece in pieces for part in reader.feed(piece)] + reader.end():
        key = part.kind, part.index
        found[key] = found.get(key, "") + part.text
    return found


@pytest.mark.parametrize("form", FORMS)
def test_text_and_calls_are_told_apart(form):
    text, calls = read_calls(form, "Let me see." + form.before + write(form, "weather", "news"), TOOLS)
    assert text == "Let me see."
    wanted = json.dumps(GIVEN) if form.kind == "marked" else ARGUMENTS
    assert calls == [{"name": name, "arguments": wanted} for name in ("weather", "news")]
    assert read_calls(form, form.opening + write(form, "weather"))[0] == ""
    assert read_calls(form, "No calls: {}")[0] == "No calls: {}"
    for lost in (f"a{form.before}{{but}} no call", f"a{form.before}but no call"):
        assert read_calls(form, lost) == (lost, [])


@pytest.mark.parametrize("form", [CODER, GLM])
def test_what_a_marked_value_is_its_schema_says(form):
    def take(value, schema):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"v": schema}}}}
        text = form.opening + write(form, "f", given={"v": value})
        return read_calls(form, text, [tool])[1][0]["arguments"]

    assert take("3", {"type": "string"}) == '{"v": "3"}'
    assert take("3", {"type": "integer"}) == '{"v": 3}'
    assert take("3", {"type": ["string", "integer"]}) == '{"v": 3}'
    assert take("3.5", {"type": ["string", "integer"]}) == '{"v": "3.5"}'
    assert take(" 3", {"type": ["string", "integer"]}) == '{"v": " 3"}'
    assert take("null", {"type": ["string", "integer"]}) == '{"v": "null"}'
    assert take("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}) == '{"v": null}'
    assert take("NaN", True) == '{"v": "NaN"}'
    assert take('"a"\\', True) == json.dumps({"v": '"a"\\'})
    assert take('["</arg_value>\\n", "a"]', {"type": "array"}) == '{"v": ["</arg_value>\\n", "a"]}'
    # Of a tool that is not there nothing is known.
    assert read_calls(form, form.opening + write(form, "f", given={"v": "a"}))[1][0]["arguments"] == '{"v": "a"}'
    assert read_calls(form, form.opening + write(form, "f", given={}))[1] == [{"name": "f", "arguments": "{}"}]


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_cut_off_keeps_what_there_is(form):
    whole = form.opening + write(form, "weather")
    wanted = read_calls(form, whole, TOOLS)[1][0]["arguments"]
    text, (call,) = read_calls(form, whole[: len(form.opening) + 60], TOOLS)
    assert text == "" and call["name"] == "weather" and wanted.startswith(call["arguments"].rstrip("<")[:9])


@pytest.mark.parametrize("form", FORMS)
def test_digits_are_counted_within_calls_alone(form):
    reader = CallReader(form, TOOLS)
    reader.feed("12345")
    assert reader.digits == 0
    whole = form.before + write(form, "weather", given={"city": "12", "n": 123})
    at = whole.index("123") if form.kind == "marked" else whole.index("[1,") + 1
    reader.feed(whole[: whole.index("12") + 2] if form.kind == "marked" else whole[:at])
    assert reader.digits == 0
    reader.feed(whole[whole.index("12") + 2 : at + 2] if form.kind == "marked" else "12")
    assert reader.digits == 2
    reader.feed("45")
    assert reader.digits == 4


def test_calls_that_nothing_marks_stand_alone():
    assert read_calls(BARE, write(BARE, "weather")) == ("", [{"name": "weather", "arguments": ARGUMENTS}])
    for text in ("It is " + write(BARE, "weather"), '{"city": 3}', "{", ""):
        assert read_calls(BARE, text) == (text, [])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_however_an_answer_is_cut_it_is_read_the_same(data):
    form = data.draw(st.sampled_from([*FORMS, BARE]))
    whole = form.opening + write(form, "weather", *(["news"] if form.between else []))
    texts = [
        whole,
        "Sure." + form.before + write(form, "weather"),
        "a { b" + form.before[:4],
        whole[:-9],
        whole[: len(whole) // 2],
        whole + " and",
        form.opening + write(form, "weather", given={}),
        form.opening + write(form, "no", given=GIVEN | {"city": 3, "n": "n", "x": "]"}),
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
    for name, form in (("named", NAMED), ("ids", IDS), ("marked", CODER), ("keys", GLM)):
        assert find_form(with_template(renderer, marking.TEMPLATES[name])) == form


def test_a_template_without_calls_has_no_form(renderer):
    silent = HERMES_TEMPLATE.replace("m.tool_calls or []", "[]")
    assert find_form(with_template(renderer, silent)) is None
    # With the arguments in Python's own spelling, and with nothing before a name.
    python = HERMES_TEMPLATE.replace("(c.function.arguments | tojson)", "(c.function.arguments | string)")
    assert find_form(with_template(renderer, python)) is None
    bare = marking.TEMPLATES["named"].replace("'[TOOL_CALLS]' ~ ", "")
    assert find_form(with_template(renderer, bare)) is None
    # Values as JSON, which are in no quotes where they are texts.
    quoted = marking.TEMPLATES["marked"].replace("(v if v is string else v | tojson)", "v | tojson")
    assert find_form(with_template(renderer, quoted)) is None


def test_what_a_template_writes_is_read_again(renderer):
    for source in (renderer.template.source, HERMES_TEMPLATE, *marking.TEMPLATES.values()):
        own = with_template(renderer, source)
        form = find_form(own)
        call = {"id": "abcdefgh9", "type": "function", "function": {"name": "weather", "arguments": {"city": "Wien"}}}
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
