"""The tune verb from the outside, on tiny models of every family: it learns a few rows, and what it saves is what it had."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, DataError, LuthierError, ModelError, RunError, TrainingError
from luthier.core.run import read_record
from luthier.models.load import load_model
from luthier.verbs.tune import Tune, tune, tune_model
from tiny import ALL_FAMILIES, kind_of, tiny_model

SPAM = ["win a prize now", "free cash call now", "claim your free prize", "cash prize win win"]
HAM = ["see you at seven", "call me when home", "are you at the station", "lunch at noon then"]
LABELLED = [{"text": text, "label": "spam"} for text in SPAM] + [{"text": text, "label": "ham"} for text in HAM]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:8]}]} for text in SPAM + HAM
]
PAIRS = [{"source": text, "target": text[::-1][:10]} for text in SPAM + HAM]
TEXTS = [{"text": text} for text in SPAM + HAM]
SCORED = [{"text": text, "score": len(text) / 7} for text in SPAM + HAM]
NO_SPLIT = {"split": {"validation": 0.0}}
QUICK = {"steps": 20, "learning_rate": 1e-2, "batch_size": 8, "baselines": False, "schedule": "constant"}


def losses(events: list[dict]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_learns_its_natural_task_and_reloads(family, runs):
    kind = kind_of(family)
    rows, objective = {
        "decoder": (CHATS, "sft"),
        "encoder": (TEXTS, "pretrain"),
        "encoder-decoder": (PAIRS, "seq2seq"),
    }[kind]
    events: list[dict] = []
    asked = resolve(
        Tune,
        values={
            "model": str(tiny_model(family)),
            "data": {"train": rows, **NO_SPLIT},
            "objective": objective,
            "name": "one",
            **QUICK,
        },
    )
    record, model = tune_model(asked, sinks=[events.append])
    seen = losses(events)
    assert record.state == "finished" and len(seen) == QUICK["steps"]
    assert seen[-1] < (0.9 if kind == "encoder" else 0.6) * seen[0]
    again = load_model("run:one")
    ids = {"input_ids": torch.arange(5, 15)[None]}
    if kind == "encoder-decoder":
        ids["decoder_input_ids"] = torch.arange(3, 8)[None]
    with torch.no_grad():
        assert torch.equal(model.module.eval()(**ids).logits, again.module(**ids).logits)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("objective", ["classify", "regress"])
def test_every_family_classifies_and_regresses(family, objective, runs):
    rows = LABELLED if objective == "classify" else SCORED
    events: list[dict] = []
    values = {
        "model": str(tiny_model(family)),
        "data": {"train": rows, **NO_SPLIT},
        "objective": objective,
        "name": "one",
        **QUICK,
    }
    _, model = tune_model(resolve(Tune, values=values), sinks=[events.append])
    seen = losses(events)
    assert seen[-1] < 0.5 * seen[0]
    again = load_model("run:one")
    ids, mask = torch.arange(5, 15)[None], torch.ones(1, 10, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(model.module(ids, mask), again.module(ids, mask))
    assert again.spec.labels == (("ham", "spam") if objective == "classify" else ())


@pytest.mark.parametrize("adapter", ["lora", "freeze"])
def test_adapters_learn_and_leave_the_rest_alone(adapter, runs):
    base = load_model(str(tiny_model("llama")))
    values = {
        "model": str(tiny_model("llama")),
        "data": {"train": CHATS, **NO_SPLIT},
        "adapter": adapter,
        "name": "one",
        **QUICK,
        "steps": 120,
        "learning_rate": 1e-2,
    }
    events: list[dict] = []
    _, model = tune_model(resolve(Tune, values=values), sinks=[events.append])
    assert losses(events)[-1] < 0.9 * losses(events)[0]
    assert torch.equal(base.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight)
    again = load_model("run:one")
    with torch.no_grad():
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(model.module(input_ids=ids).logits, again.module(input_ids=ids).logits)


def test_the_run_holds_everything(runs):
    rows = LABELLED * 1
    values = {
        "model": str(tiny_model("bert")),
        "data": {
            "train": rows,
            "validation": LABELLED[2:6],
            "test": [{"text": t + " ok", "label": "spam"} for t in SPAM]
            + [{"text": t + " ok", "label": "ham"} for t in HAM],
        },
        "name": "whole",
        "epochs": 5,
    }
    record = tune(**values)
    path = runs / "whole"
    assert record == read_record(path)
    assert record.metrics["accuracy"].n == 8 and record.metrics["macro_f1"].low <= record.metrics["macro_f1"].value
    assert set(record.baselines) == {"majority", "tfidf"}
    assert "objective" in record.choices and "loss" in record.choices and "learning_rate" in record.choices
    predictions = [json.loads(line) for line in (path / "artefacts/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 8 and all(abs(sum(one["probabilities"].values()) - 1) < 1e-5 for one in predictions)
    for name in (
        "config.yaml",
        "resolved.yaml",
        "events.jsonl",
        "report.html",
        "artefacts/details.json",
        "artefacts/profile.json",
    ):
        assert (path / name).stat().st_size > 0, name
    assert not list((path / "checkpoints").glob("step-*")), "finished runs keep the model, not its checkpoints"


def test_early_stopping_keeps_the_best(runs):
    noise = [{"text": text, "label": label} for text, label in zip(SPAM + HAM, ["ham", "spam"] * 4)]
    values = {
        "model": str(tiny_model("bert")),
        "data": {"train": LABELLED, "validation": noise},
        "steps": 60,
        "validate_every": 2,
        "patience": 3,
        "batch_size": 4,
        "baselines": False,
    }
    record = tune(**values)
    assert record.numbers["stopped_early"] and record.numbers["steps"] < 60
    assert "stop" in record.choices and record.numbers["best_step"] < record.numbers["steps"]


SLOW = """
import sys, time
from luthier.models.lean import import_lean
import_lean()
from luthier.core.config import resolve
from luthier.verbs.tune import Tune, tune
import torch
torch.set_num_threads(1)
def slow(event):
    if event["event"] == "step":
        print(event["step"], flush=True)
        time.sleep(0.1)
try:
    tune(resolve(Tune, file=sys.argv[1]), sinks=[slow])
except KeyboardInterrupt:
    sys.exit(130)
"""


STEPS = 24


def write_config(folder: Path, name: str) -> Path:
    data = folder / "chats.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in CHATS * 3))
    config = folder / f"{name}.yaml"
    model = tiny_model("llama")
    config.write_text(
        f"model: {model}\ndata: {{train: {data}, split: {{validation: 0.25}}}}\nobjective: sft\nsteps: {STEPS}\nname: {name}\n"
        "learning_rate: 0.003\nbatch_size: 4\nvalidate_every: 6\ncheckpoint_every: 3\nbaselines: false\nlog: x\n".replace(
            "log: x\n", ""
        )
    )
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of a run that nothing stops."""
    place = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUNS", str(place / "runs"))
        tune(resolve(Tune, file=write_config(place, "straight")))
        return load_model("run:straight").module.state_dict()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_end(number, straight, runs, tmp_path):
    config = write_config(tmp_path, "broken")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(config)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    for line in process.stdout:
        if int(line) == 11:
            process.send_signal(number)
            break
    process.stdout.close()
    code = process.wait(timeout=60)
    assert code == (-9 if number == signal.SIGKILL else 130)
    state = read_record(runs / "broken").state
    assert state == ("running" if number == signal.SIGKILL else "interrupted")
    record = tune(resume="run:broken")
    assert record.state == "finished" and record.numbers["steps"] == STEPS
    found = load_model("run:broken").module.state_dict()
    assert found.keys() == straight.keys()
    for name, mine in straight.items():
        assert torch.equal(mine, found[name]), name
    with pytest.raises(RunError, match="finished"):
        tune(resume="run:broken")


BAD = [
    ({"data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
    ({"data": {"train": LABELLED, "columns": {"text": "txet"}}}, DataError, "txet"),
    ({"data": {"train": [{"text": "a b", "label": "x"}, {"text": "c d", "label": "x"}], **NO_SPLIT}}, DataError, "'x'"),
    ({"objective": "clasify"}, ConfigError, "did you mean 'classify'"),
    ({"data": {"train": [*LABELLED, {"text": "word " * 400, "label": "ham"}], **NO_SPLIT}}, DataError, "truncate"),
    ({"model": "no/such-model-here"}, ModelError, "no/such-model-here"),
    ({"learning_rate": 1e3, "optimizer": {"kind": "sgd"}, "clip": 0, "steps": 50}, TrainingError, "rows of this batch"),
    ({"data": {"train": LABELLED, "test": [{"text": "new one", "label": "eggs"}]}}, DataError, "eggs"),
    ({"objective": {"kind": "classify", "loss": "mse"}}, ConfigError, "is for numbers"),
    ({"objective": "sft"}, DataError, "learns from"),
    ({"objective": "regress"}, DataError, "number"),
]


@pytest.mark.parametrize(("change", "error", "part"), BAD)
def test_bad_input_is_one_sentence(change, error, part, runs, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    values = {
        "model": str(tiny_model("bert")),
        "data": {"train": LABELLED, **NO_SPLIT},
        "name": "bad",
        "steps": 2,
        "baselines": False,
    }
    with pytest.raises(error) as caught:
        tune(**(values | change))
    assert part in str(caught.value) and "\n" not in str(caught.value) and isinstance(caught.value, LuthierError)
    left = runs / "bad"
    assert not left.exists() or read_record(left).state == "failed", "a refused request leaves no directory behind"


def test_dry_run_decides_everything_and_writes_nothing(runs):
    from luthier.verbs.tune import plan

    asked = resolve(Tune, values={"model": str(tiny_model("llama")), "data": {"train": CHATS, **NO_SPLIT}})
    found = plan(asked)
    assert found["settings"]["learning_rate"]["origin"] == "advised" and found["steps"] > 0
    assert found["memory_bytes"]["total"] > 0 and not runs.exists()


def test_a_full_disk_while_saving_keeps_the_checkpoints(runs, monkeypatch):
    import luthier.models.save

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    values = {
        "model": str(tiny_model("llama")),
        "data": {"train": CHATS, **NO_SPLIT},
        "name": "full",
        "steps": 4,
        "baselines": False,
    }
    with monkeypatch.context() as patch:
        patch.setattr(luthier.models.save, "save_model", fail)
        with pytest.raises(RunError, match=r"No space left on device.*--resume run:full"):
            tune(**values)
    assert list((runs / "full" / "checkpoints").glob("step-*"))


def test_seconds_are_not_lost(runs):
    started = time.monotonic()
    record = tune(model=str(tiny_model("llama")), data={"train": CHATS, **NO_SPLIT}, steps=2, baselines=False)
    assert 0 < record.seconds <= time.monotonic() - started + 0.1
