"""The engine on a CUDA device (make gpu): attention, captured steps, and the tokens of transformers."""

import subprocess
import sys

import pytest
import torch

from flash import COVERED, LONG, model_of, written
from luthier.engine import decoding, paged
from luthier.engine.beams import search
from luthier.engine.engine import Engine
from luthier.engine.generate import generate
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models import varlen
from luthier.models.attention import Rules
from luthier.models.load import load_model
from luthier.models.pages import writes_by_pages
from tiny import tiny_model
from writing import prompts

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
GIVEN = (290, 5, 40, 255, 256, 1)


def moved(family, dtype=torch.bfloat16, **more):
    model = model_of(family, **{**LONG, **COVERED.get(family, {}), **more})
    model.module.to(DEVICE, dtype)
    return model


def lost(model, prompt, answer):
    """How much less likely each token was than the likeliest, by the model's own forward over the whole text."""
    ids = torch.tensor([[*prompt, *answer]], device=DEVICE)
    with torch.no_grad():
        logs = model.module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = logs.gather(1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0]
    return (logs.amax(-1) - own).tolist()


def test_varlen_attn_does_what_is_expected_of_it():
    assert varlen.why_not(DEVICE, torch.bfloat16) is None and varlen.why_not(DEVICE, torch.float16) is None


@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_text_gets_the_same_bits_beside_any_others(window, width):
    draw = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE, torch.bfloat16)  # noqa: E731
    keys, values = new(12 * varlen.PAGE, 2, width), new(12 * varlen.PAGE, 2, width)
    rules = Rules(True, width**-0.5, window)
    for count, beside in ((1, [1, 1, 1]), (1, [90, 1, 30]), (77, [1, 64, 3])):
        q = [new(one, 8, width) for one in (count, *beside)]
        tables, seen = [[3, 1], [5], [0, 2, 6], [7, 8, 9, 10]], [400, 200, 700, 1024]
        texts = varlen.texts_of(tables, [a - len(b) for a, b in zip(seen, q)], [len(one) for one in q], DEVICE)
        alone = varlen.texts_of(tables[:1], [seen[0] - count], [count], DEVICE)
        together = varlen.attend_varlen(torch.cat(q), keys, values, texts, rules)[:count]
        assert torch.equal(varlen.attend_varlen(q[0], keys, values, alone, rules), together)


@pytest.mark.parametrize("family", [*COVERED, "gemma2"])
def test_tokens_in_bf16_are_likeliest_or_nearly_so(family):
    model, given = moved(family), prompts(GIVEN)
    found, _ = written(model, given, Sampling(max_tokens=30), waves=((0, 2), (2, 2), (1, 2)), tokens=100, guessed=0)
    assert model.plainly == (("soft-caps",) if family == "gemma2" else ())
    for prompt, answer in zip(given, found):
        assert max(lost(model, prompt, answer)) < 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_tokens_in_fp32_are_those_of_transformers(family):
    model, given, sampling = moved(family, torch.float32), prompts(GIVEN), Sampling(max_tokens=12)
    right = [write(model, [one], sampling)[0] for one in given]
    assert written(model, given, sampling, waves=((0, 2), (2, 2), (1, 2)), tokens=100)[0] == right


@pytest.mark.parametrize("family", COVERED)
def test_what_is_captured_gives_the_tokens_of_what_is_not(monkeypatch, family):
    monkeypatch.setattr(decoding, "BEFORE", 0)
    # As many as a captured step has rows, so that products round alike.
    model, given, sampling = moved(family), prompts((290, 5, 40, 255)), Sampling(max_tokens=40)
    with monkeypatch.context() as patch:
        patch.setattr(paged, "capturer", lambda device: None)
        right, _ = written(model, given, sampling, guessed=0)
    engine = Engine(model, 8192, guessed=0)
    requests = [engine.add(one, sampling) for one in given]
    engine.run()
    assert [one.written for one in requests] == right and 4 in engine._reader._decoding._made


def test_texts_that_come_and_go_are_captured_by_size(monkeypatch):
    monkeypatch.setattr(decoding, "BEFORE", 0)
    model, given = moved("qwen3"), prompts((290, 5, 40, 255, 256, 1, 9))
    found, engine = written(model, given, Sampling(max_tokens=40), waves=((0, 2), (6, 3), (5, 2)), guessed=0)
    assert {2, 8} <= set(engine._reader._decoding._made)
    for prompt, answer in zip(given, found):
        assert max(lost(model, prompt, answer)) < 0.1


def test_settings_are_followed_on_the_device():
    model, given = moved("qwen3"), prompts((40, 9, 300))
    drawn = {"temperature": 1.2, "seed": 1}
    for settings in (
        drawn, {**drawn, "top_k": 20}, {**drawn, "top_p": 0.7}, {**drawn, "min_p": 0.1, "typical_p": 0.8},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2}, {"logprobs": 3, "prompt_logprobs": True}, {"logit_bias": {7: 2.0}},
    ):  # fmt: skip
        sampling = Sampling(max_tokens=8, **settings)
        found, _ = written(model, given, sampling)
        assert all(len(one) == 8 for one in found) and written(model, given, sampling)[0] == found


def test_a_search_and_an_encoder_decoder_write_on_the_device():
    model, sampling = moved("llama", torch.float32), Sampling(max_tokens=8, beams=3)
    right = search(model, prompts((300, 20)), sampling, 2)
    model.module.to("cpu")
    model.pages, model.plainly = None, None
    assert search(model, prompts((300, 20)), sampling, 2) == right
    for family in ("t5", "bart"):
        here, there = (load_model(str(tiny_model(family)), device=one) for one in ("cpu", str(DEVICE)))
        texts = ["The quick brown fox", "a", "One two three four five"]
        asked = Sampling(max_tokens=10)
        assert [one.ids for one in generate(there, texts, asked)] == [one.ids for one in generate(here, texts, asked)]


def test_a_model_of_a_device_says_its_way():
    model = moved("qwen3")
    assert writes_by_pages(model) and model.plainly == ()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device alone shares nothing")
def test_two_devices_share_a_model():
    asked = [
        "-m",
        "luthier",
        "generate",
        str(tiny_model("qwen3")),
        "The quick brown fox",
        "--raw",
        "--execution",
        "model",
    ]
    alone = subprocess.run([sys.executable, *asked], capture_output=True, text=True, timeout=300)
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    shared = subprocess.run([sys.executable, *start, *asked], capture_output=True, text=True, timeout=300)
    assert alone.returncode == shared.returncode == 0, shared.stderr
    assert shared.stdout == alone.stdout != ""
