"""Text that grows token by token: together what the tokenizer makes of all tokens at once, each decoded a few times at most."""

import copy
import random
from itertools import product

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.engine.pieces import Growing, complete, pieces
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from luthier.text.growing import GrowingText
from tiny import ALL_FAMILIES, CORPUS, tiny_tokenizer

TEXTS = (
    "  two spaces, 永字八法 é😀👩‍🔬 and\n\ttabs  ",
    "a\ufffdb \x80",
    "服务员非常热情",
    "",
    *CORPUS[:2],
)


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """In the manner of Llama 2 (bytes for what is unknown), Gemma (the same, no space in front) or T5 (Unigram)."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = ["▁", "▁▁", "\n", ":", ".", *map(chr, range(65, 123))]
    if kind == "unigram":
        core = Tokenizer(
            models.Unigram([(one, -1.0 - at / 50) for at, one in enumerate([*specials, *letters, "▁the", "ing"])], 0)
        )
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        words = [*specials, *(f"<0x{at:02X}>" for at in range(256)), *letters, "永", "▁a"]
        core = Tokenizer(
            models.BPE({one: at for at, one in enumerate(words)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
        )
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        strip = [decoders.Strip(" ", 1, 0)] if kind == "llama2" else []
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words_of_pieces() -> PreTrainedTokenizerFast:
    """BPE whose last pieces of a word end with </w>, as in the first GPT."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>"], end_of_word_suffix="</w>", vocab_size=200, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


MADE = {
    **{family: (lambda family=family: tiny_tokenizer(family)) for family in ALL_FAMILIES},
    **{kind: (lambda kind=kind: sentencepiece(kind)) for kind in ("llama2", "gemma2", "unigram")},
    "gpt": words_of_pieces,
}


@pytest.fixture(params=MADE)
def tokenizer(request):
    # Others have the family's tokenizer as it was.
    made = copy.deepcopy(MADE[request.param]())
    made.add_tokens(["<tool>", "工具"])
    return made


def rows(tokenizer, count: int = 120) -> list[list[int]]:
    """Ids of texts, and random ones, many of them bytes and special tokens, some beyond the vocabulary."""
    draw = random.Random(0)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    low = [*range(min(265, len(tokenizer))), *tokenizer.all_special_ids, len(tokenizer) - 1, len(tokenizer) - 2]
    for at in range(count):
        pool = low if at % 2 else range(len(tokenizer) + 3)
        found.append(draw.choices(pool, k=draw.randrange(40)))
        text = tokenizer("".join(draw.choices("a 永é😀\ufffd\n▁", k=12)), add_special_tokens=False)["input_ids"]
        found.append([*text[: draw.randrange(len(text) + 1)], *found[-1][:3], *text])
    return found


def decode_of(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_pieces_together_are_the_decoded_whole(tokenizer):
    decode = decode_of(tokenizer)
    for ids in rows(tokenizer):
        growing = GrowingText(tokenizer, decode)
        found = [growing.take(one) for one in ids]
        assert "".join(found) + growing.rest() == decode(ids), tokenizer.convert_ids_to_tokens(ids)


def test_each_token_is_decoded_a_few_times_at_most(tokenizer):
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return decode_of(tokenizer)(ids)

    for ids in (rows(tokenizer, 20)[-1] * 30, tokenizer(CORPUS[0], add_special_tokens=False)["input_ids"] * 30):
        decoded, growing = 0, GrowingText(tokenizer, decode)
        for one in ids:
            growing.take(one)
        growing.rest()
        assert decoded <= 4 * len(ids)


def test_characters_come_as_soon_as_they_are_whole():
    tokenizer = tiny_tokenizer("gpt2")
    growing = GrowingText(tokenizer, decode_of(tokenizer))
    found = [growing.take(one) for one in tokenizer("é😀永")["input_ids"]]
    assert [one for one in found if one] == ["é", "😀", "永"]


def test_a_run_of_bytes_is_told_when_it_ends_for_one_wrong_byte_changes_all_of_it():
    tokenizer = sentencepiece("llama2")
    byte = {at: tokenizer.convert_tokens_to_ids(f"<0x{at:02X}>") for at in range(256)}
    letter = tokenizer.convert_tokens_to_ids("x")
    growing = GrowingText(tokenizer, decode_of(tokenizer))
    assert [growing.take(byte[one]) for one in "é".encode()] == ["", ""]
    assert growing.take(byte[0xFF]) == "" and growing.take(letter) == "\ufffd\ufffd\ufffdx"


STOPS = (("e",), ("fox", "x j"), ("the", "then", "hen"), ("永字",), ("é😀",), (" a", "  "), ("\n",))


def test_a_stream_with_stop_texts_is_the_answer(tokenizer):
    model = load_model("mini")
    model.tokenizer = model.renderer.tokenizer = tokenizer
    for ids in rows(tokenizer, 25):
        for stops, least in product(STOPS, (0, 1, 7)):
            sampling = Sampling(stop=stops, min_tokens=least)
            growing = Growing(model, sampling)
            for one in ids:
                growing.take(one)
                if growing.ended:
                    break
            assert "".join(pieces(model, ids, sampling)) == complete(model, growing.ids, sampling, 1).text


def test_a_long_answer_is_decoded_a_few_times_not_once_a_token():
    model, decoded = load_model("mini"), 0
    decode = model.tokenizer.decode

    def count(ids, **settings):
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, **settings)

    ids = model.tokenizer("Once upon a time 永字八法 " * 60)["input_ids"]
    model.tokenizer.decode = count
    assert "".join(pieces(model, ids, Sampling(stop=("never",)))).startswith("Once upon")
    assert decoded <= 4 * len(ids), f"{decoded} for {len(ids)}"
