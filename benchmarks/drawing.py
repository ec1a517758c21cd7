"""How many tokens a second are drawn for 32 requests at once, the draws by the C kernel and by plain torch.

    python benchmarks/drawing.py [--quick] [--shape 15m|135m] [--repeats N]

The model and the requests of benchmarks/writing.py, read by the native decoder in int8, in each way of sampling; `greedy` draws
nothing. Weights are random, so that the likeliest tokens hold little and `top_p` keeps many: the dear case. In turn in one
process, medians of the repeats, after one that warms up. Writes benchmarks/results/drawing.json; the last line printed is the
same object, in which `peer` is the same engine with draws in plain torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from shapes import make_model

from luthier.core.events import Events
from luthier.engine import choose
from luthier.engine.engine import Engine
from luthier.engine.native import prepare
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.pages import BLOCK
from luthier.models.spec import LoadedModel
from writing import ask

HERE = Path(__file__).parent
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
}


def run(model: LoadedModel, asked: list[tuple[list[int], int]], settings: dict[str, Any]) -> float:
    """Tokens a second."""
    started = time.perf_counter()
    engine = Engine(model, sum(len(prompt) + room + BLOCK for prompt, room in asked), tokens=1024, guessed=0)
    for at, (prompt, room) in enumerate(asked):
        engine.add(prompt, Sampling(max_tokens=room, **settings), draw=numbers_of(at))
    engine.run()
    return sum(room for _, room in asked) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat, 8 requests")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shape, repeats, count = ("15m", 1, 8) if options.quick else (options.shape, options.repeats, 32)
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    model = load_model(str(make_model(shape, build)), dtype="bfloat16")
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    prepare(model, "int8", Events())
    asked = ask(count)
    rates: dict[str, dict[str, list[float]]] = {side: {way: [] for way in WAYS} for side in ("ours", "peer")}
    for at in range(repeats + 1):
        for way, settings in WAYS.items():
            found = {"ours": run(model, asked, settings)}
            with patch.object(choose, "can_draw", lambda _: False):
                found["peer"] = run(model, asked, settings)
            print(way, {side: round(one) for side, one in found.items()}, file=sys.stderr, flush=True)
            if at:
                for side, one in found.items():
                    rates[side][way].append(one)
    medians = {
        side: {way: round(statistics.median(one), 1) for way, one in ways.items()} for side, ways in rates.items()
    }
    result = {
        "benchmark": "drawing",
        "shape": shape,
        "requests": count,
        "unit": "tokens/s",
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "peer_is": "the same engine with draws in plain torch",
        **medians,
        "ratio": {way: round(medians["ours"][way] / medians["peer"][way], 2) for way in WAYS},
    }
    if not options.quick:
        path = HERE / "results" / "drawing.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
