"""Tuning on several sources, in an order, from a stream: from the command line, and gone on with after a stop."""

import json
import random

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, DataError
from luthier.core.run import read_record
from luthier.faces.cli.main import main
from luthier.models.load import load_model
from luthier.verbs.tune import Tune, tune
from tiny import tiny_model

QUICK = {"batch_size": 4, "learning_rate": 3e-3, "validate_every": 6, "checkpoint_every": 3, "baselines": False}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    chats = [
        [{"role": "user", "content": f"q {at}"}, {"role": "assistant", "content": "a" * draw.randint(1, 30)}]
        for at in range(40)
    ]
    lines = [json.dumps({"messages": turns}) for turns in chats]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    faq = "".join(f"what {at},{'it ' * draw.randint(1, 9)}{at}\n" for at in range(20))
    (tmp_path / "faq.csv").write_text("q,a\n" + faq, encoding="utf-8")
    texts = [json.dumps({"text": f"text {at} " + "and so on " * draw.randint(0, 20)}) for at in range(80)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return tmp_path


def mixture(first, second) -> list[dict]:
    faq = {"source": "faq.csv", "columns": {"prompt": "q", "completion": "a"}}
    return [{"source": "chat.jsonl", "weight": first}, {**faq, "weight": second}]


CASES = {
    "mixed": {"data": {"train": mixture(1, 1)}},
    "moving": {"data": {"train": mixture([1, 0], [0, 1])}},
    "short_first": {"data": "chat.jsonl", "order": "short_first"},
    "competence": {"data": "chat.jsonl", "order": "competence"},
    "given": {"data": "chat.jsonl", "order": "given"},
    "stream": {"data": {"train": "chat.jsonl", "stream": True, "shuffle_buffer": 11}},
    "streams": {"data": {"train": mixture([1, 3], [3, 1]), "stream": True, "shuffle_buffer": 11}},
    "packed": {"data": {"train": "texts.jsonl", "stream": True, "shuffle_buffer": 23}, "objective": "pretrain"},
    "masked": {"data": {"train": "texts.jsonl", "stream": True, "shuffle_buffer": 23}, "objective": "pretrain"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_same_end(case, folder):
    family = "bert" if case == "masked" else "llama"
    values = {"model": str(tiny_model(family)), "steps": 14, **QUICK, **CASES[case]}
    one: list[dict] = []
    tune(resolve(Tune, values={**values, "name": "straight"}), sinks=[one.append])

    def stop(event):
        if event["event"] == "step" and event["step"] == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(resolve(Tune, values={**values, "name": "broken"}), sinks=[stop])
    other: list[dict] = []
    record = tune(resume="run:broken", sinks=[other.append])
    assert record.state == "finished"
    losses = [event["loss"] for event in one if event["event"] == "step"]
    again = [event["loss"] for event in other if event["event"] == "step"]
    assert len(losses) == 14 and again == losses[9:]
    straight, broken = load_model("run:straight"), load_model("run:broken")
    for (name, mine), theirs in zip(straight.module.state_dict().items(), broken.module.state_dict().values()):
        assert torch.equal(mine, theirs), name
    assert read_record(folder / "runs" / "straight").data == record.data


def test_a_mixture_from_the_command_line(folder, capsys):
    flags = ["--model", str(tiny_model("llama")), "--steps", "12", "--batch-size", "5", "--no-baselines"]
    assert main(["tune", *flags, "--name", "one", "--data.train", json.dumps(mixture(2, 1))]) == 0
    record = read_record(folder / "runs" / "one")
    assert record.data["drawn"] == {"chat.jsonl": 40, "faq.csv": 20}
    events = [json.loads(line) for line in (folder / "runs/one/events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert steps[2]["drawn"] == {"chat.jsonl": 10, "faq.csv": 5}
    look = [event for event in events if event["event"] == "validate"][-1]
    # 4 conversations and 2 questions are held out: the loss of all is the mean of both by tokens.
    assert look["loss/chat.jsonl"] != look["loss/faq.csv"]
    low, high = sorted((look["loss/chat.jsonl"], look["loss/faq.csv"]))
    assert low < look["loss"] < high
    assert "loss/faq.csv" in capsys.readouterr().err
    report = (folder / "runs/one/report.html").read_text(encoding="utf-8")
    assert "faq.csv" in report


def test_sources_one_flag_each(folder):
    model = ["--model", str(tiny_model("llama")), "--steps", "3", "--batch-size", "4", "--no-baselines"]
    (folder / "more.jsonl").write_text((folder / "chat.jsonl").read_text().replace("q ", "more "), encoding="utf-8")
    assert main(["tune", *model, "--name", "two", "--data", "chat.jsonl", "--data", "more.jsonl"]) == 0
    record = read_record(folder / "runs" / "two")
    assert record.data["train"] == 72 and sum(record.data["drawn"].values()) == 12
    config = {"model": str(tiny_model("llama")), "data": ["chat.jsonl", "more.jsonl"], "steps": 3, **QUICK}
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["tune", "--name", "three", "run.yaml"]) == 0
    assert read_record(folder / "runs" / "three").data == record.data


def test_a_stream_says_what_it_looked_at(folder, capsys):
    flags = ["--model", str(tiny_model("llama")), "--steps", "14", "--batch-size", "6", "--no-baselines"]
    wide = ["--data", "chat.jsonl", "--data.stream", "true", "--data.shuffle-buffer=20"]
    assert main(["tune", *flags, *wide, "--name", "one"]) == 0
    record = read_record(folder / "runs" / "one")
    assert "20 rows looked at" in record.choices["stream"] and record.data["train"] is None
    assert record.data["passes"] == 2, "84 rows of 38"
    assert record.numbers["train_rows"] is None and record.numbers["validation_rows"] == 2
    assert "first rows of each source" in capsys.readouterr().err


BAD = [
    ({"data": {"train": "chat.jsonl", "stream": True}}, ConfigError, "give `steps` instead of epochs"),
    (
        {"data": {"train": "chat.jsonl", "stream": True}, "steps": 2, "order": "competence"},
        ConfigError,
        "all rows at hand",
    ),
    (
        {"data": {"train": "chat.jsonl", "stream": True}, "steps": 2, "validate_every": "epoch"},
        ConfigError,
        "a stream has no epochs",
    ),
    ({"data": {"train": mixture(1, 1)}, "order": "competence"}, ConfigError, "weights have no meaning for it"),
    (
        {"data": ["chat.jsonl", "sms_spam"]},
        DataError,
        "sms_spam: objective 'sft' does not learn from its Labelled rows",
    ),
    (
        {"data": ["chat.jsonl", "texts.jsonl"], "objective": "pretrain"},
        DataError,
        "only from texts.jsonl with Text rows",
    ),
    ({"data": "chat.jsonl", "order": "longest"}, ConfigError, "order"),
]


@pytest.mark.parametrize(("change", "error", "part"), BAD)
def test_what_does_not_go_together_is_one_sentence(change, error, part):
    with pytest.raises(error) as caught:
        tune(**({"model": str(tiny_model("llama")), "name": "bad"} | change))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_prepare_shows_the_rows_of_a_stream_and_of_several_sources(folder, capsys):
    for data in (
        ["chat.jsonl", "--set", "data.stream=true"],
        [json.dumps("chat.jsonl"), "--set", f"data.train={mixture(1, 1)}"],
    ):
        assert main(["prepare", "show", *data, "--model", str(tiny_model("llama")), "--rows", "2", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert len(shown) == 2 and shown[0]["id"].startswith("chat.jsonl:")


def test_a_python_source_streams():
    def endless():
        at = 0
        while True:
            at += 1
            yield {"text": f"number {at} of many"}

    events: list[dict] = []
    record = tune(
        resolve(
            Tune,
            values={
                "model": str(tiny_model("llama")),
                "data": {"train": endless, "stream": True, "shuffle_buffer": 30},
                "steps": 8,
                **QUICK,
            },
        ),
        sinks=[events.append],
    )
    assert record.numbers["steps"] == 8 and record.data["passes"] == 0
    assert [event["epoch"] for event in events if event["event"] == "step"] == [None] * 8
