"""Everything that can be asked for, in two and three processes, whole and sharded, beside one process: the same losses of
steps, validation numbers and learned weights. One start serves all cases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.core.events import read_events
from luthier.core.run import read_record
from luthier.models.load import load_model
from luthier.models.save import save_model
from tiny import tiny_model

pytestmark = pytest.mark.e2e

TEXTS = ["win a prize now", "free cash call now", "claim your free prize", "cash prize win win", "see you at seven",
         "call me when home", "are you at the station", "lunch at noon then", "a", "b c d"]  # fmt: skip
CHATS = [{"prompt": text, "completion": text[:8]} for text in TEXTS]
OTHER_CHATS = [{"prompt": text[::-1], "completion": text[-5:]} for text in TEXTS[:4]]
TEXT_ROWS = [{"text": text} for text in TEXTS]
LABELLED = [{"text": text, "label": "x" if at % 3 else "y"} for at, text in enumerate(TEXTS)]
SEVERAL = [{"text": text, "labels": [["x"], ["y", "z"], ["x", "z"], []][at % 4]} for at, text in enumerate(TEXTS)]
NUMBERS = [{"text": text, "score": float(len(text) + at % 4)} for at, text in enumerate(TEXTS)]
PAIRS = [{"source": text, "target": text[::-1][:9]} for text in TEXTS]
LIKED = [{"prompt": text, "chosen": text[:8], "rejected": text[::-1] + "!"} for text in TEXTS]
VERDICTS = [{"prompt": text, "completion": text[:8], "label": at % 3 > 0} for at, text in enumerate(TEXTS)]
MIXTURE = [{"source": "CHATS", "weight": 2, "name": "a"}, {"source": "OTHER_CHATS", "weight": 1, "name": "b"}]


def weigh(rows):
    """Rows that count half, twice, or nothing at all: a process may hold none that counts."""
    return [{**row, "weight": [1, 0.5, 2, 0][at % 4]} for at, row in enumerate(rows)]


ROWS = {
    "CHATS": CHATS, "OTHER_CHATS": OTHER_CHATS, "WEIGHED": weigh(CHATS), "TEXT_ROWS": TEXT_ROWS, "LABELLED": LABELLED,
    "WEIGHED_LABELLED": weigh(LABELLED), "SEVERAL": SEVERAL, "NUMBERS": NUMBERS, "PAIRS": PAIRS, "LIKED": LIKED,
    "WEIGHED_LIKED": weigh(LIKED), "VERDICTS": VERDICTS, "WEIGHED_VERDICTS": weigh(VERDICTS),
}  # fmt: skip
HALF = {"precision": "bfloat16"}
REWARDS = [{"kind": "pattern", "pattern": "[a-m]"}, {"kind": "length", "tokens": 3}]
STREAM = {"stream": True, "shuffle_buffer": 6}
LORA = {"kind": "lora", "rank": 4}
PROMPT = {"kind": "peft", "method": "prompt_tuning", "options": {"num_virtual_tokens": 4}}
PREFIX = {**PROMPT, "method": "prefix_tuning"}


def grpo(**more):
    return {"objective": {"kind": "grpo", "rewards": REWARDS, "samples": 2, "max_tokens": 6, **more}}


def distil(teacher="TEACHER", **more):
    return {"objective": {"kind": "distil", "teacher": teacher, **more}}


# name -> (model, rows, settings). Ten rows in steps of three: in the last step of an epoch one process has none.
CASES = {
    "sft": ("llama", "CHATS", {}),
    "split steps": ("llama", "CHATS", {"accumulate": 3, "micro_tokens": 20, "batch_size": 7}),
    "one row a step": ("llama", "CHATS", {"batch_size": 1}),
    "no clipping, rates by layer": ("qwen3", "CHATS", {"clip": 0, "batch_size": 4, "layer_decay": 0.8}),
    "row weights": ("llama", "WEIGHED", {"batch_size": 4}),
    "rate and size auto": ("llama", "CHATS", {"learning_rate": "auto", "batch_size": "auto"}),
    "noise": ("llama", "CHATS", {"noise": 5.0}),
    "noise, encoder-decoder": ("t5", "PAIRS", {"noise": 5.0, "objective": "seq2seq"}),
    "ema": ("llama", "CHATS", {"ema": 0.9}),
    "ema, lora": ("llama", "CHATS", {"ema": 0.9, "adapter": LORA}),
    "stops early": ("llama", "CHATS", {"learning_rate": 0.03, "patience": 1, "steps": 12}),
    "short first": ("llama", "CHATS", {"order": "short_first"}),
    "competence": ("llama", "CHATS", {"order": "competence"}),
    "cut rows": ("llama", "CHATS", {"max_length": 30, "truncate": True}),
    "pretrain": ("gpt2", "TEXT_ROWS", {"objective": "pretrain", "max_length": 16}),
    "joined": ("gpt2", "TEXT_ROWS", {"objective": {"kind": "pretrain", "documents": "joined"}, "max_length": 8}),
    "masked": ("bert", "TEXT_ROWS", {"objective": "pretrain", "max_length": 12}),
    "masked, one row": ("modernbert", "TEXT_ROWS", {"objective": "pretrain", "max_length": 12, "batch_size": 1}),
    "distil": ("llama", "CHATS", distil(divergence="jsd", hard=0.3)),
    "distil, texts": ("gpt2", "TEXT_ROWS", {**distil("TEXT_TEACHER", temperature=2), "max_length": 16}),
    "distil, on policy": ("llama", "CHATS", distil(on_policy=0.5, max_tokens=6)),
    "distil, written": ("llama", "CHATS", distil(answers="teacher", hard=0.3, max_tokens=6)),
    "distil, classes": ("llama", "LABELLED", {**distil("CLASSIFIER", temperature=2, hard=0.2), "adapter": LORA}),
    "distil, numbers": ("bert", "NUMBERS", distil("REGRESSOR")),
    "dpo": ("llama", "LIKED", {"objective": {"kind": "dpo", "sft": 0.5}}),
    "ipo": ("llama", "WEIGHED_LIKED", {"objective": {"kind": "dpo", "loss": "ipo"}, "micro_tokens": 30}),
    "dpo, lora": ("llama", "LIKED", {"objective": {"kind": "dpo", "label_smoothing": 0.1}, "adapter": LORA}),
    "orpo": ("llama", "LIKED", {"objective": "orpo"}),
    "simpo": ("llama", "LIKED", {"objective": "simpo"}),
    "kto": ("llama", "VERDICTS", {"objective": {"kind": "kto", "desirable": 1.5}, "batch_size": 5}),
    "kto, lora": ("llama", "WEIGHED_VERDICTS", {"objective": "kto", "batch_size": 3, "adapter": LORA}),
    "kto, one row": ("qwen3", "VERDICTS", {"objective": "kto", "batch_size": 1}),
    "reward": ("llama", "LIKED", {"objective": {"kind": "reward", "center": 0.1}}),
    "grpo": ("llama", "CHATS", grpo(samples=3)),
    "grpo, held, lora": ("llama", "CHATS", {**grpo(beta=0.1, average="tokens"), "adapter": LORA}),
    "grpo, held, one row": ("llama", "CHATS", {**grpo(beta=0.1, temperature=0.8), "batch_size": 1}),
    "grpo, no signal": ("gemma", "CHATS", grpo(rewards=[{"kind": "pattern", "pattern": "^z"}])),
    "classify": ("bert", "LABELLED", {"objective": "classify"}),
    "smoothed": ("llama", "LABELLED", {"pooling": "mean", "objective": {"kind": "classify", "loss": {
        "kind": "cross_entropy", "smoothing": 0.1, "class_weights": "auto"}}}),
    "focal": ("roberta", "WEIGHED_LABELLED", {"pooling": "first", "objective": {"kind": "classify", "loss": {
        "kind": "focal", "class_weights": {"x": 2.0}}}}),
    "several labels": ("deberta-v2", "SEVERAL", {"objective": {"kind": "classify", "loss": "focal"}}),
    "classify, encoder alone": ("t5", "LABELLED", {"objective": "classify"}),
    "classify, frozen": ("bert", "LABELLED", {"objective": "classify", "adapter": {"kind": "freeze", "layers": 1}}),
    "classify, lora": ("modernbert", "LABELLED", {"objective": "classify", "adapter": LORA}),
    "regress": ("bert", "NUMBERS", {"objective": "regress"}),
    "huber": ("llama", "NUMBERS", {"objective": {"kind": "regress", "loss": {"kind": "huber", "delta": 0.5}}}),
    "mae": ("opt", "NUMBERS", {"objective": {"kind": "regress", "loss": "mae"}, "pooling": "last"}),
    "seq2seq": ("bart", "PAIRS", {"objective": {"kind": "seq2seq", "smoothing": 0.1}}),
    "seq2seq, lora": ("t5", "PAIRS", {"objective": "seq2seq", "adapter": LORA}),
    "computed positions": ("marian", "PAIRS", {"objective": "seq2seq"}),
    "tied": ("gemma", "CHATS", {}),
    "lora": ("llama", "CHATS", {"adapter": {**LORA, "ratio": 4}, "accumulate": 2}),
    "lora, tokens": ("llama", "CHATS", {"adapter": {**LORA, "tokens": ["prize", "<new>"]}}),
    "lora, tied tokens": ("qwen3", "CHATS", {"adapter": {**LORA, "tokens": ["prize", "<new>"]}}),
    "lora, also": ("llama", "CHATS", {"adapter": {**LORA, "also": ["embed_tokens", "lm_head"]}}),
    "lora, embedding": ("llama", "CHATS", {"adapter": {**LORA, "targets": ["embed_tokens", "q_proj"]}}),
    "lora over nf4": ("llama", "CHATS", {"adapter": LORA, "quantize": "nf4"}),
    "lora over int8": ("llama", "CHATS", {"adapter": LORA, "quantize": "int8"}),
    "dora": ("llama", "CHATS", {"adapter": {**LORA, "kind": "dora"}}),
    "pissa": ("llama", "CHATS", {"adapter": {**LORA, "kind": "pissa"}}),
    "freeze": ("llama", "CHATS", {"adapter": {"kind": "freeze", "layers": 1}}),
    "ia3": ("llama", "CHATS", {"adapter": {"kind": "peft", "method": "ia3"}}),
    "prompt": ("llama", "CHATS", {"adapter": PROMPT}),
    "prefix": ("llama", "CHATS", {"adapter": PREFIX}),
    "adam": ("llama", "CHATS", {"optimizer": {"kind": "adam", "eps": 1e-4, "weight_decay": 0.01}}),
    "sgd": ("llama", "CHATS", {"optimizer": {"kind": "sgd", "nesterov": True}}),
    "lion": ("llama", "CHATS", {"optimizer": "lion", "learning_rate": 1e-4}),
    "schedule_free": ("llama", "CHATS", {"optimizer": {"kind": "schedule_free", "eps": 1e-4}, "patience": 2}),
    "adafactor": ("llama", "CHATS", {"optimizer": "adafactor"}),
    "adamw8bit": ("llama", "CHATS", {"optimizer": {"kind": "adamw8bit", "small": 100, "eps": 1e-4}}),
    "apollo": ("llama", "CHATS", {"optimizer": {"kind": "apollo", "rank": 4, "eps": 1e-4}}),
    "muon": ("llama", "CHATS", {"optimizer": {"kind": "muon", "eps": 1e-4}, "learning_rate": 1e-3}),
    "galore": ("llama", "CHATS", {"optimizer": {"kind": "galore", "rank": 4, "eps": 1e-4}}),
    "mixture": ("llama", MIXTURE, {}),
    "stream": ("llama", "CHATS", {"data": STREAM}),
    "stream of a mixture": ("llama", MIXTURE, {"data": STREAM}),
    "stream of texts": ("gpt2", "TEXT_ROWS", {"data": STREAM, "objective": "pretrain", "max_length": 16}),
    "in bf16": ("llama", "CHATS", HALF),
    "ema in bf16": ("llama", "CHATS", {"ema": 0.9, **HALF}),
    "lora in bf16": ("llama", "CHATS", {"adapter": LORA, **HALF}),
    "dora in bf16": ("llama", "CHATS", {"adapter": {**LORA, "kind": "dora"}, **HALF}),
    "prompt in bf16": ("llama", "CHATS", {"adapter": PROMPT, **HALF}),
    "frozen in bf16": ("bert", "LABELLED", {"objective": "classify", "adapter": "freeze", **HALF}),
    # Not grpo: an answer whose likeliest token another rounding changes is another answer, with another reward.
    "kto in bf16": ("llama", "VERDICTS", {"objective": "kto", "batch_size": 2, **HALF}),
}  # fmt: skip
# What may differ, where it is more than 1e-6 of a loss: sums in bfloat16 depend on which rows lie side by side, a divergence
# of two near distributions is the difference of large numbers, and what divides by small ones enlarges rounding.
LOOSE = {"stops early": 2e-5, "muon": 2e-5, "galore": 5e-5, "distil, on policy": 1e-5, "distil, texts": 3e-5}
WHOLE_MATRICES = ("adafactor", "adamw8bit", "apollo", "muon", "galore")
# What is stopped after its second step and goes on; with dropout the same only in as many processes.
STOPPED = {
    "dropout": ("llama", "CHATS", {"adapter": {**LORA, "dropout": 0.3}}),
    "ema of a mixture": ("llama", MIXTURE, {"ema": 0.9}),
    "stream": CASES["stream of a mixture"],
    "grpo": CASES["grpo, held, lora"],
    "kto": CASES["kto"],
    "schedule_free": CASES["schedule_free"],
    "prompt": CASES["prompt"],
}
SCRIPT = """
import json, os, signal, sys
from luthier.core.errors import ConfigError
from luthier.verbs.tune import tune

def stop(event):
    if sys.argv[2] == "stop" and event["event"] == "step" and event["step"] == 2:
        os.kill(os.getpid(), signal.SIGINT)

for name, settings in json.load(open(sys.argv[1])).items():
    try:
        tune(sinks=[stop], **({"resume": "run:" + settings["name"]} if sys.argv[2] == "resume" else settings))
    except KeyboardInterrupt:
        pass
    except ConfigError as err:
        if os.environ.get("RANK", "0") == "0":
            print(name, "refused:", err, flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the rows lie, and the teachers that give classes and numbers."""
    place = tmp_path_factory.mktemp("several")
    for name, rows in ROWS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for task, labels in (("classify", ("y", "x")), ("regress", ())):
        torch.manual_seed(2)
        teacher = load_model(str(tiny_model("bert", seed=1)), task=task, labels=labels)
        torch.nn.init.normal_(teacher.module.head.weight, std=0.7)
        save_model(teacher, place / task)
    return place


@pytest.fixture(scope="module")
def alone(place):
    """The runs of one process."""
    out, said = start(place, "alone", 1, CASES)
    assert said == "", said
    return out


def start(
    place: Path, name: str, processes: int, cases: dict, sharding: str = "none", how: str = ""
) -> tuple[Path, str]:
    """Make the runs of `cases`: returns where they are, and which were refused."""
    out = place / name
    out.mkdir(exist_ok=True)
    asked = {case: settings_of(cases, case, place, sharding) for case in cases}
    (out / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    (out / "script.py").write_text(SCRIPT, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    what = [str(out / "script.py"), str(out / "asked.json"), how]
    places = {"LUTHIER_RUNS": str(out), "LUTHIER_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *what],
        env={**os.environ, **places, **paths},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def settings_of(cases: dict, case: str, place: Path, sharding: str) -> dict:
    def path(name: str) -> str:
        return str(place / f"{name}.jsonl")

    model, rows, own = cases[case]
    known = {"TEACHER": tiny_model("llama", seed=1), "TEXT_TEACHER": tiny_model("gpt2", seed=1)}
    known |= {"CLASSIFIER": place / "classify", "REGRESSOR": place / "regress"}
    own = json.loads(json.dumps(own))
    if isinstance(own.get("objective"), dict) and "teacher" in own["objective"]:
        own["objective"]["teacher"] = str(known[own["objective"]["teacher"]])
    train = path(rows) if isinstance(rows, str) else [{**one, "source": path(one["source"])} for one in rows]
    data = {"train": train, "validation": path(rows if isinstance(rows, str) else "CHATS"), **own.pop("data", {})}
    # With its usual eps Adam makes a whole step of a gradient that is all rounding.
    usual = {"steps": 5, "batch_size": 3, "learning_rate": 3e-3, "schedule": "constant", "validate_every": 2,
             "optimizer": {"kind": "adamw", "eps": 1e-4}, "baselines": False}  # fmt: skip
    name = f"case-{list(cases).index(case)}"
    return {"model": str(tiny_model(model)), **usual, "name": name, "sharding": sharding, **own, "data": data}


def numbers(run: Path) -> list[dict[str, float]]:
    """What was said of every step and every validation."""
    found = []
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "step":
            found.append({"loss": event["loss"], "tokens": event["tokens"], **event.get("tally", {})})
        elif event["event"] == "validate":
            found.append({name: one for name, one in event.items() if isinstance(one, float) and name != "time"})
    return found


def weights(run: Path) -> dict:
    return {
        key: one for file in (run / "artefacts/model").glob("*.safetensors") for key, one in load_file(file).items()
    }


@pytest.mark.parametrize(("processes", "sharding"), [(2, "none"), (3, "none"), (2, "full"), (3, "full")])
def test_several_processes_learn_what_one_learns(processes, sharding, place, alone):
    out, said = start(place, f"{processes}-{sharding}", processes, CASES, sharding)
    refused = [line.partition(" refused: ")[0] for line in said.splitlines()]
    assert refused == ([case for case in CASES if case in WHOLE_MATRICES] if sharding == "full" else [])
    for at, case in enumerate(CASES):
        if case in refused:
            continue
        one, several, half = alone / f"case-{at}", out / f"case-{at}", "bf16" in case
        limit = LOOSE.get(case, 2e-2 if half else 1e-6)
        compare(one, several, case, limit, most=2e-2 if half else 2e-3 if case in LOOSE else 1e-5, abs=max(limit, 1e-6))
        records = [read_record(run) for run in (one, several)]
        assert half or records[0].numbers["best_step"] == records[1].numbers["best_step"], case
        # Memory is predicted where one process can predict it.
        said = ["not predicted" in record.choices["memory"] for record in records]
        assert said[0] == said[1], (case, records[1].choices["memory"])


def compare(one: Path, other: Path, case: str, limit: float, *, most: float, abs: float) -> None:
    """Every number of every step and validation, to `limit` of it or `abs`, and every weight, to `most`."""
    assert len(numbers(other)) == len(numbers(one)), case
    for theirs, ours in zip(numbers(other), numbers(one)):
        assert theirs == pytest.approx(ours, rel=limit, abs=abs), case
    assert weights(other).keys() == weights(one).keys(), case
    for name, value in weights(one).items():
        assert float((weights(other)[name].float() - value.float()).abs().max()) <= most, (case, name)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_what_was_stopped_goes_on_in_as_many_processes_and_in_others(sharding, place):
    through, _ = start(place, f"through-{sharding}", 2, STOPPED, sharding)
    stopped, _ = start(place, f"stopped-{sharding}", 2, STOPPED, sharding, "stop")
    others = {count: place / f"on-{count}-{sharding}" for count in (1, 3)}
    for path in others.values():
        shutil.copytree(stopped, path)
    start(place, stopped.name, 2, STOPPED, sharding, "resume")
    for count, path in others.items():
        start(place, path.name, count, STOPPED, sharding, "resume")
    for at, case in enumerate(STOPPED):
        compare(through / f"case-{at}", stopped / f"case-{at}", case, 0, most=0, abs=0)
        for path in others.values() if case != "dropout" else ():
            compare(through / f"case-{at}", path / f"case-{at}", case, 1e-6, most=1e-5, abs=1e-6)
