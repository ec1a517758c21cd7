"""What goes wrong outside of Luthier, from the outside: one sentence, exit code 2 (3 where training ran away), nothing lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

import luthier.training.checkpoint as checkpoint
from luthier.core.run import read_record
from luthier.faces.cli.main import main
from tiny import CONTEXT, tiny_model

LABELLED = [
    {"text": f"{word} number {at}", "label": label}
    for at in range(6)
    for word, label in (("win a prize", "spam"), ("see you", "ham"))
]
TEXTS = [{"text": row["text"]} for row in LABELLED]


def write(path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def refused(arguments: list[str], capsys, code: int = 2) -> str:
    """The one sentence that `luthier ARGUMENTS` ends with."""
    assert main(arguments) == code
    caught = capsys.readouterr()
    sentences = [line for line in caught.err.splitlines() if line.startswith("luthier: ")]
    assert len(sentences) == 1 and caught.err.endswith(sentences[0] + "\n"), caught.err
    assert "Traceback" not in caught.err and "bug in Luthier" not in caught.err and caught.out == ""
    return sentences[0]


# Contents of the file, flags, and what the sentence holds.
ROWS = {
    "empty": ("", [], "the file is empty"),
    "broken": (json.dumps(LABELLED[0]) + '\n{"text": "x", \n', [], "rows.jsonl:2: broken JSON"),
    "no column": (
        LABELLED,
        ["--set", "data.columns.label=lable"],
        "columns.label: there is no column 'lable'; did you mean 'label'?",
    ),
    "column lost": ([*LABELLED, {"text": "x"}], [], "rows.jsonl:13: the column 'label' is missing"),
    "one class": ([{**row, "label": "ham"} for row in LABELLED], [], "the label 'ham'"),
    "too long": ([*LABELLED, {"text": "word " * CONTEXT, "label": "ham"}], [], f"tokens do not fit in {CONTEXT}"),
    "no rows left": (
        [{"text": "", "label": "x"}],
        ["--set", "data.on_bad_row=drop"],
        "there are no rows to use (1 were dropped)",
    ),
    "misspelt setting": (LABELLED, ["--set", "data.splti.seed=3"], "did you mean 'split'"),
    "misspelt objective": (LABELLED, ["--objective", "clasify"], "did you mean 'classify'?"),
    "unknown model": (LABELLED, ["--model", "./nowhere"], "./nowhere: no such directory"),
    "unknown hub model": (LABELLED, ["--model", "owner/nowhere"], "owner/nowhere"),
    "not a run": (LABELLED, ["--model", "run:nowhere"], "run:nowhere: no such run"),
    "wrong objective": (LABELLED, ["--objective", "sft"], "learns from"),
    "bad name": (LABELLED, ["--name", "../up"], "the run name '../up'"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_request_is_one_sentence_and_leaves_nothing(case, tmp_path, capsys, runs):
    content, flags, part = ROWS[case]
    path = tmp_path / "rows.jsonl"
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write(path, content)
    model = [] if "--model" in flags else ["--model", str(tiny_model("bert"))]
    assert part in refused(["tune", *model, "--data", str(path), "--no-baselines", *flags], capsys)
    assert not list(runs.glob("*"))
    assert os.listdir(tmp_path) in (["rows.jsonl"], ["rows.jsonl", "runs"], ["runs", "rows.jsonl"])


def test_a_misspelt_key_of_a_file_is_named_with_its_line(tmp_path, capsys, runs):
    data = write(tmp_path / "rows.jsonl", LABELLED)
    config = tmp_path / "run.yaml"
    config.write_text(f"model: mini\ndata: {data}\nlearnig_rate: 0.1\n", encoding="utf-8")
    said = refused(["tune", str(config)], capsys)
    assert "run.yaml" in said and "line 3" in said and "did you mean 'learning_rate'?" in said
    config.write_text("model: [mini\n", encoding="utf-8")
    assert "run.yaml" in refused(["tune", str(config)], capsys)
    assert not list(runs.glob("*"))


def test_a_value_of_the_wrong_kind_is_named_as_it_was_written(tmp_path, capsys, runs):
    data = write(tmp_path / "rows.jsonl", LABELLED)
    assert main(["tune", "--data", data, "--batch-size", "many"]) == 2
    said = capsys.readouterr().err
    assert "  batch_size: input should be a valid integer" in said and "(got 'many')" in said
    assert "constrained" not in said and "Traceback" not in said and not list(runs.glob("*"))


def test_a_label_of_the_test_part_alone(tmp_path, capsys, runs):
    data, test = (
        write(tmp_path / "rows.jsonl", LABELLED),
        write(tmp_path / "test.jsonl", [{"text": "x", "label": "eggs"}]),
    )
    arguments = ["tune", "--model", str(tiny_model("bert")), "--data", data, "--set", f"data.test={test}"]
    assert "test.jsonl:1: the label 'eggs' occurs in the test part but never in training" in refused(arguments, capsys)
    assert not list(runs.glob("*"))


def test_a_run_that_exists_is_not_touched(tmp_path, capsys, runs):
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "notes.txt").write_text("keep me", encoding="utf-8")
    data = write(tmp_path / "rows.jsonl", LABELLED)
    assert "choose another --name" in refused(["tune", "--data", data, "--name", "mine"], capsys)
    assert [path.name for path in (runs / "mine").iterdir()] == ["notes.txt"]


def test_an_adapter_for_another_base(tmp_path, capsys, runs):
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    data = write(tmp_path / "rows.jsonl", TEXTS)
    flags = ["--objective", "pretrain", "--adapter", "lora", "--steps", "1", "--no-baselines", "--name", "one"]
    assert main(["tune", "--model", str(base), "--data", data, *flags]) == 0
    shutil.rmtree(base)
    shutil.copytree(tiny_model("llama", seed=1), base)
    capsys.readouterr()
    assert "this adapter is for another base" in refused(["generate", "run:one", "text"], capsys)
    shutil.rmtree(base)
    assert "the base of this adapter cannot be found" in refused(["generate", "run:one", "text"], capsys)


def test_training_that_runs_away_stops_and_names_its_rows(tmp_path, capsys, runs):
    data = write(tmp_path / "rows.jsonl", LABELLED)
    flags = ["--objective", "classify", "--optimizer", "sgd", "--clip", "0", "--learning-rate", "1e3", "--steps", "40"]
    more = ["--set", "data.split.validation=0", "--batch-size", "4", "--schedule", "constant", "--name", "wild"]
    said = refused(["tune", "--model", str(tiny_model("bert")), "--data", data, *flags, *more], capsys, code=3)
    assert "training stopped before it spoiled the weights; the rows of this batch: rows.jsonl:" in said
    assert "Lower the learning rate" in said
    record = read_record(runs / "wild")
    assert record.state == "failed" and said == f"luthier: {record.error}"


def tuning(tmp_path, name: str) -> list[str]:
    """Fifteen steps with a checkpoint at every third."""
    data = write(tmp_path / "rows.jsonl", TEXTS)
    flags = ["--objective", "pretrain", "--steps", "15", "--batch-size", "4", "--name", name]
    flags += ["--checkpoint-every", "3", "--validate-every", "3", "--threads", "1"]
    return ["tune", "--model", str(tiny_model("gpt2")), "--data", data, "--set", "data.split.validation=0", *flags]


def finish(name: str, runs, capsys) -> None:
    """Going on after step 6 ends well, with the weights of a run that was never stopped."""
    assert main(["tune", "--resume", f"run:{name}"]) == 0
    capsys.readouterr()
    events = [json.loads(line) for line in (runs / name / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["value"] for one in events if one["event"] == "choice" and one["name"] == "resume"] == ["step-00000006"]
    assert read_record(runs / name).state == "finished" and read_record(runs / name).error is None
    weights = [runs / one / "artefacts" / "model" / "model.safetensors" for one in ("straight", name)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list((runs / name).rglob(".*")), "no half-written thing is left"


def test_a_disk_that_fills_up_during_a_checkpoint(tmp_path, capsys, runs, monkeypatch):
    assert main(tuning(tmp_path, "straight")) == 0
    capsys.readouterr()
    save, limits, calls = checkpoint.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def save_with_little_room(*arguments):
        calls.append(arguments[1])
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_with_little_room)
        said = refused(tuning(tmp_path, "full"), capsys)
    assert calls == ["step-00000003", "step-00000006", "step-00000009"]
    assert "step-00000009: the checkpoint could not be written" in said and "File too large" in said
    assert "go on with `luthier tune --resume run:full`" in said
    assert read_record(runs / "full").state == "failed"
    finish("full", runs, capsys)


KILLED = """
import os, signal, sys
from luthier.models.lean import import_lean
import_lean()
import luthier.training.checkpoint as checkpoint
from luthier.faces.cli.main import main
flush = checkpoint._flush
def die(path):
    if "step-00000009" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
checkpoint._flush = die
main(sys.argv[1:])
"""


def test_a_kill_during_a_checkpoint(tmp_path, capsys, runs):
    assert main(tuning(tmp_path, "straight")) == 0
    capsys.readouterr()
    words = [sys.executable, "-c", KILLED, *tuning(tmp_path, "killed")]
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert (runs / "killed" / "checkpoints" / ".step-00000009.part").exists()
    assert read_record(runs / "killed").state == "running"
    finish("killed", runs, capsys)


def test_places_that_may_not_be_written(tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "rows.jsonl", TEXTS)
    for place in ("/proc/nowhere/a.jsonl", str(tmp_path)):
        said = refused(["generate", str(tiny_model("gpt2")), "--input", data, "--output", place], capsys)
        assert f"output: {place} cannot be written" in said
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    # Nobody, not even root, makes a directory here.
    monkeypatch.setenv("LUTHIER_RUNS", "/proc/nowhere")
    assert "set LUTHIER_RUNS to a writable place" in refused(["tune", "--data", data], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path, capsys, runs):
    data = write(tmp_path / "rows.jsonl", TEXTS)
    os.chmod(data, 0)
    assert "rows.jsonl: cannot be read (Permission denied)" in refused(["tune", "--data", data], capsys)
    assert not list(runs.glob("*"))
