"""Whether compiling a model's layers pays for itself: what it takes, what a token takes after it, and beside our own.

    python benchmarks/compile.py [--quick] [--shape 135m|gpt2|15m]

A model of a known shape with random weights in bf16 under LoRA of rank 16; forward to the last states and backward, of
batches of another number of tokens each (700 to 1,200, in texts of 40 to 200). Three ways in turn: as a tuning here runs it
(its faster parts in place), as the family wrote it (the same attention), and that with every layer compiled by
torch.compile for any number of tokens. `break_even` is the tokens after which compiling has paid for itself beside our
own, or null: never. Medians of 16 batches, the ways in turn. Writes benchmarks/results/compile-<shape>.json; the last line
printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from shapes import make_model
from transformers import AttentionInterface

from luthier.models import attention
from luthier.models.adapters import ADAPTERS
from luthier.models.fuse import fuse, unfuse
from luthier.models.layers import layers_of
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.packed import hidden_states
from luthier.models.precision import cast_weights
from luthier.models.spec import LoadedModel

HERE = Path(__file__).parent


def prepare(shape: str, build: Path) -> LoadedModel:
    model = load_model(str(make_model(shape, build)))
    ADAPTERS.parse({"kind": "lora", "rank": 16, "alpha": 32}).apply(model)
    cast_weights(model, "bfloat16")
    model.module.train()
    return model


def learn(model: LoadedModel, draw: random.Random) -> float:
    """Milliseconds a token, forward and back, of a batch of random texts."""
    lengths, wanted = [0], draw.randint(700, 1200)
    while sum(lengths) < wanted:
        lengths.append(min(draw.randint(40, 200), wanted - sum(lengths)))
    lengths = [length for length in lengths if length]
    ids_N = torch.tensor([draw.randrange(8, 30000) for _ in range(sum(lengths))])
    started = time.perf_counter()
    states_NE = hidden_states(model, ids_N, lengths)
    states_NE.backward(torch.ones_like(states_NE))
    spent = time.perf_counter() - started
    model.module.zero_grad(set_to_none=True)
    return spent / len(ids_N) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, four batches")
    parser.add_argument("--shape", default="135m")
    asked = parser.parse_args()
    shape, count = ("15m", 4) if asked.quick else (asked.shape, 16)
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    ways = {name: prepare(shape, build) for name in ("ours", "plain", "compiled")}
    fused = fuse(ways["ours"])
    unfuse(ways["plain"])
    # The attention of a batch depends on the lengths of its texts: compiled too, it would be made anew for each.
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
    draw = random.Random(0)
    for name in ("ours", "plain"):
        learn(ways[name], draw)
    started = time.perf_counter()
    for layer in layers_of(ways["compiled"].network):
        layer.compile(dynamic=True)
    for _ in range(3):  # the first fixes what it can, the second learns that sizes change
        learn(ways["compiled"], draw)
    spent = time.perf_counter() - started
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, model in ways.items():
            found[name].append(learn(model, draw))
    medians = {name: statistics.median(times) for name, times in found.items()}
    spent -= 3 * medians["compiled"] * 950 / 1e3
    gained = medians["ours"] - medians["compiled"]
    result = {
        "benchmark": "compile",
        "shape": shape,
        "parts_with_a_faster_form": fused,
        "compile_seconds": round(spent, 1),
        "milliseconds_a_token": {name: round(one, 4) for name, one in medians.items()},
        "break_even": round(spent * 1e3 / gained) if gained > 0 else None,
        "ours": round(1e3 / medians["ours"], 1),
        "peer": {name: round(1e3 / medians[name], 1) for name in ("plain", "compiled")},
        "ratio": {name: round(medians[name] / medians["ours"], 2) for name in ("plain", "compiled")},
    }
    if not asked.quick:
        path = HERE / "results" / f"compile-{shape}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
