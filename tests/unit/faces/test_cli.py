"""The command line from the outside: exit codes, one sentence for a mistake, and nothing heavy before it is needed."""

import json
import subprocess
import sys

import pytest

from luthier.faces.cli.main import main
from tiny import tiny_model

ROWS = [
    {"text": f"{word} number {at}", "label": label}
    for at in range(6)
    for word, label in (("win prize", "spam"), ("see you", "ham"))
]


def write_rows(path) -> str:
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return str(path)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from luthier.faces.cli.main import main; main(['--help']); "
        "print([name for name in ('torch', 'transformers', 'pydantic', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("luthier:") and done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["tun"], "did you mean 'tune'"),
        (["tune"], "at least --data"),
        (["tune", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["tune", "--data", "x", "--learnig-rate", "3"], "did you mean '--learning-rate'"),
        (["tune", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["tune", "--resume", "run:none"], "no such run"),
        (["tune", "--resume", "run:none", "--epochs", "3"], "give no other settings"),
        (["evaluate", "run:none", "--data", "x"], "no such"),
        (["report", "run:none"], "no such run"),
        (["schema", "tun"], "did you mean 'tune'"),
        (["prepare", "shw", "x"], "did you mean 'show'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(arguments, part, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert part in said and "Traceback" not in said


def test_the_walk_from_tune_to_report(tmp_path, capsys, runs):
    data = write_rows(tmp_path / "rows.jsonl")
    flags = [
        "--data",
        data,
        "--set",
        "data.split.validation=0.3",
        "--epochs",
        "1",
        "--name",
        "walk",
        "--no-baselines",
        "--json",
    ]
    assert main(["tune", "--model", str(tiny_model("bert")), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["id"] == "walk" and record["state"] == "finished"
    assert main(["tune", "--model", str(tiny_model("bert")), *flags]) == 2, "the name is taken"
    assert "this run exists" in capsys.readouterr().err
    assert main(["generate", "run:walk", "win a prize"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("ham", "spam")
    answers = tmp_path / "answers.jsonl"
    for _ in range(2):
        assert main(["generate", "run:walk", "--input", data, "--output", str(answers)]) == 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == len(ROWS) and set(lines[0]["probabilities"]) == {"ham", "spam"}
    answers.write_text(answers.read_text()[:-20])
    assert main(["generate", "run:walk", "--input", data, "--output", str(answers)]) == 0
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(one["id"], one["output"]) for one in again] == [(one["id"], one["output"]) for one in lines]
    for one, before in zip(again, lines):
        assert one["probabilities"] == pytest.approx(before["probabilities"], abs=1e-6)  # rows in other company
    capsys.readouterr()
    assert main(["evaluate", "run:walk", "--data", data, "--train", data, "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["metrics"]["accuracy"]["n"] == len(ROWS) and set(judged["baselines"]) == {"majority", "tfidf"}
    assert main(["runs"]) == 0 and "run:walk" in capsys.readouterr().out
    assert main(["report", "run:walk"]) == 0 and capsys.readouterr().out.strip().endswith("report.html")


def test_dry_run_and_schema_are_json(tmp_path, capsys, runs):
    data = write_rows(tmp_path / "rows.jsonl")
    assert main(["tune", "--model", str(tiny_model("bert")), "--data", data, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["batch_size"]["origin"] == "advised"
    assert not runs.exists()
    assert main(["schema", "tune"]) == 0
    assert "lora" in json.loads(capsys.readouterr().out)["parts"]["adapter"]


def test_prepare_marks_what_is_learned(tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 世界"}]
    path.write_text(
        json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1] + turns[1:]}), encoding="utf-8"
    )
    assert main(["prepare", "show", str(path), "--set", "data.split.validation=0"]) == 0
    said = capsys.readouterr()
    assert "⟦Hello 世界<|end|>⟧" in said.out and not said.err
    assert main(["prepare", "show", str(path), "--set", "data.split.validation=0", "--template", "plain"]) == 0
    assert "warning: the template changes to 'plain'" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] and facts["troubles"] == []


def test_a_drawn_answer_is_the_same_streamed_and_whole():
    from luthier.verbs.generate import generate

    asked = {"model": "mini", "prompt": "Once upon", "raw": True}
    asked["sampling"] = {"temperature": 1.2, "seed": 5, "max_tokens": 16}
    pieces = []
    streamed = generate(on_text=pieces.append, **asked)
    assert generate(**asked)[0]["output"] == streamed[0]["output"] == "".join(pieces)


def test_json_shows_how_likely_tokens_were_and_every_answer(capsys):
    asked = [
        "generate",
        str(tiny_model("llama")),
        "The quick",
        "--raw",
        "--max-tokens",
        "3",
        "--temperature",
        "1",
        "--seed",
        "1",
    ]
    more = ["--n", "2", "--logprobs", "2", "--top-k", "1", "--set", "sampling.prompt_logprobs=true"]
    assert main([*asked, *more, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(found["logprobs"]) == found["tokens"] and len(found["prompt_logprobs"]) > 1
    assert [set(one) for one in found["others"]] == [{"output", "finish", "tokens", "logprobs"}]
    for token in found["logprobs"]:
        best, second = token["top"]
        assert token["id"] == best["id"] and token["processed"] == best["processed"] == 0 > best["raw"] > second["raw"]
        assert second["processed"] is None and "top" not in second
    assert main([*asked, "--n", "2"]) == 0
    assert capsys.readouterr().out.count("\n\n") >= 1
    assert main([*asked, "--logprobs", "0"]) == 2
    assert "logprobs: numbers do not stand in a text; add --format json" in capsys.readouterr().err
    assert main(["evaluate", "mini", "--data", "x.jsonl", "--set", "sampling.logprobs=1"]) == 2
    assert "logprobs: one answer to each row is judged" in capsys.readouterr().err


def test_doctor_says_how_a_model_writes_here_and_why(capsys):
    assert main(["doctor", str(tiny_model("llama"))]) == 0
    said = capsys.readouterr().out
    assert "decoder           native, by" in said or "decoder           none" in said
    assert "native: no (a model of 0.0 M parameters gains little" in said and "engine: paged (texts come and go" in said
    assert main(["doctor", str(tiny_model("bert"))]) == 2
    assert "writes no text; name a language model" in capsys.readouterr().err
