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


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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

            assert len(children(running.process.pid)) == 1
            plain = say("mini")
            own = {name: generate(load_model(str(place)), ["Once upon a time"], Sampling(max_tokens=24))[0].text
                   for name, place in (("red", red), ("blue", blue))}  # fmt: skip
            assert say("red") == own["red"] != plain
            admin = f"{running.url}/admin/models"
            made = httpx.post(admin, json={"source": str(blue), "name": "blue"}, timeout=60).json()
            assert made["parent"] == "mini" and say("blue") == own["blue"] and say("mini") == plain
            assert len(children(running.process.pid)) == 1
            # What cannot be added layer by layer gets a process of its own.
            other = httpx.post(admin, json={"source": str(green), "name": "green"}, timeout=60).json()
            assert other["parent"] is None and len(children(running.process.pid)) == 2 and say("green")
            assert httpx.delete(f"{admin}/green", timeout=60).status_code == 200
            assert httpx.delete(f"{admin}/mini", timeout=60).status_code == 409
            assert httpx.delete(f"{admin}/blue", timeout=60).status_code == 200
            with pytest.raises(openai.NotFoundError):
                say("blue")
            # An engine that is started again has them again.
            (killed,) = children(running.process.pid)
            os.kill(killed, signal.SIGKILL)
            while children(running.process.pid) in ([], [killed]):
                assert httpx.get(f"{running.url}/health/live", timeout=60).status_code == 200
            while httpx.get(f"{running.url}/health/ready", timeout=60).status_code != 200:
                pass
            assert say("red") == own["red"]
    finally:
        assert running.stop() == 0
