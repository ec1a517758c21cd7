"""How many tokens a second are written for 32 requests at once, beside transformers' padded `generate`.

    python benchmarks/writing.py [--quick] [--shape 15m|135m|0.6b] [--repeats N]

A model of a known shape with random weights in bf16, 32 prompts of 64 to 256 tokens, 64 to 192 tokens to write for each,
greedy, no stop tokens. Tokens are those that were asked for: what `generate` writes beyond a request, because another one
of its batch is longer, counts for nothing. The peer gets all 32 at once, padded, as its batches are made. In turn in one
process, medians of the repeats, after one that warms up. `alone` is one request of 128 + 128 tokens, tokens a second while
writing. Writes benchmarks/results/writing-<shape>.json; the last line printed is the same object.
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

from luthier.engine.engine import Engine
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.pages import BLOCK
from luthier.models.spec import LoadedModel

HERE = Path(__file__).parent


def ask(count: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens to write for each."""
    draw = random.Random(0)
    return [
        ([draw.randrange(5, 30000) for _ in range(draw.randint(64, 256))], draw.randint(64, 192)) for _ in range(count)
    ]


def run_ours(model: LoadedModel, asked: list[tuple[list[int], int]]) -> float:
    """Seconds for all."""
    started = time.perf_counter()
    engine = Engine(model, sum(len(prompt) + room + BLOCK for prompt, room in asked))
    requests = [engine.add(prompt, Sampling(max_tokens=room)) for prompt, room in asked]
    engine.run()
    assert all(len(one.written) == room for one, (_, room) in zip(requests, asked))
    return time.perf_counter() - started


def run_padded(model: LoadedModel, asked: list[tuple[list[int], int]]) -> float:
    started = time.perf_counter()
    write(model, [prompt for prompt, _ in asked], Sampling(max_tokens=max(room for _, room in asked)))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shape, repeats = ("15m", 1) if options.quick else (options.shape, options.repeats)
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    plain, ours = (load_model(str(make_model(shape, build)), dtype="bfloat16") for _ in range(2))
    for model in (plain, ours):
        model.spec = model.spec.model_copy(update={"stop_ids": ()})
    fuse(ours)
    asked, alone = ask(32), [(ask(1)[0][0] * 2, 128)]
    alone = [(alone[0][0][:128], 128)]
    wanted = sum(room for _, room in asked)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    single: dict[str, list[float]] = {"ours": [], "peer": []}
    for at in range(repeats + 1):
        for name, model, run in (("ours", ours, run_ours), ("peer", plain, run_padded)):
            many, one = wanted / run(model, asked), 128 / run(model, alone)
            if at:
                rates[name].append(many)
                single[name].append(one)
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    result = {
        "benchmark": "writing",
        "shape": shape,
        "requests": len(asked),
        "tokens": wanted,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "peer_is": "transformers' generate, padded, all 32 at once",
        **medians,
        "ratio": round(medians["ours"] / medians["peer"], 2),
        "alone": {name: round(statistics.median(found), 1) for name, found in single.items()},
    }
    if not options.quick:
        path = HERE / "results" / f"writing-{shape}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
