"""Translations by beam search over HTTP: those of transformers' own generate."""

import httpx
import pytest
import torch

from crossed import crossed, made
from luthier.engine.crossed import opening_of
from luthier.models.load import load_model
from running import Running

TEXTS = ["The quick brown fox", "one two three"]
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    models = [f"{family}={made(family)}" for family in ("marian", "mbart", "t5")]
    running = Running(*models, "--streams", "4", runs=tmp_path_factory.mktemp("runs"))
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize("family", ["marian", "mbart", "t5"])
@pytest.mark.parametrize("penalty", [None, 0.2])
def test_answers_are_those_of_generate_with_as_many_beams(served, family, penalty):
    asked = {"model": family, "prompt": TEXTS, "n": 3, "max_tokens": 10, "use_beam_search": True}
    answer = httpx.post(served.url + PATH, json={**asked, "length_penalty": penalty}, timeout=60)
    assert answer.status_code == 200, answer.text
    model, right = crossed(family), []
    for text in TEXTS:
        ids = torch.tensor([model.renderer.framed_ids(text)])
        rows = model.module.generate(
            ids, num_beams=3, num_return_sequences=3, max_new_tokens=10 + len(opening_of(model)) - 1, do_sample=False,
            length_penalty=1.0 if penalty is None else penalty, forced_eos_token_id=None,
        )  # fmt: skip
        right += model.tokenizer.batch_decode(rows[:, len(opening_of(model)) :], skip_special_tokens=True)
    assert [one["text"] for one in answer.json()["choices"]] == right


def test_a_chat_is_searched_too_and_what_does_not_fit_is_refused_with_the_numbers(served):
    turns = [{"role": "user", "content": TEXTS[0]}]
    asked = {"model": "marian", "messages": turns, "n": 2, "max_tokens": 10, "use_beam_search": True}
    chat = httpx.post(f"{served.url}/v1/chat/completions", json=asked, timeout=60).json()["choices"]
    plain = {name: value for name, value in asked.items() if name != "messages"} | {"prompt": TEXTS[0]}
    texts = httpx.post(served.url + PATH, json=plain, timeout=60).json()["choices"]
    assert [one["message"]["content"] for one in chat] == [one["text"] for one in texts]
    answer = httpx.post(served.url + PATH, json={**plain, "n": 100}, timeout=60)
    size = len(load_model(made("marian")).renderer.framed_ids(TEXTS[0]))
    said = answer.json()["error"]["message"]
    assert answer.status_code == 400 and f"100 beams for a prompt of {size} tokens with 10 to write hold" in said
    assert "3200 tokens" in said and "are kept in all; set n or max_tokens lower" in said
