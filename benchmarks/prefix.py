"""A prompt read once for all that continue it, beside the same prompt read again before each.

    python benchmarks/prefix.py [--quick]

The 135M shape with random weights in bf16, its faster parts in place, LoRA of rank 16 on all linear layers; forward to
the last states and backward, of two batches: a pair (a prompt of 200 tokens with two answers of 100, as in DPO) and a
group (a prompt of 400 with eight answers of 60, as in GRPO). The peer is our own reference `_repeated`, which reads a
prompt before each of its answers and once for itself; `apart` is what a trainer of whole sequences computes: prompt and
answer, as often as there are answers. The ways in turn, medians of 5; `ratio` is time over time. With --quick the 15M
shape and one repeat. Writes benchmarks/results/prefix.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import make_model

from luthier.models.adapters import ADAPTERS
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.packed import _repeated, hidden_states, shares
from luthier.models.spec import LoadedModel

HERE = Path(__file__).parent
BATCHES = {
    "pair": ((200, 100, 100), (-1, 0, 0)),
    "group": ((400, *[60] * 8), (-1, *[0] * 8)),
}


def seconds(model: LoadedModel, read: Callable[[], torch.Tensor]) -> float:
    """Of a forward and a backward pass to the adapter's weights."""
    started = time.perf_counter()
    states_NE = read()
    states_NE.backward(torch.ones_like(states_NE))
    spent = time.perf_counter() - started
    model.module.zero_grad(set_to_none=True)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat")
    shape, repeats = ("15m", 1) if parser.parse_args().quick else ("135m", 5)
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    model = load_model(str(make_model(shape, build)))
    ADAPTERS.parse({"kind": "lora", "rank": 16, "alpha": 32}).apply(model)
    fuse(model)
    if not shares(model):
        raise SystemExit("this model does not share prompts")
    medians: dict[str, dict[str, float]] = {}
    for name, (lengths, parents) in BATCHES.items():
        ids_N = torch.randint(8, 30000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        pieces = ids_N.split(list(lengths))
        whole = [torch.cat([pieces[up], one]) for one, up in zip(pieces, parents) if up >= 0]
        flat_N, sizes = torch.cat(whole), [len(one) for one in whole]
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda ids_N=ids_N, lengths=lengths, parents=parents: hidden_states(model, ids_N, lengths, parents),
            "peer": lambda ids_N=ids_N, lengths=lengths, parents=parents: _repeated(model, ids_N, lengths, parents),
            "apart": lambda flat_N=flat_N, sizes=sizes: hidden_states(model, flat_N, sizes),
        }
        found = [{way: seconds(model, read) for way, read in ways.items()} for _ in range(repeats + 1)][1:]
        medians[name] = {way: round(statistics.median(one[way] for one in found), 3) for way in ways}
    result = {
        "benchmark": "prefix",
        "shape": shape,
        "unit": "s",
        "threads": torch.get_num_threads(),
        "peer_is": "our own reference, which reads the prompt again before each answer",
        "tokens": {name: sum(lengths) for name, (lengths, _) in BATCHES.items()},
        **{way: {name: one[way] for name, one in medians.items()} for way in ("ours", "peer", "apart")},
        "ratio": {name: round(one["peer"] / one["ours"], 2) for name, one in medians.items()},
        "ratio_to_apart": {name: round(one["apart"] / one["ours"], 2) for name, one in medians.items()},
    }
    if shape == "135m":
        path = HERE / "results" / "prefix.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
