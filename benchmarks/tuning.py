"""How many tokens a second are learned, and in how much memory, beside TRL and transformers' Trainer.

    python benchmarks/tuning.py [--quick] [--shape 15m|135m|0.6b] [--method lora|full] [--repeats N] [--peers a,b]

A model of a known shape with random weights, 1,000 conversations with lengths as in Alpaca (median 90 tokens, 95th
percentile 350), LoRA of rank 16 on all linear layers, or full tuning; 8 rows a step, the answers learned. Every system
runs in a fresh process, in turn, several times over; tokens are real ones (no padding), the first steps are left out,
rates are medians over the repeats. Peers live in an environment of their own (benchmarks/peers/environment.py).
Writes benchmarks/results/tuning-<shape>-<method>.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from peers.run import run_system
from shapes import make_model, write_rows

HERE = Path(__file__).parent
PEERS = {
    "trl": "TRL as its documentation starts it",
    "trl-packed": "TRL, bf16 weights, packing, checkpointing",
    "trl-padded": "TRL, bf16 weights, no packing, no checkpointing",
    "trainer": "transformers.Trainer and peft, bf16 weights",
    "trainer-fp32": "transformers.Trainer and peft, fp32 weights, autocast to bf16",
}
FLAVOURS = {"trl": "default", "trl-packed": "packed", "trl-padded": "padded"}


def run(name: str, options: dict[str, object]) -> dict[str, float]:
    """Tokens a second, peak memory and mean loss of one run of one system."""
    found = run_system(name, "tuning", options, FLAVOURS)
    seconds, tokens = (sum(step[at] for step in found["steps"]) for at in (0, 1))
    return {
        "tokens_per_second": tokens / seconds,
        "peak_gb": found["peak_bytes"] / 1e9,
        "mean_loss": statistics.mean(found["losses"]),
    }


def measure_peak() -> float:
    """The machine's bf16 matrix product, GFLOP/s: the best of several of 2,048 x 1,024 x 3,072."""
    import torch

    a, b = torch.randn(2048, 1024).bfloat16(), torch.randn(3072, 1024).bfloat16()
    best = min(_timed(lambda: torch.nn.functional.linear(a, b)) for _ in range(20))
    return 2 * 2048 * 1024 * 3072 / best / 1e9


def _timed(work) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def count_flops(model: Path, method: str) -> float:
    """FLOPs a token as the field counts them: 4 N for LoRA (no gradient of the base), 6 N for full tuning."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return (4 if method == "lora" else 6) * parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat, one peer")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--method", default="lora", choices=("lora", "full"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    asked = parser.parse_args()
    shape, repeats = ("15m", 1) if asked.quick else (asked.shape, asked.repeats)
    systems = ["luthier", *(["trl-packed"] if asked.quick else asked.peers.split(","))]
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    model, rows = make_model(shape, build), build / "rows.jsonl"
    write_rows(rows)
    options = {
        "model": str(model), "data": str(rows), "method": asked.method, "batch_size": 8,
        "steps": 6 if asked.quick else 8, "warm": 2,
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    peaks = []
    for _ in range(repeats):
        peaks.append(measure_peak())
        for name in systems:
            found[name].append(run(name, options))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }
    ours = medians["luthier"]["tokens_per_second"]
    peak = statistics.median(peaks)
    result = {
        "benchmark": "tuning",
        "shape": shape,
        "method": asked.method,
        "repeats": repeats,
        "systems": {name: {"what": PEERS.get(name, "luthier tune"), **medians[name]} for name in systems},
        "bf16_peak_gflops": round(peak, 1),
        "share_of_peak": round(ours * count_flops(model, asked.method) / 1e9 / peak, 3),
        "ours": ours,
        "peer": {name: medians[name]["tokens_per_second"] for name in systems[1:]},
        "ratio": {name: round(ours / medians[name]["tokens_per_second"], 2) for name in systems[1:]},
    }
    if not asked.quick:
        path = HERE / "results" / f"tuning-{shape}-{asked.method}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
