"""A language model classifies from the command line: answers, numbers with intervals, and mistakes in a sentence."""

import json

import pytest

from luthier.core.types import Prediction
from luthier.evals.judge import judge
from luthier.faces.cli.main import main
from tiny import tiny_model

ROWS = [
    {"text": f"{word} number {at}", "label": label}
    for at in range(6)
    for word, label in (("win prize", "spam"), ("see you", "ham"))
]


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_a_language_model_chooses_labels(tmp_path, capsys, runs):
    model, data = str(tiny_model("qwen3")), write(tmp_path / "rows.jsonl", ROWS)
    shots = write(tmp_path / "shots.jsonl", [{"text": "free call", "label": "spam"}, {"text": "ok", "label": "ham"}])
    answers = tmp_path / "answers.jsonl"
    flags = ["--labels", "spam,ham", "--shots", shots, "--set", "labelling.instruction=Spam?"]
    assert main(["generate", model, "--input", data, "--output", str(answers), "--batch-size", "5", *flags]) == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(found) == len(ROWS)
    for one in found:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["output"] == max(one["probabilities"], key=one["probabilities"].get)
    assert main(["generate", model, ROWS[0]["text"], *flags]) == 0
    said, share = capsys.readouterr().out.split("\t")
    assert said == found[0]["output"] and float(share) == pytest.approx(found[0]["probabilities"][said], abs=1e-3)

    given = ["--data", data, "--shots", shots, "--set", "labelling.instruction=Spam?", "--json", "--name", "judged"]
    assert main(["evaluate", model, "--train", data, *given]) == 0
    record = json.loads(capsys.readouterr().out)
    right = sum(one["output"] == row["label"] for one, row in zip(found, ROWS)) / len(ROWS)
    assert record["metrics"]["accuracy"]["value"] == pytest.approx(right)
    assert {"macro_f1", "log_loss", "roc_auc"} <= set(record["metrics"])
    assert set(record["baselines"]) == {"majority", "tfidf"}
    kept = [json.loads(line) for line in (runs / "judged" / "artefacts" / "predictions.jsonl").read_text().splitlines()]
    assert [one["gold"] for one in kept] == [row["label"] for row in ROWS]
    for one, before in zip(kept, found):
        assert one["probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)


@pytest.mark.parametrize(
    ("verb", "flags", "part"),
    [
        ("generate", ["--labels", "spam"], "one label leaves nothing to choose"),
        ("generate", ["--labels", "spam,spam"], "a label stands there twice"),
        ("generate", ["--labels", "spam,"], "a label is empty"),
        ("generate", ["--set", "labels=[yes, no]"], "a label is true or false"),
        ("generate", ["--set", "labelling.calibrate=true"], "labelling goes with labels"),
        ("generate", ["--labels", "spam,ham", "--max-tokens", "4"], "sampling has no effect"),
        ("evaluate", ["--labels", "spam,eggs"], "the label 'ham' is not among spam, eggs"),
        ("evaluate", ["--set", "sampling.max_tokens=4"], "sampling has no effect"),
        ("evaluate", ["--likelihood"], "each of which is scored anyway"),
    ],
)
def test_a_mistake_is_one_sentence(verb, flags, part, tmp_path, capsys, runs):
    data = write(tmp_path / "rows.jsonl", ROWS)
    rest = ["--data", data] if verb == "evaluate" else ["--input", data]
    assert main([verb, str(tiny_model("qwen3")), *rest, *flags]) == 2
    assert part in capsys.readouterr().err


def test_labels_are_for_models_and_rows_that_have_use_for_them(tmp_path, capsys, runs):
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    assert main(["evaluate", str(tiny_model("qwen3")), "--data", pairs, "--labels", "a,b"]) == 2
    assert "labels: goes with a language model and rows that carry a label" in capsys.readouterr().err


def test_a_label_that_a_model_gives_no_probability_counts_as_zero():
    shares = [{"a": 0.9, "b": 0.1}, {"a": 0.2, "b": 0.8}, {"a": 1.0}]
    predictions = [
        Prediction(str(at), max(one, key=one.get), gold, one) for at, (one, gold) in enumerate(zip(shares, "abb"))
    ]
    metrics, _ = judge(predictions, "classify", ["a", "b", "c"])
    assert metrics["log_loss"].value == pytest.approx((0.10536 + 0.22314 + 34.53878) / 3, abs=1e-4)
