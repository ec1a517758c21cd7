"""Predicted beside measured: the peak memory of tunings of many kinds, and how long they take.

    python benchmarks/memory.py [--quick] [--only a,b]

Each tuning runs in a fresh process through `luthier.tune`, which predicts before the first step and measures until the
last (benchmarks/shapes.py has the models and rows; random weights). `error` is predicted / measured - 1. The time is
of the steps, without validation. Writes benchmarks/results/memory.json; the last line printed is the same object, in
which `ours` is the largest error of memory either way, and `peer` the 10 % that is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import make_model, write_rows

HERE = Path(__file__).parent
LORA = {"kind": "lora", "rank": 16, "alpha": 32}
# Name, shape, settings.
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("15m-lora", "15m", {"adapter": LORA, "steps": 40}),
    ("15m-lora-fp32", "15m", {"adapter": LORA, "precision": "float32", "steps": 24}),
    ("15m-full", "15m", {"steps": 24}),
    ("15m-full-32-rows", "15m", {"steps": 8, "batch_size": 32}),
    ("15m-full-sgd", "15m", {"optimizer": "sgd", "steps": 16}),
    ("15m-full-ema-1024-tokens", "15m", {"ema": 0.9, "steps": 16, "micro_tokens": 1024}),
    ("15m-pretrain", "15m", {"objective": "pretrain", "batch_size": 4, "steps": 6}),
    ("15m-classify", "15m", {"objective": "classify", "steps": 24}),
    ("15m-dpo-lora", "15m", {"objective": "dpo", "adapter": LORA, "steps": 10}),
    ("135m-lora", "135m", {"adapter": LORA, "steps": 8}),
    ("135m-lora-checkpointing", "135m", {"adapter": LORA, "steps": 5, "checkpointing": "layers"}),
    ("135m-lora-int8", "135m", {"adapter": LORA, "steps": 5, "quantize": "int8"}),
    ("135m-freeze", "135m", {"adapter": {"kind": "freeze", "layers": 4}, "steps": 5}),
    ("135m-full-bf16", "135m", {"precision": "bfloat16", "steps": 4}),
)
QUICK = ("15m-lora", "15m-classify")
RUN = """
import json, sys, luthier
record = luthier.tune(**json.loads(sys.argv[1]))
print(json.dumps({**record.numbers, "training_seconds": record.numbers["training_seconds"]}))
"""


def write_other_rows(rows: Path, folder: Path) -> dict[str, Path]:
    """The conversations as plain text, labelled texts and preferences."""
    chats = [[turn["content"] for turn in json.loads(line)["messages"]] for line in rows.open(encoding="utf-8")]
    made = {
        "pretrain": [{"text": f"{ask} {say}"} for ask, say in chats],
        "classify": [{"text": f"{ask} {say}", "label": "long" if len(say) > 300 else "short"} for ask, say in chats],
        "dpo": [{"prompt": ask, "chosen": say, "rejected": ask} for ask, say in chats[:200]],
    }
    paths = {}
    for name, lines in made.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def run(model: Path, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one tuning in a fresh process."""
    asked = {"objective": "sft", "batch_size": 8, "baselines": False, "learning_rate": 1e-4, **settings}
    asked |= {"model": str(model), "data": {"train": str(data), "split": {"validation": 0.02}}}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LUTHIER_RUNS": folder}
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(asked)], capture_output=True, text=True, check=False, env=environment
        )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    numbers = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "predicted_mb": round(numbers["predicted_peak_bytes"] / 1e6),
        "measured_mb": round(numbers["peak_bytes"] / 1e6),
        "error": round(numbers["predicted_peak_bytes"] / numbers["peak_bytes"] - 1, 3),
        "predicted_seconds": numbers["predicted_seconds"],
        "measured_seconds": numbers["training_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two of them")
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args()
    names = QUICK if options.quick else options.only.split(",") if options.only else [name for name, _, _ in CASES]
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    rows = build / "rows.jsonl"
    write_rows(rows)
    others = write_other_rows(rows, build)
    found = {}
    for name, shape, settings in CASES:
        if name in names:
            found[name] = run(make_model(shape, build), others.get(settings.get("objective", ""), rows), settings)
            print(name, found[name], file=sys.stderr, flush=True)
    worst = max(abs(one["error"]) for one in found.values())
    result = {
        "benchmark": "memory",
        "cases": found,
        "ours": worst,
        "peer": 0.1,
        "ratio": round(0.1 / max(worst, 1e-3), 2),
    }
    if not options.quick and not options.only:
        path = HERE / "results" / "memory.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
