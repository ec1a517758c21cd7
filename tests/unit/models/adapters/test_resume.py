"""A tuning with any adapter of the family, stopped and resumed, ends where it would have."""

import json
import signal

import pytest
import torch

from luthier.models.load import load_model
from luthier.verbs.tune import tune
from tiny import tiny_model

CHATS = [{"prompt": f"call {number}", "completion": f"<tool> {number + 1}"} for number in range(24)]


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_to_the_same_end(kind, precision, tmp_path):
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
    values = {
        "model": str(tiny_model("llama")),
        "data": {"train": str(rows), "split": {"validation": 0.25}},
        "objective": "sft",
        "adapter": {"kind": kind, "rank": 4, "tokens": ["<tool>"], "also": ["norm"]},
        "precision": precision,
        "steps": 5,
        "batch_size": 4,
        "baselines": False,
    }

    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    tune(**values, name="straight")
    with pytest.raises(KeyboardInterrupt):
        tune(**values, name="broken", sinks=[stop])
    torch.manual_seed(99)
    tune(resume="run:broken")
    mine, theirs = (load_model(f"run:{name}").network.state_dict() for name in ("straight", "broken"))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
