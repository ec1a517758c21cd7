"""What /v1/completions reads of a text, and that its answer goes on from it."""

import asyncio

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from luthier.faces.server.hands import load
from luthier.faces.server.logprobs import text_logs
from tiny import CORPUS

PROMPT = "the fox and"


def spaced():
    """A tokenizer as those of SentencePiece: <s> in front, words begin with a mark, the first of which is no space in a text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{at:02X}>" for at in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", pair=None, special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def opened(place, module):
    module.save_pretrained(place)
    spaced().save_pretrained(place)
    return load({"source": str(place), "streams": 4, "waiting": 8}, lambda event: None)


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=len(spaced()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    found = opened(tmp_path_factory.mktemp("spaced"), LlamaForCausalLM(config))
    yield found
    found.close()


def ask(hands, **asked):
    async def parts():
        return [part async for part in hands.do(asked)]

    return asyncio.run(parts())


def word(hands):
    """A token that is a word with the space before it."""
    tokenizer = hands.model.tokenizer
    return next(at for at in range(259, len(tokenizer)) if tokenizer.convert_ids_to_tokens(at) == "▁the")


def test_a_text_is_read_as_generate_reads_it(hands):
    (part,) = ask(hands, do="tokenize", text=PROMPT)
    ids = part["end"]["ids"]
    assert ids == list(hands.model.renderer.prompt(PROMPT, raw=True))
    assert ids.count(hands.model.tokenizer.bos_token_id) == 1
    (marked,) = ask(hands, do="tokenize", text=f"<s>{PROMPT}")
    assert marked["end"]["ids"].count(hands.model.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_goes_on_from_its_text(hands, n):
    tokenizer, token = hands.model.tokenizer, word(hands)
    ids = hands.model.renderer.prompt(PROMPT, raw=True)
    sampling = {"temperature": 0.1, "max_tokens": 2, "n": n, "logit_bias": {token: 100.0}, "logprobs": 1}
    assert tokenizer.decode([*ids, token, token], skip_special_tokens=True) == f"{PROMPT} the the"
    (part,) = ask(hands, do="write", text=PROMPT, sampling={**sampling})
    for answer in part["end"]["answers"]:
        assert answer["text"] == " the the"
        assert [log[1] for log in answer["logs"]] == [" the", " the"]
    texts = dict.fromkeys(range(n), "")
    for part in ask(hands, do="write", ids=list(ids), stream=True, sampling={**sampling, "logprobs": None})[:-1]:
        texts[part["piece"]["which"]] += part["piece"]["text"]
    assert set(texts.values()) == {" the the"}
    # Where a turn begins, so does its text.
    turns = [{"role": "user", "content": PROMPT}]
    (part,) = ask(hands, do="write", messages=turns, sampling={**sampling})
    assert part["end"]["answers"][0]["text"] == "the the"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "least", "text"),
    [
        # As it stands in what is shown, from the first letter on.
        (" the", 0, ""),
        (" t", 0, ""),
        ("the", 0, " "),
        ("the the", 0, " "),
        (" the the", 0, ""),
        ("e t", 0, " th"),
        ("  the", 0, " the the the the"),
        # What comes too early does not count, and what comes after it does.
        (" the", 2, " the"),
        ("the", 3, " the the "),
    ],
)
def test_a_stop_text_is_looked_for_in_what_is_shown(hands, stop, least, text, stream):
    sampling = {"temperature": 0.1, "max_tokens": 4, "logit_bias": {word(hands): 100.0}, "min_tokens": least}
    found = ask(hands, do="write", text=PROMPT, stream=stream, sampling={**sampling, "stop": [stop]})
    if stream:
        parts = [part["piece"] for part in found[:-1]]
        answer = {**parts[-1], "text": "".join(part["text"] for part in parts)}
    else:
        (answer,) = found[0]["end"]["answers"]
    ended = text != " the the the the"
    assert (answer["text"], answer["finish"], answer.get("stopped")) == (
        text, "stop" if ended else "length", stop if ended else None
    )  # fmt: skip


def test_a_turn_begins_without_a_space_that_could_stop_it(hands):
    turns = [{"role": "user", "content": PROMPT}]
    sampling = {"temperature": 0.1, "max_tokens": 3, "logit_bias": {word(hands): 100.0}, "stop": [" the"]}
    (part,) = ask(hands, do="write", messages=turns, sampling=sampling)
    assert part["end"]["answers"][0]["text"] == "the"


def test_a_search_stops_at_what_is_shown(hands):
    sampling = {"temperature": 0.0, "max_tokens": 3, "n": 1, "beams": 2, "logit_bias": {word(hands): 100.0}}
    for stop, text in ((" the", ""), ("the", " ")):
        (part,) = ask(hands, do="search", text=PROMPT, sampling={**sampling, "stop": [stop]})
        assert part["end"]["answers"][0]["text"] == text


def test_a_search_goes_on_from_its_text(hands):
    (part,) = ask(hands, do="search", text=PROMPT, sampling={"temperature": 0.0, "max_tokens": 2, "n": 2, "beams": 2})
    for answer in part["end"]["answers"]:
        first = hands.model.tokenizer(f"{PROMPT}{answer['text']}")["input_ids"]
        assert first[:4] == list(hands.model.renderer.prompt(PROMPT, raw=True))[:4]


def test_an_answer_to_a_source_begins_anew(tmp_path):
    config = T5Config(
        vocab_size=len(spaced()), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    hands = opened(tmp_path, T5ForConditionalGeneration(config))
    sampling = {"temperature": 0.1, "max_tokens": 2, "logit_bias": {word(hands): 100.0}}
    (part,) = ask(hands, do="write", text=PROMPT, sampling=sampling)
    assert part["end"]["answers"][0]["text"] == "the the"
    hands.close()


def test_places_of_tokens_are_those_in_the_text():
    logs = [[1, "<s>", None, []], [5, "Once", -1.0, []], [6, " upon", -1.0, []]]
    assert text_logs(logs, text="Once upon").text_offset == [0, 0, 4]
    assert text_logs(logs[1:], 7).text_offset == [7, 11]
