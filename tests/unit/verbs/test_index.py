"""`luthier index`, and chat and generate that answer from what it made."""

import io
import json

import pytest

from luthier.faces.cli.main import main
from tiny import tiny_model


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tuning.md").write_text("# Violin\n\nTuned in fifths.\n", encoding="utf-8")
    (tmp_path / "docs" / "bow.txt").write_text("Bows need rosin.\n", encoding="utf-8")
    return tmp_path / "docs"


def test_an_index_is_a_run_that_is_brought_up_to_date(docs, runs, capsys):
    encoder = ["--encoder", str(tiny_model("bert"))]
    assert main(["index", str(docs), "--name", "help", *encoder]) == 0
    said = capsys.readouterr()
    assert "2 files, 2 passages (2 embedded now)" in said.out
    assert "the documents hold too few sentences" in said.out + said.err, "that nothing is refused is said"
    (docs / "zero.pdf").write_bytes(b"")
    (docs / "bow.txt").write_text("Bows need more rosin.", encoding="utf-8")
    assert main(["index", str(docs), "--name", "help", *encoder, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["state"] == "finished" and record["verb"] == "index"
    assert {name: record["numbers"][name] for name in ("files", "embedded", "unchanged", "removed")} == {
        "files": 2, "embedded": 1, "unchanged": 1, "removed": 0
    }  # fmt: skip
    assert record["numbers"]["left_out"] == {"zero.pdf": "zero.pdf: the file holds no text"}
    assert "left out: zero.pdf: the file holds no text" in record["warnings"]
    (docs / "zero.pdf").unlink()
    assert main(["index", str(docs), "--name", "help", *encoder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == {}, "what is mended is not warned of again"
    assert main(["report", "run:help"]) == 0 and main(["runs"]) == 0
    assert "run:help" in capsys.readouterr().out


def test_mistakes_are_sentences(docs, tmp_path, runs, capsys):
    assert main(["index", str(docs / "none"), "--name", "one", "--encoder", "none"]) == 2
    assert "no such file or directory" in capsys.readouterr().err and not (runs / "one").exists()
    assert main(["index", str(docs), "--name", "one", "--encoder", "none"]) == 0
    assert main(["index", str(docs / "none"), "--name", "one", "--encoder", "none"]) == 2
    assert (runs / "one" / "artefacts" / "index" / "index.json").is_file(), "a request that fails takes nothing away"
    capsys.readouterr()
    model = str(tiny_model("qwen3"))
    for arguments, part in (
        (["--index", "two"], "run:two: no such run"),
        (["--index", "one", "--labels", "a,b"], "leave labels and structure out, or index"),
        (["--passages", "2"], "passages goes with index"),
    ):
        assert main(["generate", model, "violin", *arguments]) == 2
        assert part in capsys.readouterr().err
    assert main(["generate", str(tiny_model("bert")), "violin", "--index", "one"]) == 2
    assert "writes no text" in capsys.readouterr().err
    (runs / "other").mkdir()
    record = json.loads((runs / "one" / "record.json").read_text(encoding="utf-8"))
    (runs / "other" / "record.json").write_text(json.dumps({**record, "id": "other", "verb": "tune"}), encoding="utf-8")
    assert main(["index", str(docs), "--name", "other", "--encoder", "none"]) == 2
    assert "this run exists and is no index" in capsys.readouterr().err
    assert main(["generate", model, "violin", "--index", "other"]) == 2
    assert "this run holds no index" in capsys.readouterr().err


def test_rows_are_answered_with_their_sources(docs, tmp_path, capsys):
    assert main(["index", str(docs), "--name", "help", "--encoder", "none"]) == 0
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "rosin?"}]
    rows = [
        {"id": "a", "prompt": "How is a violin tuned?"},
        {"id": "b", "prompt": "zebra"},
        {"id": "c", "messages": turns},
    ]
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--index", "help", "--max-tokens", "4", "--max-length", "1024"]
    model = str(tiny_model("t5"))
    assert main(["generate", model, "--input", str(questions), "--output", str(answers), *flags]) == 0
    assert "the index holds too little" in capsys.readouterr().err
    found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [(one["id"], one["known"]) for one in found] == [("a", True), ("b", False), ("c", True)]
    assert [one["place"] for one in found[0]["sources"]] == ["tuning.md › Violin, line 3"]
    assert found[0]["sources"][0]["text"] == "Tuned in fifths." and found[1]["output"] == "I do not know."
    assert found[2]["sources"][0]["file"] == "bow.txt" and found[1]["sources"] == []
    assert main(["generate", model, "How is a violin tuned?", *flags]) == 0
    assert "tuning.md › Violin, line 3" in capsys.readouterr().out


def test_talking_shows_sources(docs, monkeypatch, capsys):
    assert main(["index", str(docs), "--name", "help", "--encoder", "none"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("/sources\nHow is a violin tuned?\n/sources\nzebra\n"))
    assert main(["chat", "mini", "--index", "help", "--max-tokens", "4", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the last answer has no passages") and said.rstrip().endswith("I do not know.")
    assert (
        "these were read:\n  [1] tuning.md › Violin, line 3\n[1] tuning.md › Violin, line 3\nTuned in fifths." in said
    )


def test_a_context_without_room_is_a_sentence(docs, capsys):
    assert main(["index", str(docs), "--name", "help", "--encoder", "none"]) == 0
    assert main(["generate", "mini", "violin", "--index", "help", "--max-tokens", "500"]) == 2
    assert "not one passage fits the model's context" in capsys.readouterr().err
