"""Several processes give what one gives. The first of them is the test itself; each test starts the second."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, TrainingError
from luthier.core.events import read_events
from luthier.core.run import read_record
from luthier.models.load import load_model
from luthier.training.checkpoint import Checkpoints
from luthier.verbs.tune import Tune, fine_tune, tune, tune_model
from tiny import tiny_model

# Ten rows in steps of three: in the last step of an epoch one process has none.
TEXTS = ["win a prize now", "free cash call now", "claim your free prize", "cash prize win win", "see you at seven",
         "call me when home", "are you at the station", "lunch at noon then", "a", "b c d"]  # fmt: skip
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:8]}]} for text in TEXTS
]
BASE = {
    "steps": 6,
    "batch_size": 3,
    "learning_rate": 5e-3,
    "schedule": "constant",
    "baselines": False,
    "validate_every": 2,
}
pytestmark = pytest.mark.usefixtures("cache")


def learn(name: str, *sinks, **settings):
    rows = Path(os.environ["LUTHIER_RUNS"]).with_name("rows.jsonl")
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    held = rows.with_name("held.jsonl")
    held.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS[:3]), encoding="utf-8")
    data = {"train": str(rows), "validation": str(held)}
    values = {"model": str(tiny_model("llama")), "data": data, **BASE, "name": name, **settings}
    return tune_model(resolve(Tune, values=values), sinks=sinks)[1]


def seen(run: Path, kind: str = "step") -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == kind]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.module.named_parameters()}


def test_two_processes_give_what_one_gives(runs):
    # At this rate the validation soon gets no better, and both stop early.
    settings = {
        "adapter": {"kind": "lora", "rank": 4},
        "accumulate": 2,
        "steps": 12,
        "learning_rate": 0.3,
        "patience": 1,
    }
    one = learn("one", **settings)
    two = learn("two", processes=2, **settings)
    assert seen(runs / "two") == pytest.approx(seen(runs / "one"), rel=1e-6)
    assert seen(runs / "two", "validate") == pytest.approx(seen(runs / "one", "validate"), rel=1e-6)
    assert read_record(runs / "one").numbers["stopped_early"] and len(seen(runs / "two")) < 12
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-5)
    assert read_record(runs / "two").state == "finished" and not dist.is_initialized()
    assert torch.equal(weights(load_model("run:two"))["model.norm.weight"], weights(two)["model.norm.weight"])


def test_sharded_stops_and_goes_on_with_another_number_of_processes(runs):
    def stop_at(step: int):
        def sink(event):
            if event["event"] == "step" and event["step"] == step:
                os.kill(os.getpid(), signal.SIGINT)

        return sink

    # With its usual eps Adam makes a whole step of a gradient that is all rounding.
    adam = {"optimizer": {"kind": "adamw", "eps": 1e-5}}
    one = learn("one", **adam)
    with pytest.raises(KeyboardInterrupt, match="--resume run:parts"):
        learn("parts", stop_at(2), processes=2, sharding="full", **adam)
    path = runs / "parts"
    found = sorted(file.name for file in (path / "checkpoints" / "step-00000002").iterdir())
    assert found == ["manifest.json", "rank-0000-of-0002.safetensors", "rank-0001-of-0002.safetensors", "state.pt"]
    with pytest.raises(KeyboardInterrupt):
        tune(resume="run:parts", processes=1, sinks=[stop_at(4)])
    assert tune(resume="run:parts", processes=2).state == "finished"
    assert seen(path) == pytest.approx(seen(runs / "one"), rel=1e-5)
    torch.testing.assert_close(weights(load_model("run:parts")), weights(one), rtol=1e-5, atol=2e-6)


def test_a_process_that_dies_ends_the_run(runs):
    def kill(event):
        if event["event"] == "step" and event["step"] == 2:
            os.kill(next(child for child in children() if b"luthier.verbs.launch" in command(child)), signal.SIGKILL)

    with pytest.raises(TrainingError, match="process 1 of 2 was killed by SIGKILL"):
        learn("dies", kill, processes=2)
    record = read_record(runs / "dies")
    assert record.state == "failed" and "SIGKILL" in (record.error or "")
    assert not [child for child in children() if b"luthier.verbs.launch" in command(child)]


# Whether a started process still can import little: the parts of its request import transformers whole.
FOLLOW = """
import sys
import luthier.models.lean as lean
import_lean = lean.import_lean
lean.import_lean = lambda: sys.exit(0 if import_lean() else 7)
from luthier.verbs.launch import follow
follow()
"""


def test_a_started_process_imports_as_little_as_a_command():
    asked = resolve(Tune, values={"model": "mini", "data": "sms_spam", "adapter": {"kind": "lora"}})
    request, paths = pickle.dumps((asked, None)), {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", FOLLOW], input=request, env={**os.environ, **paths}, check=False)
    assert done.returncode == 0


def test_a_sharded_model_is_read_once_and_made_whole_to_write(runs):
    objective = {"kind": "grpo", "rewards": {"kind": "length", "tokens": 3}, "samples": 2, "max_tokens": 5, "beta": 0.1}
    # One row a step: the other process has none, and takes part all the same.
    settings = {
        "objective": objective,
        "optimizer": {"kind": "adamw", "eps": 1e-4},
        "steps": 3,
        "batch_size": 1,
        "ema": 0.5,
    }
    one = learn("one", **settings)
    two = learn("two", processes=2, sharding="full", **settings)
    assert seen(runs / "two") == pytest.approx(seen(runs / "one"), rel=1e-6, abs=1e-6)
    assert seen(runs / "two", "validate") == pytest.approx(seen(runs / "one", "validate"), rel=1e-6)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-5)
    assert read_record(runs / "two").choices["weights read by"].startswith("the first process")


@pytest.mark.e2e
def test_a_first_process_that_is_killed_leaves_no_other_and_a_run_that_goes_on(runs, tmp_path):
    settings = {"processes": 2, "sharding": "full", "checkpoint_every": 1, "optimizer": {"kind": "adamw", "eps": 1e-5}}
    one = learn("one", optimizer=settings["optimizer"])
    data = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "held.jsonl")}
    asked = {"model": str(tiny_model("llama")), "data": data, **BASE, "name": "killed", **settings}
    script = "import json, os, signal, sys\nfrom luthier.verbs.tune import tune\n"
    script += "def kill(event):\n    if event['event'] == 'step' and event['step'] == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "tune(**json.loads(sys.argv[1]), sinks=[kill])"
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.Popen([sys.executable, "-c", script, json.dumps(asked)], env={**os.environ, **paths})
    assert done.wait(timeout=100) == -signal.SIGKILL
    until = time.monotonic() + 20
    while others := [one for one in Path("/proc").glob("[0-9]*") if follows(one, tmp_path)]:
        assert time.monotonic() < until, others
        time.sleep(0.1)
    assert read_record(runs / "killed").state == "running"
    assert tune(resume="run:killed").state == "finished"
    assert seen(runs / "killed")[-2:] == pytest.approx(seen(runs / "one")[-2:], rel=1e-5)
    torch.testing.assert_close(weights(load_model("run:killed")), weights(one), rtol=1e-5, atol=2e-6)


def follows(process: Path, place: Path) -> bool:
    """Whether it is a process that another one started for a tuning in `place`."""
    try:
        return (
            b"luthier.verbs.launch" in (process / "cmdline").read_bytes()
            and str(place).encode() in (process / "environ").read_bytes()
        )
    except OSError:
        return False  # it has ended meanwhile


def children() -> list[int]:
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_a_loaded_model_stays_in_its_process():
    model = load_model(str(tiny_model("llama")))
    with pytest.raises(ConfigError, match="cannot be handed to other processes"):
        fine_tune(model.module, model.tokenizer, CHATS, processes=2, steps=1)


def test_resuming_takes_no_other_setting():
    with pytest.raises(ConfigError, match="exactly as it was asked for"):
        tune(resume="run:none", processes=2, steps=3)


def test_checkpoints_of_one_process_are_what_they_were(tmp_path):
    path = Checkpoints(tmp_path).save("step-00000001", {"w": torch.ones(2)}, {"step": 1})
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.pt", "weights.safetensors"]
