"""How many tokens a second are written for 32 requests at once, beside transformers' padded `generate`.

    python benchmarks/writing.py [--quick] [--shape 15m|135m|0.6b] [--repeats N] [--peers llama,openvino,vllm]

Ours in each way it can execute: the native decoder with weights in int8, int4 and bf16, and the module itself
(`model`).

A model of a known shape with random weights in bf16, 32 prompts of 64 to 256 tokens, 64 to 192 tokens to write for
each, greedy, no stop tokens. Tokens are those that were asked for: what `generate` writes beyond a request, because
another one of its batch is longer, counts for nothing. The peer gets all 32 at once, padded, as its batches are made.
In turn in one process, medians of the repeats, after four of the requests to warm up. `alone` is one request of 128 + 128 tokens,
tokens a second while writing, without guesses; `prefill` is tokens a second of a prompt of 1,024, `share` what part
of the machine's bandwidth one request moves in weights, `arithmetic` what part of the multiply-adds that the processor
does from registers (benchmarks/arithmetic.py) the matrix products of the 32 requests and of the prompt are, attention
left out, `first_step` seconds of packing the weights. Peers beside it
are llama.cpp, OpenVINO GenAI and vLLM's CPU build, each in an environment of its own and in its best form. Writes
benchmarks/results/writing-<shape>.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arithmetic import peaks
from peers.environment import peer_python
from shapes import make_model

from luthier.engine.engine import Engine
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.decoder import describe
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.pages import BLOCK
from luthier.models.spec import LoadedModel
from luthier.native.library import kernels
from luthier.native.packed import Packed

HERE = Path(__file__).parent
FORMS = ("int8", "int4", "bfloat16")
# What each form multiplies.
PRODUCTS = {"int8": "int8", "int4": "int8", "bfloat16": "bf16"}


def ask(count: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens to write for each."""
    draw = random.Random(0)
    return [
        ([draw.randrange(5, 30000) for _ in range(draw.randint(64, 256))], draw.randint(64, 192)) for _ in range(count)
    ]


def run_ours(model: LoadedModel, asked: list[tuple[list[int], int]]) -> float:
    """Seconds for all."""
    started = time.perf_counter()
    engine = Engine(model, sum(len(prompt) + room + BLOCK for prompt, room in asked), tokens=1024, guessed=0)
    requests = [engine.add(prompt, Sampling(max_tokens=room)) for prompt, room in asked]
    engine.run()
    assert all(len(one.written) == room for one, (_, room) in zip(requests, asked))
    return time.perf_counter() - started


def run_padded(model: LoadedModel, asked: list[tuple[list[int], int]]) -> float:
    started = time.perf_counter()
    write(model, [prompt for prompt, _ in asked], Sampling(max_tokens=max(room for _, room in asked)))
    return time.perf_counter() - started


def run_other(name: str, build: Path, shape: str, asked: list[tuple[list[int], int]], repeats: int) -> dict[str, Any]:
    """What benchmarks/peers/writing_<name>.py measured, in its own environment."""
    given = {"model": str(build / shape), "folder": str(build), "asked": asked, "repeats": repeats,
             "threads": torch.get_num_threads()}  # fmt: skip
    script = HERE / "peers" / f"writing_{name}.py"
    command = [peer_python(name), str(script), json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure_bandwidth() -> float:
    """Bytes a second that the machine reads: the best of several sums of 512 MB."""
    many = torch.ones(2**26, dtype=torch.int64)
    best = min(_timed(lambda: many.sum()) for _ in range(8))
    return many.nbytes / best


def arithmetic(
    model: LoadedModel, most: float, rates: dict[str, float], asked: list[tuple[list[int], int]]
) -> dict[str, float]:
    """The part of `most` multiply-adds a second that the matrix products of the requests are."""
    linear = [one.weight.numel() for one in model.module.modules() if isinstance(one, torch.nn.Linear)]
    head = model.module.get_output_embeddings().weight.numel()
    layers = sum(linear) - head
    wanted, read = sum(room for _, room in asked), sum(len(prompt) + room for prompt, room in asked)
    many = (layers * read + head * wanted) * rates["many"] / wanted
    return {"many": round(many / most, 2), "prefill": round(layers * rates["prefill"] / most, 2)}


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="llama,openvino,vllm", help="beside transformers; none with --quick")
    options = parser.parse_args()
    shape, repeats = ("15m", 1) if options.quick else (options.shape, options.repeats)
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    # Where torch only imitates bf16, the peer is given what it is fast in.
    dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    plain, ours = (load_model(str(make_model(shape, build)), dtype=dtype) for _ in range(2))
    for model in (plain, ours):
        model.spec = model.spec.model_copy(update={"stop_ids": ()})
    fuse(ours)
    ways = {"model": ours}
    first_step, weights = {}, {}
    for form in FORMS:
        started = time.perf_counter()
        ways[form] = replace(ours, native=Packed(describe(plain), form))
        first_step[form], weights[form] = round(time.perf_counter() - started, 2), ways[form].native.nbytes
    asked, ids = ask(32), [token for prompt, _ in ask(32) for token in prompt]
    alone, long = [(ids[:128], 128)], [(ids[:1024], 1)]
    wanted = sum(room for _, room in asked)
    systems = {**{name: (model, run_ours) for name, model in ways.items()}, "peer": (plain, run_padded)}
    rates: dict[str, dict[str, list[float]]] = {name: {"many": [], "alone": [], "prefill": []} for name in systems}
    for model, run in systems.values():
        run(model, asked[:4])
        run(model, long)
    for _ in range(repeats):
        for name, (model, run) in systems.items():
            found = {"many": wanted / run(model, asked), "prefill": 1024 / run(model, long)}
            begun = run(model, [(alone[0][0], 1)])
            found["alone"] = 127 / (run(model, alone) - begun)
            print(name, {key: round(one) for key, one in found.items()}, file=sys.stderr, flush=True)
            for key, one in found.items():
                rates[name][key].append(one)
    medians = {
        name: {key: round(statistics.median(one), 1) for key, one in found.items()} for name, found in rates.items()
    }
    bandwidth, most = measure_bandwidth(), peaks()
    peer = medians.pop("peer")
    names = [] if options.quick else [name for name in options.peers.split(",") if name]
    result: dict[str, Any] = {
        "benchmark": "writing",
        "shape": shape,
        "requests": len(asked),
        "tokens": wanted,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "kernels": kernels(),
        "peer_is": f"transformers' generate, padded, all 32 at once, {dtype}",
        "first_step": first_step,
        "bandwidth_gb": round(bandwidth / 1e9, 1),
        "share": {form: round(medians[form]["alone"] * weights[form] / bandwidth, 2) for form in FORMS},
        "arithmetic": {
            form: arithmetic(plain, most[PRODUCTS[form]], medians[form], asked)
            for form in FORMS
            if PRODUCTS[form] in most
        },
        "ours": medians,
        "peer": peer,
        "ratio": {name: {key: round(one[key] / peer[key], 2) for key in one} for name, one in medians.items()},
    }
    result["others"], result["ratio_to_others"] = {}, {}

    def keep() -> None:
        if not options.quick:
            path = HERE / "results" / f"writing-{shape}.json"
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    keep()
    for name in names:
        other = run_other(name, build, shape, asked, repeats)
        highest = {key: max(one[key] for one in other.values() if isinstance(one, dict)) for key in peer}
        result["others"][name] = other
        result["ratio_to_others"][name] = {
            form: {key: round(medians[form][key] / highest[key], 2) for key in peer} for form in FORMS
        }
        # After each, for the next may fail after many minutes.
        keep()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
