"""Adapters, objectives and precisions in two processes, whole and sharded, beside one process. Two starts serve all cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.core.config import resolve
from luthier.core.events import read_events
from luthier.verbs.tune import Tune, tune_model
from tiny import tiny_model

pytestmark = pytest.mark.e2e

TEXTS = ["win a prize now", "free cash call now", "claim your free prize", "cash prize win win", "see you at seven",
         "call me when home", "are you at the station", "lunch at noon then", "a", "b c d"]  # fmt: skip
CHATS = [{"prompt": text, "completion": text[:8]} for text in TEXTS]
TEXT_ROWS = [{"text": text} for text in TEXTS]
LABELLED = [{"text": text, "label": "x" if at % 3 else "y"} for at, text in enumerate(TEXTS)]
PAIRS = [{"source": text, "target": text[::-1][:9]} for text in TEXTS]
LIKED = [{"prompt": text, "chosen": text[:8], "rejected": text[::-1] + "!"} for text in TEXTS]
VERDICTS = [{"prompt": text, "completion": text[:8], "label": at % 3 > 0} for at, text in enumerate(TEXTS)]
HALF = {"precision": "bfloat16"}
# name -> (model, rows, settings, what losses may differ by): sums in bfloat16 depend on which rows lie side by side.
CASES = {
    # The frozen weight that LoRA's own backward pass keeps is freed and gathered again between the two passes.
    "lora": ("llama", CHATS, {"adapter": "lora", "accumulate": 2}, 1e-6),
    "lora in bf16": ("llama", CHATS, {"adapter": "lora", **HALF}, 1e-3),
    "full in bf16": ("llama", CHATS, HALF, 2e-3),
    "lion": ("llama", CHATS, {"optimizer": "lion", "learning_rate": 1e-3}, 1e-5),
    "tied embeddings": ("gemma", CHATS, {}, 1e-6),
    "packed documents": ("gpt2", TEXT_ROWS, {"objective": "pretrain", "max_length": 16}, 1e-6),
    "masked": ("bert", TEXT_ROWS, {"objective": "pretrain"}, 1e-6),
    "classify": ("bert", LABELLED, {"objective": "classify"}, 1e-6),
    "classify, frozen, in bf16": ("bert", LABELLED, {"objective": "classify", "adapter": "freeze", **HALF}, 1e-2),
    "seq2seq": ("t5", PAIRS, {"objective": "seq2seq"}, 1e-6),
    "preferences": ("llama", LIKED, {"objective": "dpo"}, 1e-6),
    # How far the model moved is measured over the rows of both.
    "verdicts": ("llama", VERDICTS, {"objective": "kto", "batch_size": 5}, 1e-6),
}
# What runs the model by itself before a step cannot be sharded, and says so.
UNSHARDED = ("verdicts",)
SCRIPT = """
import json, sys
from luthier.verbs.tune import tune
for name, settings in json.load(open(sys.argv[1])).items():
    tune(**settings)
"""


def settings_of(case: str, name: str, **more) -> dict:
    model, rows, own, _ = CASES[case]
    data = {"train": rows, "validation": rows[:4]}
    usual = {"steps": 5, "batch_size": 3, "learning_rate": 5e-3, "validate_every": 2, "baselines": False}
    return {"model": str(tiny_model(model)), "data": data, **usual, "name": name, **own, **more}


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] in ("step", "validate")]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_learn_what_one_learns(sharding, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path / "runs"))
    cases = [case for case in CASES if sharding == "none" or case not in UNSHARDED]
    asked = {case: settings_of(case, f"two-{at}", sharding=sharding) for at, case in enumerate(cases)}
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    places = {"LUTHIER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, str(tmp_path / "script.py"), str(tmp_path / "asked.json")]
    source = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command,
        env={**os.environ, **places, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for at, case in enumerate(cases):
        limit = CASES[case][-1]
        tune_model(resolve(Tune, values=settings_of(case, f"one-{at}")))
        one, two = (losses(tmp_path / "runs" / f"{count}-{at}") for count in ("one", "two"))
        assert two == pytest.approx(one, rel=limit), case
