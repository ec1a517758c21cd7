"""What is learned of a conversation: the assistant's words and the token that ends its turn, and nothing else."""

from pathlib import Path

import pytest

from luthier.core.errors import DataError, ModelError
from luthier.core.events import Events
from luthier.core.types import Chat, Message, Pair
from luthier.text.render import Renderer
from luthier.text.template import Template, choose_template
from luthier.training.objectives.part import encode_rows
from tiny import CHATML, FAMILIES, tiny_tokenizer

TURNS = (
    Message("system", "Be brief."),
    Message("user", "Hi there 你好"),
    Message("assistant", "Hello 世界"),
    Message("user", "more?"),
    Message("assistant", "no"),
)
# Drops everything up to </think> from all but the last assistant turn, as Qwen3's own template does.
THINKING = CHATML.replace(
    "message['content']",
    "(message['content'].split('</think>')[-1] if message['role'] == 'assistant' and not loop.last else message['content'])",
)


def make(family: str = "qwen2", template: str = "auto", **settings) -> Renderer:
    tokenizer = tiny_tokenizer(family)
    chosen, _ = choose_template(tokenizer, template)
    return Renderer(tokenizer, kind="decoder", template=chosen, max_length=settings.pop("max_length", 500), **settings)


def learned(renderer: Renderer, row) -> str:
    return "".join(text for text, weight in renderer.describe(row) if weight)


@pytest.mark.parametrize("family", FAMILIES["decoder"])
def test_every_assistant_turn_and_its_end_is_learned(family):
    renderer = make(family)
    row = renderer.chat(Chat("t:1", TURNS))
    end = renderer.turn_end
    assert learned(renderer, row) == f"Hello 世界{end}no{end}"
    assert row.weights[0] == 0 and renderer.mismatches == 0
    assert tuple(renderer.prompt(TURNS[:2])) == row.ids[: len(renderer.prompt(TURNS[:2]))]


def test_learn_last_and_weights_of_turns():
    assert learned(make(learn="last"), make(learn="last").chat(Chat("t:1", TURNS))) == "no<|im_end|>"
    weighted = (*TURNS[:2], Message("assistant", "Hello", weight=0.0), TURNS[3], Message("assistant", "no", weight=0.5))
    row = make().chat(Chat("t:1", weighted))
    assert {weight for weight in row.weights if weight} == {0.5} and learned(make(), row) == "no<|im_end|>"


def test_a_template_that_strips_thinking_from_earlier_turns():
    tokenizer = tiny_tokenizer("qwen2")
    renderer = Renderer(tokenizer, kind="decoder", template=Template("thinking", THINKING), max_length=500)
    plain = renderer.chat(Chat("t:1", TURNS))
    assert learned(renderer, plain) == "Hello 世界<|im_end|>no<|im_end|>"
    thought = (*TURNS[:2], Message("assistant", "hm</think>Hello"), *TURNS[3:])
    with pytest.raises(DataError, match=r"^t:1: .* rewrites turn 3"):
        renderer.chat(Chat("t:1", thought))


def test_a_template_without_an_end_is_refused():
    template = Template("endless", "{% for m in messages %}{{ m.content }}{% endfor %}")
    renderer = Renderer(tiny_tokenizer("qwen2"), kind="decoder", template=template, max_length=500)
    with pytest.raises(ModelError, match="could not learn to stop"):
        renderer.chat(Chat("t:1", TURNS))
    assert renderer.prompt("go on") and renderer.stop_ids  # what was trained elsewhere can be used all the same


def test_a_conversation_may_begin_with_the_assistant():
    turns = (Message("assistant", "Hello, how can I help?"), *TURNS[1:3])
    for renderer in (make(), make("llama"), make("gpt2")):
        row = renderer.chat(Chat("t:1", turns))
        end = renderer.turn_end
        assert learned(renderer, row) == f"Hello, how can I help?{end}Hello 世界{end}" and not renderer.mismatches


def spaced(byte_fallback: bool = True) -> Renderer:
    """In the manner of Llama 2: a space in front of every text, spaces as letters, bytes for what is not known."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "</s>", *(f"<0x{at:02X}>" for at in range(256)), "▁", "\n", ":", *map(chr, range(65, 123))]
    vocabulary = {token: at for at, token in enumerate(letters)}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=byte_fallback, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    return Renderer(tokenizer, kind="decoder", template=choose_template(tokenizer, "plain")[0], max_length=500)


def test_shown_pieces_keep_their_spaces():
    renderer = spaced()
    row = renderer.pair(Pair("t:1", "say cat", "the cat 你 sat"))
    assert learned(renderer, row) == "the cat 你 sat</s>"
    assert "".join(text for text, _ in renderer.describe(row)).startswith("User:\nsay cat\n\nAssistant:\nthe")


def test_nothing_to_learn_is_an_error_that_names_the_row():
    with pytest.raises(DataError, match=r"^t:7: there is nothing to learn"):
        make().chat(Chat("t:7", (Message("user", "hi"), Message("assistant", "x", weight=0.0))))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_is_cut_of_two_texts_is_counted(family):
    def make_pairs(**settings):
        return Renderer(tiny_tokenizer(family), kind="encoder", template=None, **settings)

    texts = "win a prize now " * 4, "see you at the station"
    whole = make_pairs(max_length=500).labelled(*texts)
    cut = make_pairs(max_length=len(whole.ids) - 5, truncate=True).labelled(*texts)
    assert (whole.cut, cut.cut, len(cut.ids)) == (0, 5, len(whole.ids) - 5)
    # The longer text lost its end, the other one nothing.
    assert cut.ids[-5:] == whole.ids[-5:]


def test_too_long_is_refused_or_cut_and_counted():
    with pytest.raises(DataError, match=r"^t:1: \d+ tokens do not fit in 24"):
        make(max_length=24).chat(Chat("t:1", TURNS))
    whole = make().chat(Chat("t:1", TURNS))
    row = make(max_length=len(whole.ids) - 3, truncate=True).chat(Chat("t:1", TURNS))
    assert row.cut == 3 and row.ids == whole.ids[:-3]


def test_tool_calls_are_learned_in_the_plain_template():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = (
        Message("user", "1+1"),
        Message("assistant", "", (call,)),
        Message("tool", "2"),
        Message("assistant", "two"),
    )
    renderer = make("llama")
    text = learned(renderer, renderer.chat(Chat("t:1", turns, ({"name": "add"},))))
    assert '"name": "add"' in text and text.endswith("two</s>") and "2</s>" not in text


def test_raw_joins_prompt_and_completion():
    renderer = make("llama", "raw")
    row = renderer.pair(Pair("t:1", "one two", " three"))
    assert learned(renderer, row) == " three</s>"


def test_a_template_of_ones_own(tmp_path: Path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    chosen, why = choose_template(tiny_tokenizer("qwen2"), str(path))
    assert chosen == Template("mine", CHATML) and why == "asked for"
    with pytest.raises(ValueError, match="did you mean 'chatml'"):
        choose_template(tiny_tokenizer("qwen2"), "chatlm")


def test_what_a_row_loses_is_counted():
    known, lossy = spaced(), spaced(byte_fallback=False)
    rows = [Pair("t:1", "say", "cat"), Pair("t:2", "say", "狗")]
    for renderer, lost in ((known, 0), (lossy, 1)):
        events = Events()
        encode_rows(rows, renderer.pair, events, renderer=renderer)
        assert sum(events.warnings.values()) == lost
        assert all("(t:2 is the first); they are lost to the model" in text for text in events.warnings)


@pytest.mark.parametrize("completion", ["e fox", " fox"])
def test_a_seam_that_tokenises_otherwise_is_counted(completion):
    """With the raw template nothing stands between a prompt and its answer: their letters may join in one token."""
    renderer, events = make("llama", "raw"), Events()
    row = encode_rows([Pair("t:1", "th", completion)], renderer.pair, events, renderer=renderer)[0]
    joined = row.ids[: len(renderer.prompt("th"))] != renderer.prompt("th")
    assert joined == (completion == "e fox") == any("tokenise otherwise alone" in text for text in events.warnings)
