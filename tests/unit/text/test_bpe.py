import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from luthier.core.errors import ConfigError, DataError
from luthier.text.bpe import save_tokenizer, train_bpe

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
TEXTS = [
    "It's the old violin; they'll mend the violin's neck. 琴匠修琴，琴声清。",
    "The violin of 1715 and the viola of 1716. 制琴师会制琴，也会修琴。",
    "<|user|>\nWho mends the violin?<|end|>\n<|assistant|>\nThe luthier mends the violin.",
] * 3
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 330, SPECIALS)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The pieces that merges stay within."""
    return [text[start:stop] for _, (start, stop) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces \t tab\r\n\r\n  indent\n",
        "Don't — “quotes”… é vs e\u0301, ﬁ, Å",  # composed, decomposed, ligature, angstrom sign: none may be normalised
        "👩‍👩‍👧‍👦🏳️‍🌈 1️⃣ 🇨🇳",
        "第１２章：琴、𠺕、㐂。　全角 ＡＢＣ",
        "שלום مرحبا नमस्ते 한국어 ありがとう ไทย",
        "\x00\x01\x7f\x80\xff\u200b\ufeff\u2028\ufffd\U0010ffff\ue000",
        bytes(range(256)).decode("latin-1"),
        "<|user|>\nhi<|end|>\n<|assistant|>\n<|en d|> <|nobody|>",
    ],
)
def test_decoding_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_decoding_gives_back_random_unicode(tokenizer: Tokenizer) -> None:
    chance = random.Random(0)
    planes = [(0, 0x80), (0, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(300):
        text = "".join(chr(chance.randrange(*chance.choice(planes))) for _ in range(chance.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_vocabulary_is_specials_then_bytes_then_merges(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 330
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2, 3]
    assert len(tokenizer.encode(" violin").ids) == 1
    assert tokenizer.encode("<|user|> violin<|end|>").ids[::2] == [2, 1]


def test_special_tokens_in_the_texts_cost_no_merges() -> None:
    plain = train_bpe(["ab ab ab"] * 9, 258, ("<|end|>",))
    framed = train_bpe(["<|end|>ab ab ab<|end|>"] * 9, 258, ("<|end|>",))
    assert plain.to_str() == framed.to_str()
    assert framed.token_to_id("ab") is not None


def test_words_end_where_scripts_digits_and_punctuation_do(tokenizer: Tokenizer) -> None:
    assert words(tokenizer, "It's I’LL naïve") == ["It", "'s", " I", "’LL", " naïve"]
    assert words(tokenizer, "'tis 's-Hertogenbosch") == ["'", "tis", " '", "s", "-", "Hertogenbosch"]
    assert words(tokenizer, "in 1715, x=3") == ["in", " 1", "7", "1", "5", ",", " x", "=", "3"]
    assert words(tokenizer, "琴声，abc中文") == ["琴声", "，", "abc", "中文"]
    assert words(tokenizer, "a   b\n\n  c.\n") == ["a", "  ", " b", "\n\n", " ", " c", ".\n"]


def test_training_twice_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_bpe(iter(TEXTS), 330, SPECIALS).to_str() == tokenizer.to_str()


def test_training_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="need 260"):
        train_bpe(TEXTS, 259, SPECIALS)
    with pytest.raises(ConfigError, match="repeated"):
        train_bpe(TEXTS, 300, ("<|end|>", "<|end|>"))
    with pytest.raises(DataError, match="give only"):
        train_bpe(TEXTS, 5000, SPECIALS)


def test_saved_tokenizer_loads_with_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(
        tokenizer,
        tmp_path / "new",
        chat_template=TEMPLATE,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[2:],
        model_max_length=64,
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token, len(loaded)) == (0, 1, None, 330)
    assert loaded.model_max_length == 64
    assert set(loaded.all_special_tokens) == set(SPECIALS)
    text = "A space , a violin 's space . 琴"  # untidy on purpose: decoding must not tidy it
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<|user|>\nhi<|end|>\n"
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "bos_token" not in config


def test_saving_refuses_unknown_tokens_and_padding_as_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token: '</s>'"):
        save_tokenizer(tokenizer, tmp_path, chat_template=TEMPLATE, pad_token="<|pad|>", eos_token="</s>")
    with pytest.raises(ConfigError, match="a token of its own"):
        save_tokenizer(tokenizer, tmp_path, chat_template=TEMPLATE, pad_token="<|end|>", eos_token="<|end|>")
    assert not list(tmp_path.iterdir())
