"""How many tokens a second are written on a CUDA device for 256 requests at once and for one, beside transformers' continuous
batching.

    python benchmarks/gpu_writing.py [--quick] [--shape 0.6b|8b] [--repeats N]

A model of a known shape with random weights in bf16, 256 prompts of 64 to 256 tokens, 128 tokens to write for each, greedy, no
stop tokens, no guesses. `graphs` is our engine as it is on a CUDA device, `eager` the same with nothing captured, `transformers`
its `generate_batch` on the same module. In turn in one process, medians of the repeats, after two that warm up. `alone` is one
request of 128 + 128 tokens, tokens a second while writing; `share` what part of the memory's bandwidth that moves in weights (the
bandwidth is measured: the best of several sums). `same` is the share of answers that are the same to the last token, of `eager`
and of `transformers` beside `graphs`: products of other sizes round otherwise, so it is not 1.

Without a CUDA device nothing is measured. With --quick the 15m shape, few requests, one repeat, on the processor where there is
no other: there nothing is captured, and it only shows that this file works; nothing is written. Else writes
benchmarks/results/gpu-writing-<shape>.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from shapes import config_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from luthier.engine import paged
from luthier.engine.decoding import capturer
from luthier.engine.engine import Engine
from luthier.engine.sampling import Sampling
from luthier.models.pages import page_size, writes_by_pages
from luthier.models.spec import LoadedModel
from luthier.models.wrap import wrap_model

HERE = Path(__file__).parent
Asked = list[list[int]]
Written = list[list[int]]


def make(shape: str, device: torch.device) -> LoadedModel:
    """A random model, made where it computes."""
    torch.manual_seed(0)
    with device:
        module = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16).eval()
    mini = Path(str(files("luthier"))) / "assets" / "mini"
    model = wrap_model(module, AutoTokenizer.from_pretrained(mini))
    model.spec = model.spec.model_copy(update={"stop_ids": (), "max_length": module.config.max_position_embeddings})
    module.generation_config = GenerationConfig()
    return model


class Ours:
    """Our engine, which lives from one run to the next; with what captures steps or without."""

    def __init__(self, model: LoadedModel, tokens: int, captures: bool):
        paged.capturer = capturer if captures else lambda device: None
        self.model, self.engine = model, Engine(model, tokens, streams=256, tokens=8192, guessed=0)
        paged.capturer = capturer

    def __call__(self, asked: Asked, room: int) -> tuple[Written, float]:
        """What was written, and seconds from the first token of the first answer to the last of all."""
        requests = [self.engine.add(prompt, Sampling(max_tokens=room)) for prompt in asked]
        self.engine.run()
        wait(self.model)
        return [one.written for one in requests], time.monotonic() - requests[0].first_at

    def leave(self) -> None:
        del self.engine


class Theirs:
    """transformers' continuous batching on the same module, which lives from one run to the next."""

    def __init__(self, model: LoadedModel):
        self.module: Any = model.module

    def __call__(self, asked: Asked, room: int) -> tuple[Written, float]:
        how = GenerationConfig(max_new_tokens=room, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = self.module.generate_batch(
            inputs=asked, generation_config=how, progress_bar=False, persistent_manager=True, record_timestamps=True
        )
        by_prompt = {tuple(one.prompt_ids): one for one in found.values()}
        made = [by_prompt[tuple(prompt)] for prompt in asked]
        last = max(one.timestamps[-1] for one in made)
        return [list(one.generated_tokens) for one in made], last - made[0].timestamps[0]

    def leave(self) -> None:
        self.module.destroy_cached_continuous_batching_manager()


def wait(model: LoadedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def measure_bandwidth(model: LoadedModel, size: int) -> float:
    """Bytes a second that the memory gives: the best of several sums of `size` bytes."""
    many, best = torch.ones(size // 8, dtype=torch.int64, device=model.device), float("inf")
    for _ in range(8):
        wait(model)
        started = time.perf_counter()
        many.sum()
        wait(model)
        best = min(best, time.perf_counter() - started)
    return size / best


def ask(count: int, most: int, seed: int) -> Asked:
    """Prompts that no run had before: what was read is not read again."""
    draw = random.Random(seed)
    return [[draw.randrange(5, 30000) for _ in range(draw.randint(most // 4, most))] for _ in range(count)]


def measure(run: Callable[..., Any], count: int, most: int, room: int, repeats: int) -> tuple[float, float, Written]:
    """Tokens a second over all, and of one answer while it is written; medians of the repeats after two that warm up; and what
    was written last."""
    over_all, while_writing, written = [], [], []
    for seed in range(repeats + 2):
        asked = ask(count, most, 1000 * count + seed)
        started = time.perf_counter()
        written, writing = run(asked, room)
        over_all.append(count * room / (time.perf_counter() - started))
        while_writing.append((room - 1) / writing)
    assert all(len(one) == room for one in written), "an answer ended before its time"
    return statistics.median(over_all[2:]), statistics.median(while_writing[2:]), written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, few requests, one repeat")
    parser.add_argument("--shape", default="0.6b", choices=("0.6b", "8b"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.quick:
        print(json.dumps({"skipped": "no CUDA device; --quick shows on the processor that this works"}))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, repeats = ("15m", 1) if options.quick else (options.shape, options.repeats)
    model = make(shape, device)
    assert writes_by_pages(model)
    count, room, most = (6, 12, 64) if options.quick else (256, 128, 256)
    tokens = count * (most + room + page_size(model))
    ways: dict[str, Callable[[], Any]] = {
        "graphs": lambda: Ours(model, tokens, True),
        "eager": lambda: Ours(model, tokens, False),
        "transformers": lambda: Theirs(model),
    }
    many: dict[str, float] = {}
    alone: dict[str, float] = {}
    answers: dict[str, Written] = {}
    failed: dict[str, str] = {}
    for name, made_anew in ways.items():
        run = None
        try:
            run = made_anew()
            many[name], _, answers[name] = measure(run, count, most, room, repeats)
            run.leave()
            # What manages texts may be made for as many as there are.
            run = made_anew()
            _, alone[name], _ = measure(run, 1, room, room, repeats)
        except Exception as err:
            if name != "transformers":
                raise
            failed[name] = f"{type(err).__name__}: {err}".splitlines()[0]
        if run is not None:
            run.leave()
    moved = sum(one.nbytes for one in model.module.parameters()) - model.network.get_input_embeddings().weight.nbytes
    if model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight:
        moved += model.network.get_input_embeddings().weight.nbytes
    bandwidth = measure_bandwidth(model, 2**28 if options.quick else 2**32)
    made = {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "plainly": model.plainly,
        "requests": count,
        "tokens_per_second": {name: round(rate, 1) for name, rate in many.items()},
        "alone": {name: round(rate, 1) for name, rate in alone.items()},
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 1),
        "share": {name: round(rate * moved / bandwidth, 3) for name, rate in alone.items()},
        "same": {
            name: sum(a == b for a, b in zip(answers[name], answers["graphs"])) / count
            for name in answers
            if name != "graphs"
        },
        "failed": failed,
    }
    if not options.quick:
        (HERE / "results" / f"gpu-writing-{shape}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made))


if __name__ == "__main__":
    main()
