"""Writing: the tokens of transformers' own loop, alone and in a batch; streams that never show half a character."""

import pytest
import torch
from transformers import GenerationConfig

from luthier.core.errors import ConfigError, ModelError
from luthier.core.types import Chat, Completion, Message
from luthier.engine.generate import generate, stream
from luthier.engine.pieces import complete, pieces
from luthier.engine.sampling import Sampling
from luthier.evals.predict import predict_examples
from luthier.models.load import load_model
from tiny import FAMILIES, tiny_loaded

PROMPTS = ["The quick brown", "房间很干净", "One two three four five six", "a"]
GREEDY = Sampling(max_tokens=12)


@torch.no_grad()
def write_naively(model, ids: list[int], steps: int) -> tuple[int, ...]:
    """Greedy, one whole forward a token, no cache, no padding."""
    written: list[int] = []
    start = getattr(model.module.config, "decoder_start_token_id", None)
    for _ in range(steps):
        if model.spec.kind == "decoder":
            logits = model.module(input_ids=torch.tensor([ids + written])).logits
        else:
            logits = model.module(
                input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *written]])
            ).logits
        token = int(logits[0, -1].argmax())
        if token in model.spec.stop_ids:
            break
        written.append(token)
    return tuple(written)


@pytest.mark.parametrize("family", FAMILIES["decoder"] + FAMILIES["encoder-decoder"])
def test_greedy_tokens_are_those_of_the_naive_loop_alone_and_in_a_batch(family):
    model = tiny_loaded(family)
    model.module.eval()
    together = generate(model, PROMPTS, GREEDY, raw=True, batch_size=4)
    for prompt, one in zip(PROMPTS, together):
        alone = generate(model, [prompt], GREEDY, raw=True)[0]
        naive = write_naively(model, list(model.renderer.prompt(prompt, raw=True)), 12)
        assert alone.ids == naive, prompt
        assert one.ids == naive, prompt
        assert one.prompt_tokens == len(model.renderer.prompt(prompt, raw=True))


@torch.no_grad()
def write_by_transformers(model, prompt: str, **settings) -> tuple[int, ...]:
    """What the model's own `generate` writes for one prompt, without its stop token."""
    ids = torch.tensor([list(model.renderer.prompt(prompt, raw=True))])
    start = getattr(model.module.config, "decoder_start_token_id", None)
    # A fixed end at the cut (BART, Marian) is left out, as an answer that was cut should not look finished.
    model.module.generation_config.forced_eos_token_id = None
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=model.tokenizer.pad_token_id or 0,
        eos_token_id=list(model.spec.stop_ids),
        decoder_start_token_id=start,
        **settings,
    )
    out = model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0
    ].tolist()
    written = out[ids.shape[1] :] if model.spec.kind == "decoder" else out[1:]
    end = next((at for at, token in enumerate(written) if token in model.spec.stop_ids), len(written))
    return tuple(written[:end])


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}], ids=["greedy", "beams", "penalty"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "t5", "bart"])
def test_tokens_are_those_of_transformers(family, settings):
    model = tiny_loaded(family)
    ours = Sampling(
        max_tokens=12, beams=settings.get("num_beams", 1), repetition_penalty=settings.get("repetition_penalty", 1.0)
    )
    together = generate(model, PROMPTS, ours, raw=True, batch_size=4)
    for prompt, one in zip(PROMPTS, together):
        theirs = write_by_transformers(model, prompt, **settings)
        assert one.ids == theirs, prompt
        assert generate(model, [prompt], ours, raw=True)[0].ids == theirs, prompt


def shown(model, text: str, sampling: Sampling = GREEDY) -> tuple[list[str], Completion]:
    """The pieces in which `text` is shown when it is written token by token, and the whole answer."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(pieces(model, ids, sampling)), complete(model, ids, sampling, 1)


@pytest.mark.parametrize("text", ["服务员非常热情", "é😀 and 👩‍🔬!", "a\ufffdb", "永字八法"])
def test_no_piece_of_a_stream_holds_half_a_character(text):
    model = tiny_loaded("gpt2")
    assert len(model.tokenizer(text)["input_ids"]) > len(text), "characters take several tokens"
    found, whole = shown(model, text)
    assert "".join(found) == whole.text == text
    assert len(found) > 1 and sum(piece.count("\ufffd") for piece in found) == text.count("\ufffd")


def test_nothing_of_a_stop_text_is_shown_before_it_is_known_to_be_none():
    model = tiny_loaded("gpt2")
    found, whole = shown(model, "one END of EN things ENDING here", Sampling(stop=("ENDING", "never")))
    for count in range(1, len(found)):
        assert not "".join(found[:count]).endswith(("E", "EN", "END")), "held back until it is known"
    assert "".join(found) == whole.text == "one END of EN things " and whole.finish == "stop"
    earliest = shown(model, "one END of EN things ENDING here", Sampling(stop=("things", "END")))[1]
    assert earliest.text == "one "


def test_an_unfinished_stop_text_at_the_end_is_part_of_the_answer():
    model = tiny_loaded("gpt2")
    found, whole = shown(model, "the EN", Sampling(stop=("END",)))
    assert "".join(found) == "the EN" and whole.finish == "length"


@pytest.mark.parametrize("prompt", ["The fox", "酒店的房间", "é😀 and"])
def test_a_stream_adds_up_to_the_answer(prompt):
    model = load_model("mini")
    sampling = Sampling(max_tokens=40, temperature=1.5, seed=3)
    pieces = list(stream(model, prompt, sampling, raw=True))
    whole = generate(model, [prompt], sampling, raw=True)[0].text
    assert "".join(pieces) == whole
    assert len(pieces) > 5


def test_chinese_streams_character_by_character():
    model = load_model("mini")
    pieces = list(stream(model, "春江潮水连海平，", Sampling(max_tokens=24), raw=True))
    assert len(pieces) > 3 and any("\u4e00" <= letter <= "\u9fff" for letter in "".join(pieces))


def test_a_stop_text_ends_the_answer_and_is_not_shown():
    model = load_model("mini")
    whole = generate(model, ["Once upon a time"], Sampling(max_tokens=40), raw=True)[0].text
    stop = whole[10:13]
    at = whole.find(stop)
    sampling = Sampling(max_tokens=40, stop=(stop,))
    done = generate(model, ["Once upon a time"], sampling, raw=True)[0]
    assert done.text == whole[:at] and done.finish == "stop"
    assert "".join(stream(model, "Once upon a time", sampling, raw=True)) == whole[:at]


def test_a_seed_repeats_a_draw_and_another_seed_does_not():
    model = tiny_loaded("llama")
    one, again, other = (
        generate(model, PROMPTS, Sampling(max_tokens=16, temperature=1.0, seed=seed), raw=True) for seed in (1, 1, 2)
    )
    assert one == again and one != other


def test_leaving_a_stream_ends_the_writing():
    model = load_model("mini")
    pieces = stream(model, "The fox", Sampling(max_tokens=400), raw=True)
    next(pieces)
    pieces.close()
    assert generate(model, ["The fox"], Sampling(max_tokens=4), raw=True)[0].text


def test_answers_come_in_the_order_of_the_prompts():
    model = load_model("mini")
    turns = [(Message("user", "Hello"),), (Message("user", "Tell me a long story about a fox and a crow."),)]
    both = generate(model, turns, Sampling(max_tokens=8))
    assert [one.ids for one in both] == [generate(model, [turn], Sampling(max_tokens=8))[0].ids for turn in turns]


def test_what_cannot_be_done_is_said():
    model = load_model("mini")
    with pytest.raises(ConfigError, match="cannot be streamed"):
        next(stream(model, "x", Sampling(beams=2)))
    with pytest.raises(ModelError, match="writes no text"):
        generate(tiny_loaded("bert"), ["x"])


def test_judged_conversations_keep_their_tools(monkeypatch):
    model = tiny_loaded("qwen2")
    tools, seen = ({"type": "function", "function": {"name": "weather"}},), []
    own = type(model.renderer).prompt

    def note(renderer, said, given=(), *, raw=False):
        seen.append(given)
        return own(renderer, said, given, raw=raw)

    monkeypatch.setattr(type(model.renderer), "prompt", note)
    talk = Chat("a", (Message("user", "one"), Message("assistant", "two")), tools)
    predict_examples(model, [talk], sampling=Sampling(max_tokens=2))
    assert seen == [tools]
