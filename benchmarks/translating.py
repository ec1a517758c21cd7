"""How many tokens a second an encoder-decoder writes for 64 requests of mixed length, beside transformers' padded `generate`.

    python benchmarks/translating.py [--quick] [--repeats N]

A Marian of known shape (6 + 6 layers, 512 wide, as the translators of OPUS-MT) with random weights, both sides in fp32 and then
in bf16, 64 sources of 8 to 128 tokens, 4 to 128 tokens to write for each, greedy, no stop tokens. Tokens are those that were
asked for: what `generate` writes beyond a request, because another one of its batch is longer, counts for nothing. The peer gets
them as `engine.padded` did before the engine took them: sorted by the length of the source, 32 at once. In turn in one process,
medians of the repeats, after one that warms up; an engine is made for each run, which lays out the weights. `alone` is one
request of 32 + 64 tokens. Writes benchmarks/results/translating.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MarianConfig, MarianMTModel
from transformers.utils import logging

from luthier.engine.engine import Engine
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.pages import BLOCK
from luthier.models.precision import cast_weights
from luthier.models.spec import LoadedModel

HERE = Path(__file__).parent
STREAMS = 32
Asked = list[tuple[list[int], int]]


def make(width: int, layers: int, build: Path) -> LoadedModel:
    """A model with random weights and the tokenizer of the shipped one."""
    tokenizer = load_model("mini").tokenizer
    place = build / f"translating-{width}-{layers}"
    if not (place / "config.json").is_file():
        torch.manual_seed(0)
        heads = max(1, width // 64)
        config = MarianConfig(
            vocab_size=32000, decoder_vocab_size=32000, d_model=width, encoder_layers=layers, decoder_layers=layers,
            encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, encoder_attention_heads=heads, decoder_attention_heads=heads,
            max_position_embeddings=512, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
        )  # fmt: skip
        logging.disable_progress_bar()
        MarianMTModel(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    model = load_model(str(place), max_length=512)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    return model


def ask(count: int) -> Asked:
    """Sources, and how many tokens to write for each."""
    draw = random.Random(0)
    return [
        ([draw.randrange(5, 2000) for _ in range(draw.randint(8, 128))], draw.randint(4, 128)) for _ in range(count)
    ]


def run_ours(model: LoadedModel, asked: Asked) -> list[list[int]]:
    engine = Engine(model, sum(len(source) + room + BLOCK for source, room in asked), streams=STREAMS, tokens=1024)
    requests = [engine.add(source, Sampling(max_tokens=room)) for source, room in asked]
    engine.run()
    return [one.written for one in requests]


def run_padded(model: LoadedModel, asked: Asked) -> list[list[int]]:
    found: list[list[int]] = [[]] * len(asked)
    order = sorted(range(len(asked)), key=lambda at: len(asked[at][0]))
    for start in range(0, len(order), STREAMS):
        part = order[start : start + STREAMS]
        most = Sampling(max_tokens=max(asked[at][1] for at in part))
        for at, ids in zip(part, write(model, [asked[at][0] for at in part], most)):
            found[at] = ids[: asked[at][1]]
    return found


def timed(
    run: Callable[[LoadedModel, Asked], list[list[int]]], model: LoadedModel, asked: Asked
) -> tuple[float, list[list[int]]]:
    """Tokens a second, and what was written."""
    started = time.perf_counter()
    found = run(model, asked)
    return sum(room for _, room in asked) / (time.perf_counter() - started), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, 16 requests, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    repeats, count, shape = (1, 16, (128, 2)) if options.quick else (options.repeats, 64, (512, 6))
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    model, asked = make(*shape, build), ask(count)
    one = [(asked[0][0][:32], 64)]
    result = {
        "benchmark": "translating",
        "shape": {"width": shape[0], "layers": shape[1]},
        "requests": count,
        "tokens": sum(room for _, room in asked),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "peer_is": "transformers' generate, padded, 32 at once by length of the source, in the same precision",
        "float32": compare(model, asked, one, repeats),
    }
    cast_weights(model, "bfloat16")
    # What was found out in fp32 is found out anew.
    model.slots = model.head = None
    result["bfloat16"] = compare(model, asked, one, repeats)
    if not options.quick:
        path = HERE / "results" / "translating.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def compare(model: LoadedModel, asked: Asked, one: Asked, repeats: int) -> dict[str, Any]:
    """Medians of both sides in turn, their ratio, and the share of answers that are the same."""
    rates: dict[str, dict[str, list[float]]] = {name: {"many": [], "alone": []} for name in ("ours", "peer")}
    same: list[bool] = []
    for at in range(repeats + 1):
        written = {}
        for name, run in (("ours", run_ours), ("peer", run_padded)):
            many, written[name] = timed(run, model, asked)
            alone, _ = timed(run, model, one)
            print(name, round(many), round(alone), file=sys.stderr, flush=True)
            if at:
                rates[name]["many"].append(many)
                rates[name]["alone"].append(alone)
        same = [ours == peer for ours, peer in zip(written["ours"], written["peer"])]
    medians = {
        name: {key: round(statistics.median(all_), 1) for key, all_ in one.items()} for name, one in rates.items()
    }
    ratio = {key: round(medians["ours"][key] / medians["peer"][key], 2) for key in medians["ours"]}
    return {"same_answers": round(sum(same) / len(same), 3), **medians, "ratio": ratio}


if __name__ == "__main__":
    main()
