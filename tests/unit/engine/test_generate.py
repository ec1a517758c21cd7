"""Writing: the tokens of transformers' own loop, alone and in a batch; streams that never show half a character."""

import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.types import Message
from luthier.engine.generate import generate, stream
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from tiny import FAMILIES, tiny_model

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
    model = load_model(str(tiny_model(family)))
    model.module.eval()
    together = generate(model, PROMPTS, GREEDY, raw=True, batch_size=4)
    for prompt, one in zip(PROMPTS, together):
        alone = generate(model, [prompt], GREEDY, raw=True)[0]
        naive = write_naively(model, list(model.renderer.prompt(prompt, raw=True)), 12)
        assert alone.ids == naive, prompt
        assert one.ids == naive, prompt
        assert one.prompt_tokens == len(model.renderer.prompt(prompt, raw=True))


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
    model = load_model(str(tiny_model("llama")))
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
        generate(load_model(str(tiny_model("bert"))), ["x"])
