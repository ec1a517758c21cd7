"""How much sooner a tuned model writes when what comes is guessed from its own rows, and that nothing else changes.

    python benchmarks/guessing.py [--quick]

A model of the 135M shape with random weights is tuned (in full, 150 steps of 16) on the shipped text messages, to answer each
with a short verdict that quotes the message; then it answers messages of the held-out fifth one at a time, greedily and drawn,
with guesses and without, read by the native decoder in int8 and int4 and by its own module. With --quick the shipped `mini`.
The same messages are answered without the rows, guessing from the text alone and beside it by a smaller model: of the 15M
shape, tuned as the other was. With --quick that is `mini` as it ships.
In turn, medians of the repeats, tokens a second of the answers, prompts included in the time; by its own module a few messages.
The answers are compared token by token. Tuned models are kept in build/benchmarks/guessing for the next time. Writes
benchmarks/results/guessing.json; the last line printed is the same object, in which `ours` is with guesses, `peer` without,
`text` with those from the text alone, `draft` with those and the smaller model's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from shapes import make_model

import luthier
from luthier.core.events import Events
from luthier.core.types import Message
from luthier.engine.engine import Engine
from luthier.engine.learned import remember
from luthier.engine.loading import take_draft
from luthier.engine.native import prepare
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from luthier.models.spec import LoadedModel
from luthier.native.library import kernels

HERE = Path(__file__).parent
VERDICTS = {
    "spam": 'This is an advertisement, and it wants something from you: "{}". Do not answer, do not call, and block the sender.',
    "ham": 'This is from somebody who knows you: "{}". Nothing has to be done about it; answer when you have the time.',
}
QUOTED = 8
# What reads, and how many messages.
WAYS = {"int8": 60, "int4": 60, "model": 5}


def answer(text: str, label: str) -> str:
    return VERDICTS[label].format(" ".join(text.split()[:QUOTED]))


def tune(model: str, folder: Path, steps: int) -> tuple[str, list[str]]:
    """The run of the tuned model, which is tuned once, and messages that it has not seen."""
    place = Path(str(files("luthier"))) / "assets" / "sms_spam"
    with gzip.open(place / "data.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    held, seen = rows[::5], [row for at, row in enumerate(rows) if at % 5]
    known_path = folder / "tuned.json"
    known = json.loads(known_path.read_text()) if known_path.exists() else {}
    name = f"{Path(model).name}, {steps} steps"
    if name in known:
        return known[name], [row["text"] for row in held]
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": row["text"]},
                              {"role": "assistant", "content": answer(row["text"], row["label"])}]}
            ) + "\n"
            for row in seen
        ),
        encoding="utf-8",
    )  # fmt: skip
    record = luthier.tune(
        model=model, data={"train": str(path), "split": {"validation": 0.02}}, adapter="full", steps=steps,
        batch_size=16, learning_rate=1e-3 if model == "mini" else 5e-4, baselines=False,
    )  # fmt: skip
    known_path.write_text(json.dumps({**known, name: record.id}))
    return record.id, [row["text"] for row in held]


def write(
    model: LoadedModel, prompts: list[list[int]], guessed: int, temperature: float, learned: Any, draft: Any
) -> tuple[float, list[list[int]], float]:
    """Tokens a second, the answers, and the share of what was guessed that was right."""
    model.learned, model.draft = learned, draft
    sampling = Sampling(max_tokens=60, temperature=temperature)
    engine, written = Engine(model, 4096, guessed=guessed), []
    drafted = accepted = 0
    started = time.perf_counter()
    for at, prompt in enumerate(prompts):
        request = engine.add(prompt, sampling, draw=numbers_of(1, at))
        engine.run()
        written.append(request.written)
        drafted, accepted = drafted + request.drafted, accepted + request.accepted
    return sum(map(len, written)) / (time.perf_counter() - started), written, accepted / max(1, drafted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 steps of tuning, 20 messages, one repeat")
    quick = parser.parse_args().quick
    repeats = 1 if quick else 3
    build = HERE.parent / "build" / "benchmarks"
    folder = build / "guessing"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LUTHIER_RUNS"] = str(folder)
    source = "mini" if quick else str(make_model("135m", build))
    run, texts = tune(source, folder, 60 if quick else 150)
    small = "mini" if quick else f"run:{tune(str(make_model('15m', build)), folder, 150)[0]}"
    ways = {}
    for name in WAYS:
        model = load_model(f"run:{run}")
        prepare(model, name, Events())
        remember(model)
        take_draft(model, small, "auto", Events())
        ways[name] = model, model.learned, model.draft
    prompts = [model.renderer.prompt([Message("user", text)]) for text in texts[: 20 if quick else 60]]
    found: dict[str, dict[str, list[float]]] = {}
    right: dict[str, float] = {}
    for at in range(repeats + 1):
        for name, (model, learned, draft) in ways.items():
            for temperature in (0.0, 0.7):
                key = f"{name}, {'greedy' if temperature == 0 else 'drawn at 0.7'}"
                sides = {
                    "ours": (32, learned, None),
                    "peer": (0, None, None),
                    "text": (32, None, None),
                    "draft": (32, None, draft),
                }
                made = {
                    side: write(model, prompts[: WAYS[name]], many, temperature, *from_)
                    for side, (many, *from_) in sides.items()
                }
                if any(one[1] != made["peer"][1] for one in made.values()):
                    raise SystemExit(f"{key}: guesses changed an answer")
                right[key] = round(made["draft"][2], 3)
                if at:
                    for side, (rate, _, _) in made.items():
                        found.setdefault(key, {}).setdefault(side, []).append(rate)
                print(key, {side: round(one[0]) for side, one in made.items()}, file=sys.stderr, flush=True)
    medians = {
        side: {key: round(statistics.median(one[side]), 1) for key, one in found.items()}
        for side in ("ours", "peer", "text", "draft")
    }
    result = {
        "benchmark": "guessing",
        "messages": {name: min(many, len(prompts)) for name, many in WAYS.items()},
        "kernels": kernels(),
        "repeats": repeats,
        "unit": "tokens/s, one message at a time",
        "same_answers": True,
        **medians,
        "ratio": {key: round(medians["ours"][key] / medians["peer"][key], 2) for key in found},
        "draft_ratio": {key: round(medians["draft"][key] / medians["text"][key], 2) for key in found},
        "draft_right": right,
    }
    if not quick:
        path = HERE / "results" / "guessing.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
