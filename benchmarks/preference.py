"""How many tokens of pairs a second are learned by DPO, and in how much memory, beside TRL.

    python benchmarks/preference.py [--quick] [--shape 15m|135m|0.6b] [--repeats N] [--peers a,b]

A model of a known shape with random weights, LoRA of rank 16 on all linear layers, pairs with lengths as in Alpaca
(prompts of 60 tokens in the median and 250 at the 95th percentile, answers of 90 and 350), 8 pairs a step. Every system
runs in a fresh process, in turn, several times over, on the same pairs in the same order. Tokens are those of the three
texts of a pair, each counted once and without padding, however often a system reads it; the first steps are left out, and
the time of a reference computed beforehand is added, as much as falls to the measured pairs. Rates are medians over the
repeats. That all learn the same is checked: the loss begins at ln 2, and no step's loss is far from ours. Peers live in
an environment of their own (benchmarks/peers/environment.py). Writes benchmarks/results/preference-<shape>.json; the last
line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from peers.run import run_system
from shapes import WORDS, make_model

HERE = Path(__file__).parent
PEERS = {
    "trl": "TRL as its documentation starts it",
    "trl-batched": "TRL, bf16 weights, precomputed reference, no checkpointing",
    "trl-accumulated": "TRL, bf16 weights, precomputed reference, no checkpointing, a pair at a time",
}
FLAVOURS = {"trl": "default", "trl-batched": "batched", "trl-accumulated": "accumulated"}
BATCH = 8
# How far the first loss may be from ln 2, and that of any step from ours: rounding in bf16, and adapters drawn anew.
FAR = 0.05


def write_pairs(path: Path, ordered: Path, count: int) -> None:
    """`count` pairs of random words for us, and in the order in which our first epoch visits them for the peers."""
    from luthier.data.batches import plan_steps

    draw, words = random.Random(0), WORDS.split()

    def say(role: str, median: float) -> list[dict[str, str]]:
        length = min(500, max(4, draw.lognormvariate(math.log(median), 0.826)))
        return [{"role": role, "content": " ".join(draw.choices(words, k=max(1, round(length * 0.92))))}]

    rows = [
        {"prompt": say("user", 60), "chosen": say("assistant", 90), "rejected": say("assistant", 90)}
        for _ in range(count)
    ]
    steps = plan_steps([0] * count, BATCH, seed=0, epoch=0, by_length=False)
    for where, order in ((path, range(count)), (ordered, [at for step in steps for at in step])):
        where.write_text("".join(json.dumps(rows[at]) + "\n" for at in order), encoding="utf-8")


def run(name: str, options: dict[str, object]) -> dict[str, Any]:
    """Tokens and pairs a second, peak memory, tokens and losses by step of one run of one system."""
    found = run_system(name, "preference", options, FLAVOURS)
    pairs, tokens = len(found["steps"]) * BATCH, [step[1] for step in found["steps"]]
    seconds = sum(step[0] for step in found["steps"]) + found["reference"] * pairs / found["referred"]
    return {
        "tokens_per_second": sum(tokens) / seconds,
        "pairs_per_second": pairs / seconds,
        "peak_gb": found["peak_bytes"] / 1e9,
        "tokens": tokens,
        "losses": found["losses"],
    }


def check(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """That a system learned from the same pairs as we did, and alike."""
    if any(abs(a - b) > 0.02 * b for a, b in zip(theirs["tokens"], ours["tokens"], strict=True)):
        raise SystemExit(f"{name} read other pairs: {theirs['tokens']} tokens by step, {ours['tokens']} in ours")
    away = max(abs(a - b) for a, b in zip(theirs["losses"], ours["losses"], strict=True))
    if abs(theirs["losses"][0] - math.log(2)) > FAR or away > FAR:
        raise SystemExit(f"{name} learned something else: losses {theirs['losses']}, {ours['losses']} in ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat, one peer, three steps")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    asked = parser.parse_args()
    shape, repeats = ("15m", 1) if asked.quick else (asked.shape, asked.repeats)
    systems = ["luthier", *(["trl-accumulated"] if asked.quick else asked.peers.split(","))]
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    steps, warm = (3, 1) if asked.quick else (8, 2)
    options = {
        "model": str(make_model(shape, build)), "data": str(build / "pairs.jsonl"),
        "ordered": str(build / "pairs-ordered.jsonl"), "pairs": steps * BATCH, "batch_size": BATCH, "steps": steps,
        "warm": warm,
    }  # fmt: skip
    write_pairs(build / "pairs.jsonl", build / "pairs-ordered.jsonl", steps * BATCH)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name in systems:
            found[name].append(run(name, options))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
            check(name, found[name][-1], found["luthier"][-1])
    rates = ("tokens_per_second", "pairs_per_second", "peak_gb")
    medians = {
        name: {key: round(statistics.median(one[key] for one in runs), 3) for key in rates}
        | {"losses": [round(loss, 4) for loss in runs[0]["losses"]]}
        for name, runs in found.items()
    }
    ours = medians["luthier"]["tokens_per_second"]
    result = {
        "benchmark": "preference",
        "shape": shape,
        "objective": "dpo",
        "method": "lora",
        "repeats": repeats,
        "systems": {name: {"what": PEERS.get(name, "luthier tune"), **medians[name]} for name in systems},
        "ours": ours,
        "peer": {name: medians[name]["tokens_per_second"] for name in systems[1:]},
        "ratio": {name: round(ours / medians[name]["tokens_per_second"], 2) for name in systems[1:]},
    }
    if not asked.quick:
        path = HERE / "results" / f"preference-{shape}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
