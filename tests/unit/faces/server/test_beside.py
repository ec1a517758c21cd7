"""Adapters beside a served base: models of their own, in its process."""

import os
import signal
from pathlib import Path

import httpx
import openai
import pytest
import torch

from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.faces.server.beside import base_of, same_model
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.save import save_model
from running import Running

TURNS = [{"role": "user", "content": "Once upon a time"}]


def make_adapter(place: Path, seed: int, kind: str = "lora") -> Path:
    """A drawn adapter of `mini`."""
    torch.manual_seed(seed)
    model = load_model("mini")
    ADAPTERS.parse({"kind": kind, "rank": 4}).apply(model)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "lora_b" in name.lower():
                weight.normal_(std=0.2)
    save_model(model, place)
    return place


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / name, seed, kind) for seed, (name, kind) in enumerate(
        (("red", "lora"), ("blue", "lora"), ("green", "dora")))]  # fmt: skip


def test_a_base_is_known_from_files(places):
    assert base_of("mini") is None and base_of("./nowhere") is None
    base = base_of(str(places[0]))
    assert base is not None and same_model(base, "mini") and not same_model(base, str(places[0]))


def test_adapters_are_models_beside_their_base(places, tmp_path):
    red, blue, green = places
    running = Running("mini", f"red={red}", "--execution", "model", runs=tmp_path)
    try:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

            def say(model):
                found = client.chat.completions.create(model=model, messages=TURNS, max_tokens=24, temperature=0)
                return found.choices[0].message.content

            assert len(running.engines()) == 1
            plain = say("mini")
            # A mistake is told of the model that was asked for, not of the base.
            for path, body, why in (
                ("/v1/classify", {"input": "a"}, "labels: red is a language model and has none of its own"),
                ("/v1/score", {"text_1": "a", "text_2": "b"}, "model: red is a language model, and nothing says"),
            ):
                wrong = httpx.post(running.url + path, json={"model": "red", **body}, timeout=60)
                assert wrong.status_code == 400 and wrong.json()["error"]["message"].startswith(why), wrong.text
            own = {name: generate(load_model(str(place)), ["Once upon a time"], Sampling(max_tokens=24))[0].text
                   for name, place in (("red", red), ("blue", blue))}  # fmt: skip
            assert say("red") == own["red"] != plain
            admin = f"{running.url}/admin/models"
            made = httpx.post(admin, json={"source": str(blue), "name": "blue"}, timeout=60).json()
            assert made["parent"] == "mini" and say("blue") == own["blue"] and say("mini") == plain
            assert len(running.engines()) == 1
            # What cannot be added layer by layer gets a process of its own.
            other = httpx.post(admin, json={"source": str(green), "name": "green"}, timeout=60).json()
            assert other["parent"] is None and len(running.engines()) == 2 and say("green")
            assert httpx.delete(f"{admin}/green", timeout=60).status_code == 200
            assert httpx.delete(f"{admin}/mini", timeout=60).status_code == 409
            assert httpx.delete(f"{admin}/blue", timeout=60).status_code == 200
            with pytest.raises(openai.NotFoundError):
                say("blue")
            # An engine that is started again has them again.
            (killed,) = running.engines()
            os.kill(killed, signal.SIGKILL)
            running.alive_until(lambda: running.engines() != [killed])
            with pytest.raises(openai.InternalServerError, match="red: the engine of mini ended"):
                say("red")
            running.alive_until(lambda: running.engines() not in ([], [killed]))
            running.ready()
            assert say("red") == own["red"]
    finally:
        assert running.stop() == 0


TEXTS = ["The cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]


def asked_for(url, model):
    """All that can be asked of a model that does not draw what it writes."""
    bodies = {
        "/v1/classify": {"input": TEXTS, "labels": ["animals", "money"]},
        "/v1/embeddings": {"input": TEXTS},
        "/v1/score": {"text_1": TEXTS[0], "text_2": TEXTS, "by": "vectors"},
        "/v1/rerank": {"query": TEXTS[0], "documents": TEXTS[::-1], "labels": ["yes", "no"]},
        "/v1/completions": {"prompt": "Once upon", "n": 3, "use_beam_search": True, "max_tokens": 12},
    }
    found = {}
    for path, body in bodies.items():
        answer = httpx.post(url + path, json={"model": model, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        found[path] = answer.json()
    return {
        "labels": torch.tensor([list(one["probabilities"].values()) for one in found["/v1/classify"]["data"]]),
        "vectors": torch.tensor([one["embedding"] for one in found["/v1/embeddings"]["data"]]),
        "scores": torch.tensor([one["score"] for one in found["/v1/score"]["data"]]),
        "ranks": torch.tensor([[one["index"], one["relevance_score"]] for one in found["/v1/rerank"]["results"]]),
        "texts": [one["text"] for one in found["/v1/completions"]["choices"]],
    }


def test_what_an_adapter_is_asked_beside_its_base_is_answered_as_alone(places, tmp_path):
    red = places[0]
    # The first is alone: nothing of its base is served yet.
    models = [f"alone={red}", "mini", f"red={red}", f"blue={places[1]}"]
    running = Running(*models, "--execution", "model", runs=tmp_path)
    try:
        parents = {one["id"]: one["parent"] for one in httpx.get(f"{running.url}/v1/models").json()["data"]}
        assert parents == {"alone": None, "mini": None, "red": "mini", "blue": "mini"}
        alone, beside, base, blue = (asked_for(running.url, name) for name in ("alone", "red", "mini", "blue"))
        assert beside.pop("texts") == alone.pop("texts") != base["texts"]
        for name, own in alone.items():
            torch.testing.assert_close(beside[name], own, atol=2e-4, rtol=1e-4)
        for other in (base, blue):
            assert not torch.allclose(beside["vectors"], other["vectors"], atol=1e-2)
            assert not torch.allclose(beside["labels"], other["labels"], atol=1e-3)
    finally:
        assert running.stop() == 0


def test_with_packed_weights_too(places, tmp_path):
    red = places[0]
    running = Running(f"alone={red}", "mini", runs=tmp_path)
    try:
        before = asked_for(running.url, "mini")
        made = httpx.post(f"{running.url}/admin/models", json={"source": str(red), "name": "red"}, timeout=60).json()
        assert made["parent"] == "mini"
        alone, beside, base = (asked_for(running.url, name) for name in ("alone", "red", "mini"))
        assert all(torch.equal(base[name], before[name]) for name in ("labels", "vectors", "scores"))
        near, far = (torch.nn.functional.cosine_similarity(beside["vectors"], one["vectors"]) for one in (alone, base))
        # Alone what it learned is in the packed weights, beside them it is apart: int8 rounds either.
        assert near.min() > 0.98 and (near > far).all()
        torch.testing.assert_close(beside["labels"], alone["labels"], atol=0.05, rtol=0)
        torch.testing.assert_close(beside["scores"], alone["scores"], atol=0.05, rtol=0)
    finally:
        assert running.stop() == 0
