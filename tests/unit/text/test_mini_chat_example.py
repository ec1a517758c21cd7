"""Mini's corpus renders conversations as the tokenizer that ships with it does."""

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.text.bpe import save_tokenizer, train_bpe

MINI = Path(__file__).parents[3] / "examples" / "mini"
TOOL = {"name": "area", "description": "求面积", "parameters": {"type": "object", "properties": {}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "3 × 5?"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "area", "arguments": {"长": 3, "b": [5]}}]},
    {"role": "tool", "content": '{"area": 15}'},
    {"role": "assistant", "content": "15"},
]
EXPECTED = """<|system|>
Be brief.
Tools:
{"name": "area", "description": "求面积", "parameters": {"type": "object", "properties": {}}}<|end|>
<|user|>
3 × 5?<|end|>
<|assistant|>
Call: {"name": "area", "arguments": {"长": 3, "b": [5]}}<|end|>
<|tool|>
{"area": 15}<|end|>
<|assistant|>
15<|end|>
"""


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MINI)
        import sources as module  # type: ignore[import-not-found]
    sys.modules.pop("sources", None)
    return module


@pytest.fixture(scope="module")
def tokenizer(sources: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    template = sources.TEMPLATE.read_text(encoding="utf-8")
    specials = ("<|pad|>", "<|end|>")
    trained = train_bpe(["ab ab"], 259, specials)
    save_tokenizer(trained, directory, chat_template=template, pad_token="<|pad|>", eos_token="<|end|>")
    return AutoTokenizer.from_pretrained(directory)


def test_corpus_and_tokenizer_render_the_same(sources: ModuleType, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.apply_chat_template(CONVERSATION, tools=[TOOL], tokenize=False) == EXPECTED
    assert sources.render_chat(CONVERSATION, [TOOL]) == EXPECTED.removesuffix("<|end|>\n")
    plain = tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False, add_generation_prompt=True)
    assert plain == "<|user|>\n3 × 5?<|end|>\n<|assistant|>\n"


def test_tools_without_a_system_message_get_one(sources: ModuleType) -> None:
    text = sources.render_chat(CONVERSATION[1:2], [TOOL])
    assert text.startswith('<|system|>\nTools:\n{"name": "area"')
    assert text.endswith("<|end|>\n<|user|>\n3 × 5?")


def test_an_unknown_role_is_refused(sources: ModuleType, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="not narrator"):
        sources.render_chat([{"role": "narrator", "content": "x"}])
    with pytest.raises(TemplateError, match="not narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


def test_a_long_conversation_ends_at_an_answer_that_fits(sources: ModuleType) -> None:
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = [{"role": "user", "content": "c" * 5000}, {"role": "assistant", "content": "d"}]
    dropped: Counter[str] = Counter()
    assert list(sources.fit_chat(short + long, dropped)) == ["<|user|>\na<|end|>\n<|assistant|>\nb"]
    assert list(sources.fit_chat(long, dropped)) == []
    assert dropped == {"turns past the length limit": 2, "conversation too long": 1}
