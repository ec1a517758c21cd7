"""Labels that a language model chooses, and answers that beams find, over HTTP: those of the engine in this process."""

import httpx
import openai
import pytest

from luthier.core.events import Events
from luthier.data.turns import read_messages
from luthier.engine.generate import choose_engine, generate
from luthier.engine.labelling import Labelling
from luthier.engine.labels import Labeller
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model

LABELS = ["animal", "money", "weather"]
TEXTS = ["The fox sleeps in the barn.", "Interest rates rose again.", "It rains in the north."]
SHOTS = [("The dog barks.", "animal"), ("He pays with coins.", "money")]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def mini():
    model = load_model("mini", as_stored=True)
    choose_engine(model, Sampling(), "auto", Events())
    return model


def classify(served, **body):
    return httpx.post(f"{served.url}/v1/classify", json={"model": "mini", **body})


def test_labels_are_those_of_the_labeller(served, mini):
    shots = [{"text": text, "label": label} for text, label in SHOTS]
    for given, labelling in (
        ({}, Labelling()),
        (
            {"instruction": "What is it about?", "calibrate": True},
            Labelling(instruction="What is it about?", calibrate=True),
        ),
        ({"shots": shots, "per_token": True}, Labelling(per_token=True)),
        ({"raw": True}, Labelling()),
    ):
        answer = classify(served, input=TEXTS * 4, labels=LABELS, **given)
        assert answer.status_code == 200, answer.text
        own = Labeller(mini, LABELS, labelling, shots=SHOTS if "shots" in given else (), raw="raw" in given).predict(
            [(str(at), text) for at, text in enumerate(TEXTS * 4)]
        )
        for one, other in zip(answer.json()["data"], own, strict=True):
            assert one["label"] == other.output
            assert one["probabilities"] == pytest.approx(other.probabilities, abs=1e-5)
            assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert answer.json()["usage"]["prompt_tokens"] > 12 * 5


def test_a_conversation_is_labelled(served, mini):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[0]}]
    answer = classify(served, messages=turns, labels=LABELS).json()["data"]
    own = Labeller(mini, LABELS).predict([("one", read_messages(turns, "one"))])
    assert len(answer) == 1 and answer[0]["probabilities"] == pytest.approx(own[0].probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"input": "a"}, "name the labels that it chooses among"),
        ({"input": "a", "labels": ["one"]}, "labels"),
        ({"input": "a", "labels": ["one", "one"]}, "stands there twice"),
        ({"input": "a", "labels": ["one", " "]}, "a label is empty"),
        ({"input": "a", "instruction": "?"}, "instruction goes with labels"),
        ({"labels": LABELS}, "give input"),
        ({"input": [["a", "b"]], "labels": LABELS}, "one text at a time"),
        ({"input": "a", "labels": LABELS, "shots": [{"text": "b", "label": "other"}]}, "is not among the labels"),
        ({"input": "word " * 3000, "labels": LABELS}, "do not fit"),
    ],
)
def test_what_cannot_be_labelled_is_said(served, body, why):
    answer = classify(served, **body)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text


def test_beams_are_those_of_the_engine(client, mini):
    turns = [{"role": "user", "content": "Tell me about foxes."}]
    more = {"use_beam_search": True, "length_penalty": 0.5}
    found = client.chat.completions.create(model="mini", messages=turns, max_tokens=16, n=4, extra_body=more)
    sampling = Sampling(max_tokens=16, beams=4, n=4, length_penalty=0.5)
    own = generate(mini, [read_messages(turns, "one")], sampling)[0]
    assert [one.message.content for one in found.choices] == [one.text for one in (own, *own.others)]
    assert len({one.message.content for one in found.choices}) == 4
    assert found.usage.completion_tokens == sum(len(one.ids) for one in (own, *own.others))
    texts = client.completions.create(
        model="mini",
        prompt=["The fox", "A bird"],
        max_tokens=8,
        n=2,
        temperature=0,
        extra_body={"use_beam_search": True},
    )
    plain = generate(mini, ["The fox", "A bird"], Sampling(max_tokens=8, beams=2, n=2), raw=True)
    assert [one.text for one in texts.choices] == [one.text for each in plain for one in (each, *each.others)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"stream": True, "n": 2}, "cannot be streamed"),
        ({"n": 2, "temperature": 0.7}, "choose one of the two"),
        ({"n": 2, "logprobs": True}, "not given for a beam search"),
        ({"n": 2, "response_format": {"type": "json_object"}}, "do not go together"),
        ({"n": 128, "max_tokens": 400}, "set n or max_tokens lower"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "needs use_beam_search"),
    ],
)
def test_what_beams_cannot_do_is_said(served, body, why):
    turns = [{"role": "user", "content": "Hello"}]
    asked = {"model": "mini", "messages": turns, "max_tokens": 8, "use_beam_search": True, **body}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=asked)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text
