"""A model shared out over two real processes that write together: the tokens of one process, said once."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from luthier.core.errors import LuthierError, ModelError
from luthier.models.load import load_model
from luthier.models.parallel import check_shared
from luthier.training.world import World
from luthier.verbs.generate import Generate, answer_texts, generate
from luthier.verbs.together import join_writers
from tiny import tiny_model

FAMILIES = ("llama", "qwen3", "gemma", "mistral")
TEXTS = [
    "The quick brown",
    "One two three four five six seven eight nine ten",
    "a",
    "Win a free prize now!",
    "房间很干净",
]
WHOLE = {"raw": True, "batch_size": 3, "execution": "model"}
CASES = {
    **{family: {"model": family, "sampling": {"max_tokens": 10}} for family in FAMILIES},
    "drawn": {"model": "qwen3", "sampling": {"max_tokens": 8, "temperature": 1.3, "seed": 5, "n": 2}},
    "beams": {"model": "llama", "sampling": {"max_tokens": 6, "beams": 3}},
    "logs": {"model": "llama", "sampling": {"max_tokens": 6, "logprobs": 2, "repetition_penalty": 1.3}},
}
# Each is refused in both processes.
REFUSED = {
    "gpt2": ({"model": "gpt2"}, "2 processes cannot share it: transformers has no plan for gpt2 models"),
    "t5": ({"model": "t5"}, "only a decoder-only language model is shared out"),
    "heads": ({"model": "odd"}, "it has 1 heads of keys and values; start so many processes"),
    "int8": ({"model": "llama", "execution": "int8"}, "execution: int8 is for one process, and 2 share the model"),
    "labels": ({"model": "llama", "labels": ["x", "y"]}, "labels: 2 processes that share a model only write"),
    "draft": ({"model": "llama", "draft": "llama"}, "draft: 2 processes that share a model only write"),
}

PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from luthier.core.errors import LuthierError
from luthier.verbs.generate import Generate, answer_texts, generate

work = json.loads(Path(sys.argv[1]).read_text())
place, rank = Path(sys.argv[1]).parent, sys.argv[2]
made = lambda case: {**work["whole"], **case, "model": work["places"][case["model"]]}
found = {}
for name, case in work["cases"].items():
    found[name] = generate(input=work["input"], **made(case))
found["output"] = generate(input=work["input"], output=str(place / "out.jsonl"), **made(work["cases"]["llama"]))
found["again"] = generate(input=work["input"], output=str(place / "out.jsonl"), **made(work["cases"]["llama"]))
chance = {"model": "llama", "sampling": {"max_tokens": 8, "temperature": 1.5}}
found["chance"] = [generate(input=work["input"], **made(chance)) for _ in range(2)]
pieces = []
found["prompt"] = generate(prompt="One two", on_text=pieces.append, **made(work["cases"]["llama"]))
found["pieces"] = pieces
# What is piped in reaches the first process alone.
piped = Generate.make(made(work["cases"]["llama"]))
found["piped"] = answer_texts(piped, work["texts"] if rank == "0" else [])
events = []
generate(prompt="a", sinks=[events.append], **made(work["cases"]["llama"]))
found["said"] = {one["name"]: one["value"] for one in events if one["event"] == "choice"}
for name, case in work["refused"].items():
    case = {**case, "draft": work["places"][case["draft"]]} if "draft" in case else case
    try:
        generate(prompt="a", **{**made(case), **({} if "execution" in case else {"execution": "auto"})})
    except LuthierError as err:
        found[name] = str(err)
(place / f"found-{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where the models lie: those of the families, and one whose heads share all keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    odd = tmp_path_factory.mktemp("odd")
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    config.num_key_value_heads = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(odd)
    load_model(str(tiny_model("llama"))).tokenizer.save_pretrained(odd)
    return {**{name: str(tiny_model(name)) for name in (*FAMILIES, "gpt2", "t5")}, "odd": str(odd)}


@pytest.fixture(scope="module")
def found(tmp_path_factory, places):
    """What each of two processes found, and where."""
    place = tmp_path_factory.mktemp("together")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"row {at}", "text": text}) + "\n" for at, text in enumerate(TEXTS)))
    refused = {name: case for name, (case, _) in REFUSED.items()}
    work = {
        "places": places, "cases": CASES, "refused": refused, "input": str(rows), "whole": WHOLE, "texts": TEXTS,
    }  # fmt: skip
    (place / "work.json").write_text(json.dumps(work))
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # There may be one device here, or none.
    where |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(place / "work.json"), str(rank)],
            env={**os.environ, **where, **paths, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=300)[0].decode() for one in started]
    assert [one.returncode for one in started] == [0, 0], "\n".join(said)
    return place, rows, [json.loads((place / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_those_of_one_process(found, places, name):
    _, rows, (first, second) = found
    case = CASES[name]
    right = generate(input=str(rows), **{**WHOLE, **case, "model": places[case["model"]]})
    if name == "logs":
        for one, other in zip(right, first[name]):
            assert one["output"] == other["output"]
            for token, same in zip(one["logprobs"], other["logprobs"]):
                assert token["id"] == same["id"] and abs(token["raw"] - same["raw"]) < 1e-4
    else:
        assert first[name] == right
    assert second[name] == first[name]


def test_the_first_process_alone_writes_and_both_go_on_after_what_stands_there(found):
    place, _, (first, second) = found
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert lines == first["output"] == second["output"] == first["llama"]
    assert first["again"] == second["again"] == []


def test_chance_is_the_same_in_both_and_another_each_time(found):
    _, _, (first, second) = found
    assert first["chance"] == second["chance"] and first["chance"][0] != first["chance"][1]


def test_prompts_pipes_and_choices(found, places):
    _, _, (first, second) = found
    whole = {**WHOLE, "model": places["llama"], "sampling": CASES["llama"]["sampling"]}
    right = generate(prompt="One two", **whole)[0]["output"]
    assert first["prompt"] == second["prompt"] == [{"id": "prompt", "output": right}]
    assert "".join(first["pieces"]) == first["prompt"][0]["output"]
    assert first["piped"] == second["piped"] == answer_texts(Generate.make(whole), TEXTS)
    assert first["said"]["processes"] == "2" and first["said"]["engine"] == "paged" and "native" not in first["said"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_out_is_refused_in_a_sentence(found, name):
    _, _, (first, second) = found
    assert REFUSED[name][1] in first[name] and second[name] == first[name]


def test_an_adapter_is_not_shared_out():
    config = load_model(str(tiny_model("llama"))).module.config
    with pytest.raises(ModelError, match="merge the adapter"):
        check_shared("x", config, 2, writes=True, whole=False)
    check_shared("x", config, 2, writes=True, whole=True)
    with pytest.raises(LuthierError, match="4 heads; start so many"):
        check_shared("x", config, 3, writes=True, whole=True)


def test_a_process_that_is_gone_is_said_as_such(monkeypatch):
    world = World(0, 2, store=dist.HashStore())
    monkeypatch.setattr("luthier.training.world.GRACE", 0.1)
    monkeypatch.setattr("luthier.training.meeting.find_world", lambda: world)
    monkeypatch.setattr("luthier.verbs.together.is_started", lambda: True)
    monkeypatch.setattr(World, "begin", lambda self, device: None)
    with (
        pytest.raises(ModelError, match="one of the 2 processes that share the model is gone"),
        join_writers(Generate()),
    ):
        raise RuntimeError("[gloo] Connection closed by peer")
    with pytest.raises(ZeroDivisionError), join_writers(Generate()):
        raise ZeroDivisionError  # what is a bug stays one
