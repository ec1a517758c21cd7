"""Pains of tuning that are about its use: installing, machines without a GPU, settings, and parts that do not compose."""

import ast
import json
import re
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

import luthier
from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.faces.cli.main import main
from luthier.models.load import load_model
from luthier.training.objectives import OBJECTIVES
from luthier.training.objectives.sft import SFT
from luthier.training.world import World
from luthier.verbs.encoding import encode
from luthier.verbs.reading import read
from luthier.verbs.tune import Tune, tune
from luthier.verbs.work import Work
from tiny import tiny_model

SOURCE = Path(luthier.__file__).parent
WORDS = "the quick brown fox jumps over the lazy dog"
CHATS = [{"prompt": f"say {at}", "completion": WORDS[: 3 + 4 * at]} for at in range(8)]
ALL = {"split": {"validation": 0.0}}


def learn(rows=CHATS, family="llama", **settings):
    events: list[dict] = []
    values = {"model": str(tiny_model(family)), "data": {"train": rows, **ALL}, "steps": 2, "baselines": False}
    record = tune(resolve(Tune, values=values | {"learning_rate": 1e-3} | settings), sinks=[events.append])
    return record, [event["loss"] for event in events if event["event"] == "step"]


def test_pain_13_no_version_is_pinned_and_no_code_is_rewritten():
    """Few dependencies, each from a version on; libraries are used as they are."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"]
    assert len(needed) < 20 and all(">=" in one and "==" not in one and "!=" not in one for one in needed)
    assert [one for one in needed if "<" in one] == ["transformers>=5.0,<6", "pydantic>=2.8,<3"]  # a major version each
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("exec", "eval", "compile"), path
                assert called.rpartition(".")[2] not in ("getsource", "getsourcelines", "reload"), path
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("transformers", "peft")):
                assert not any(one.name.startswith("_") for one in node.names), f"{path}: a private name"
            if isinstance(node, ast.Assign):
                targets = [ast.unparse(one) for one in node.targets]
                assert not any(re.match(r"(transformers|peft|torch)\.[\w.]+$", one) for one in targets), (
                    f"{path}: a patch"
                )


def test_pain_13_doctor_says_what_is_here(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["transformers"] and facts["versions"]["torch"]


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}, {"adapter": "lora", "quantize": "int8"}])
def test_pain_14_a_processor_is_enough(settings):
    """Nothing need be set for a machine without a GPU; bf16 and an int8 base learn there too."""
    record, losses = learn(device="auto" if not torch.cuda.is_available() else "cpu", steps=10, **settings)
    assert record.state == "finished" and losses[-1] < losses[0]
    assert load_model(f"run:{record.id}").device.type == "cpu" or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_pain_14_a_gpu_that_is_not_there_is_said(runs):
    with pytest.raises(ConfigError, match="this machine shows no CUDA device; use cpu"):
        learn(device="cuda", name="one")
    assert not (runs / "one").exists()


def test_pain_15_rows_are_encoded_before_the_processes_form_their_group(monkeypatch):
    """No collective waits while one process tokenises, so none can run out of time; the others read what it wrote."""
    order: list[object] = []
    own, store = SFT.encode, dist.HashStore()
    store.set("loaded/1", "")  # the second process, which comes later here

    def note(self, examples, *rest):
        order.append(len(examples))
        return own(self, examples, *rest)

    class Two(World):
        def begin(self, device):
            order.append("group")
            raise KeyboardInterrupt

    @contextmanager
    def join(*_, **__):
        yield Two(0, 2, local_size=2, store=store)

    monkeypatch.setattr(SFT, "encode", note)
    monkeypatch.setattr("luthier.verbs.tune.join_world", join)
    asked = resolve(Tune, values={"model": str(tiny_model("llama")), "data": {"train": CHATS, **ALL}, "steps": 2})
    with pytest.raises(KeyboardInterrupt):
        tune(asked)
    assert order == [8, 1, "group"]  # all rows, then the one that is held against the saved model
    order.clear()
    second = Work(asked, Events(), world=Two(1, 2, local_rank=1, local_size=2, store=store))
    read(second)
    encode(second)
    assert order == [1] and [row.id for row in second.rows] == [f"row {at}" for at in range(1, 9)]


TYPOS = [
    ("learnig_rate: 1e-4", "learnig_rate: no such setting; did you mean 'learning_rate'"),
    ("adapter: {kind: lora, rnak: 8}", "rnak: no such setting; did you mean 'rank'"),
    ("adapter: lroa", "did you mean 'lora'"),
    ("optimizer: {kind: adamw, weight_decy: 0}", "did you mean 'weight_decay'"),
    ("schedule: {kind: cosine, warmpu: 3}", "did you mean 'warmup'"),
    ("objective: stf", "did you mean 'sft'"),
    ("epoch: 3", "did you mean 'epochs'"),
    ("batch_size: many", "batch_size"),
]


@pytest.mark.parametrize(("line", "said"), TYPOS)
def test_pain_17_a_misspelt_setting_is_an_error_with_its_line(line, said, tmp_path, capsys, runs):
    """Wherever it stands: in a file, on the command line, in Python."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, CHATS)))
    config = tmp_path / "tune.yaml"
    config.write_text(f"model: {tiny_model('llama')}\ndata: {rows}\nname: one\n{line}\n")
    assert main(["tune", str(config)]) == 2
    heard = capsys.readouterr().err
    assert said in heard and f"{config}:" in heard and "line 4: " in heard
    key = line.partition(":")[0]
    with pytest.raises(ConfigError, match=re.escape(said)):
        tune(model=str(tiny_model("llama")), data=str(rows), name="one", **yaml.safe_load(line))
    if "{" not in line:
        value = line.partition(": ")[2]
        assert main(["tune", "--model", str(tiny_model("llama")), "--data", str(rows), "--set", f"{key}={value}"]) == 2
        assert said in capsys.readouterr().err
    assert not runs.exists() or not any(runs.iterdir())


def test_pain_17_a_misspelt_setting_of_the_data_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        learn(data={"train": CHATS, "split": {"validaton": 0.1}})
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        learn(data={"train": CHATS, "column": {"text": "a"}})


LIKED = [{"prompt": row["prompt"], "chosen": row["completion"] + " yes", "rejected": "no"} for row in CHATS]
ROWS = {
    "sft": CHATS,
    "distil": CHATS,
    "grpo": CHATS,
    "seq2seq": [{"source": row["prompt"], "target": row["completion"]} for row in CHATS],
    "pretrain": [{"text": row["completion"]} for row in CHATS],
    "classify": [{"text": row["completion"], "label": str(at % 2)} for at, row in enumerate(CHATS)],
    "regress": [{"text": row["completion"], "score": float(at)} for at, row in enumerate(CHATS)],
    "kto": [{**row, "label": at % 2 == 0} for at, row in enumerate(CHATS)],
    **dict.fromkeys(("dpo", "orpo", "simpo", "reward"), LIKED),
}
ASKED = {
    "distil": {"kind": "distil", "teacher": str(tiny_model("llama", seed=1))},
    "grpo": {"kind": "grpo", "rewards": {"kind": "length", "tokens": 4}, "samples": 3, "max_tokens": 4},
}
WAYS = [
    {"adapter": "full", "optimizer": "muon", "precision": "bfloat16", "accumulate": 3},
    {"adapter": {"kind": "lora", "ratio": 4}, "quantize": "nf4", "ema": 0.9, "micro_tokens": 40},
    {"adapter": "dora", "noise": 5, "optimizer": "adamw8bit", "layer_decay": 0.9},
    {"adapter": "freeze", "optimizer": "schedule_free", "order": "short_first", "micro_tokens": 40},
    {"adapter": "pissa", "precision": "bfloat16", "optimizer": "lion", "accumulate": 2, "noise": 5},
    {"adapter": {"kind": "lora", "targets": "all-linear"}, "quantize": "int8", "precision": "bfloat16"},
]  # fmt: skip


def test_pain_20_every_objective_is_tried():
    assert sorted(ROWS) == sorted(OBJECTIVES.names())


@pytest.mark.parametrize("objective", ROWS)
@pytest.mark.parametrize("turn", [0, 3])
def test_pain_20_parts_compose(objective, turn):
    """Packed rows, adapters, quantised bases, averages, noise, optimisers: any objective with any of them."""
    way = WAYS[(list(ROWS).index(objective) + turn) % len(WAYS)]
    family = "t5" if objective == "seq2seq" else "llama"
    record, losses = learn(ROWS[objective], family, objective=ASKED.get(objective, objective), batch_size=4, **way)
    assert record.state == "finished" and len(losses) == 2 and all(abs(loss) < 1e4 for loss in losses)
    load_model(f"run:{record.id}")
